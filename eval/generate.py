"""Answers: a policy's responses to prompts, greedy and sampled, into answers.jsonl.

    python -m eval.generate --policy RUN/policy --prompts FILE --out DIR --greedy --samples 4

Prompts are lines of {id, prompt: chat messages, temperature?, follow_ups?}. temperature takes the place of
--temperature for the samples of this prompt (0: without chance). follow_ups are the user's further turns: each is
answered in the conversation so far, answers included. Each answer is a line of {id, decoding, sample, turn, response,
tokens, finished}: decoding is greedy, sampled, or prescribed (by the prompt's own temperature), turn counts from 1,
and finished is false where the length limit cut it.

Prompts are encoded as in training and sent as ids, so no engine adds a BOS or a template of its own. An interrupted
command continues after the last whole batch; batches do not depend on where it stopped, so the file ends the same.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data_prep.files import InputError, read_json, run_command, to_json, write_json, write_jsonl
from data_prep.manifest import plan, up_to_date, write_manifest
from data_prep.rows import LONGEST_TEXT, read_prompts
from train.engine.models import Checkpoint
from train.engine.sampling import sample
from train.engine.tokens import Encoder

DTYPES = ("float32", "bfloat16")
# (prompts as ids, temperature, seed) -> responses as ids, with EOS where it was reached
Draw = Callable[[list[list[int]], float, int], list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are drawn. samples: answers to each prompt at `temperature`; greedy: one more, without chance."""

    greedy: bool
    samples: int
    temperature: float
    max_prompt_tokens: int
    max_new_tokens: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        """InputError for settings that ask for nothing or for the impossible."""
        if not self.greedy and self.samples < 1:
            raise InputError("nothing to generate: give --greedy, --samples N, or both")
        if self.samples < 0 or self.batch < 1 or self.max_new_tokens < 1:
            raise InputError("--samples must be at least 0, --batch and --max-new-tokens at least 1")
        if self.samples and not self.temperature > 0:
            raise InputError(
                f"--temperature {self.temperature:g}: samples need one above 0; --greedy is without chance"
            )


@dataclasses.dataclass(frozen=True)
class Slot:
    """One answer to be drawn, or a conversation of several: to which prompt (its place), and how."""

    place: int
    decoding: str
    sample: int
    temperature: float


def transformers_engine(checkpoint: Checkpoint, dtype: str, decoding: Decoding) -> tuple[Draw, PreTrainedTokenizerBase]:
    """Draw with transformers, on the GPU if there is one; a model too large for one is spread over all."""
    cuda = torch.cuda.is_available()
    model, tokenizer = checkpoint.load(dtype=getattr(torch, dtype), device_map="auto" if cuda else None)

    def draw(prompts: list[list[int]], temperature: float, seed: int) -> list[list[int]]:
        return sample(
            model, tokenizer, prompts, max_new_tokens=decoding.max_new_tokens, temperature=temperature, seed=seed
        )

    return draw, tokenizer


def vllm_engine(checkpoint: Checkpoint, dtype: str, decoding: Decoding) -> tuple[Draw, PreTrainedTokenizerBase]:
    """Draw with vLLM: the same prompts as ids, and the same distribution; other random numbers."""
    try:
        import vllm
    except ImportError:
        raise InputError("--engine vllm: vLLM is not installed here; install it, or leave --engine out") from None
    if checkpoint.is_local and (Path(checkpoint.name) / "adapter_config.json").exists():
        raise InputError(f"{checkpoint.name}: an adapter; merge it into its base first, or leave --engine out")
    model = vllm.LLM(
        model=checkpoint.name, revision=checkpoint.revision, tokenizer_revision=checkpoint.revision, dtype=dtype,
        seed=decoding.seed, trust_remote_code=False, generation_config="vllm",  # none of the checkpoint's own defaults
    )  # fmt: skip
    tokenizer = model.get_tokenizer()

    def draw(prompts: list[list[int]], temperature: float, seed: int) -> list[list[int]]:
        options = [  # a seed for each: one seed for all would give equal prompts equal samples
            vllm.SamplingParams(
                temperature=temperature, top_p=1.0, top_k=-1, max_tokens=decoding.max_new_tokens, seed=seed * 4096 + i,
                stop_token_ids=[tokenizer.eos_token_id],
            )
            for i in range(len(prompts))
        ]  # fmt: skip
        found = model.generate([{"prompt_token_ids": ids} for ids in prompts], options, use_tqdm=False)
        return [list(request.outputs[0].token_ids) for request in found]

    return draw, tokenizer


ENGINES = {"transformers": transformers_engine, "vllm": vllm_engine}


def read_tasks(path: Path | str) -> list[dict[str, Any]]:
    """Prompts with their optional temperature and follow_ups; InputError, with the prompt's id, for a bad one."""
    tasks = read_prompts(path)
    for task in tasks:
        own, more = task.get("temperature", 1.0), task.get("follow_ups", [])
        if isinstance(own, bool) or not isinstance(own, int | float) or not 0 <= own < math.inf:
            raise InputError(f"{path}: prompt {task['id']!r} has temperature {own!r}; give a number, at least 0")
        if not isinstance(more, list) or not all(isinstance(text, str) and len(text) < LONGEST_TEXT for text in more):
            raise InputError(f"{path}: prompt {task['id']!r}: follow_ups must be a list of texts")
    return tasks


def slots(tasks: list[dict[str, Any]], decoding: Decoding) -> list[Slot]:
    """What is to be drawn; InputError where several samples would be copies of one."""
    found = [Slot(place, "greedy", 0, 0.0) for place in range(len(tasks))] if decoding.greedy else []
    for place, task in enumerate(tasks):
        own = task.get("temperature")
        if own == 0 and decoding.samples > 1:
            raise InputError(f"prompt {task['id']!r} has temperature 0, so {decoding.samples} samples of it would be "
                             "equal; give --samples 1")  # fmt: skip
        name, temperature = ("sampled", decoding.temperature) if own is None else ("prescribed", float(own))
        found += [Slot(place, name, k, temperature) for k in range(decoding.samples)]
    return found


def generate(
    draw: Draw, tokenizer: PreTrainedTokenizerBase, tasks: list[dict[str, Any]], decoding: Decoding, part: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answers to all prompts, in the order of (prompt, decoding, sample, turn), and facts for the manifest.

    `part` collects whole batches meanwhile. All first turns are drawn before any second one.
    """
    encoder = Encoder(tokenizer, decoding.max_prompt_tokens, decoding.max_new_tokens)
    later = Encoder(tokenizer, LONGEST_TEXT, decoding.max_new_tokens)  # the limit is for what is given, not for answers
    first = [encoder.prompt(task["prompt"], task["id"])[1] for task in tasks]
    wanted = slots(tasks, decoding)
    said: dict[tuple[Slot, int], dict[str, Any]] = {}
    earlier = _whole_batches(part)
    done = {answer["batch"] for answer in earlier}
    by_name = {(slot.place, slot.decoding, slot.sample): slot for slot in wanted}
    for answer in earlier:
        said[by_name[answer["order"], answer["decoding"], answer["sample"]], answer["turn"]] = answer
    turns = [1 + len(task.get("follow_ups", [])) for task in tasks]
    total, numbers = sum(turns[slot.place] for slot in wanted), itertools.count()
    with (
        open(part, "a", encoding="utf-8") as file,
        tqdm(total=total, initial=len(said), desc="generate", unit="answer") as bar,
    ):
        for turn in range(1, max(turns) + 1):
            ids = {}
            for slot in wanted:
                task = tasks[slot.place]
                if turn == 1:
                    ids[slot] = first[slot.place]
                elif turn <= turns[slot.place]:
                    answered = [said[slot, past]["response"] for past in range(1, turn)]
                    ids[slot] = later.prompt(conversation(task, answered), task["id"])[1]
            for items in _batches(ids, decoding.batch):
                number = next(numbers)
                if number in done:
                    continue
                drawn = draw([ids[s] for s in items], items[0].temperature, decoding.seed * 1_000_003 + number)
                lines = []
                for slot, response in zip(items, drawn, strict=True):
                    lines.append({
                        "batch": number, "last": False, "order": slot.place, "id": tasks[slot.place]["id"],
                        "decoding": slot.decoding, "sample": slot.sample, "turn": turn,
                        "response": tokenizer.decode(response, skip_special_tokens=True), "tokens": len(response),
                        "finished": response[-1:] == [tokenizer.eos_token_id],
                    })  # fmt: skip
                    said[slot, turn] = lines[-1]
                lines[-1]["last"] = True
                file.write("".join(to_json(line) + "\n" for line in lines))
                file.flush()
                bar.update(len(lines))
    answers = sorted(said.values(), key=lambda a: (a["order"], a["decoding"], a["sample"], a["turn"]))
    facts = {
        "prompts": len(tasks),
        "answers": len(answers),
        "unfinished": sum(not answer["finished"] for answer in answers),
        "empty": sum(not answer["response"].strip() for answer in answers),
        "chat_template_sha256": encoder.facts()["chat_template_sha256"],
        # What the model was sent for the first prompt: anyone can decode it and look.
        "first_prompt": {"id": tasks[0]["id"], "ids": first[0], "bos": first[0].count(tokenizer.bos_token_id)},
    }
    kept = ("id", "decoding", "sample", "turn", "response", "tokens", "finished")
    return [{key: answer[key] for key in kept} for answer in answers], facts


def conversation(task: dict[str, Any], answers: list[str]) -> list[dict[str, str]]:
    """Chat messages of a prompt with the answers to its first turns, up to the user's next turn."""
    messages = list(task["prompt"])
    for answer, follow_up in zip(answers, task["follow_ups"], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": follow_up}]
    return messages


def _batches(ids: dict[Slot, list[int]], size: int) -> Iterator[list[Slot]]:
    """Slots of one temperature, prompts of like length together; greedy answers first."""
    kinds = sorted({(slot.decoding != "greedy", slot.temperature) for slot in ids})
    for kind in kinds:
        items = [slot for slot in ids if (slot.decoding != "greedy", slot.temperature) == kind]
        items.sort(key=lambda slot: (len(ids[slot]), slot.place, slot.sample))
        for start in range(0, len(items), size):
            yield items[start : start + size]


def _whole_batches(part: Path) -> list[dict[str, Any]]:
    """Answers of an earlier attempt, up to its last whole batch; what follows is cut off the file."""
    answers: list[dict[str, Any]] = []
    batch: list[dict[str, Any]] = []
    whole = 0  # bytes up to the end of the last whole batch
    end = 0
    if part.exists():
        for line in part.read_bytes().splitlines(keepends=True):
            end += len(line)
            try:
                batch.append(json.loads(line))
            except ValueError:  # the write that was interrupted
                break
            if batch[-1]["last"] and line.endswith(b"\n"):
                answers, batch, whole = answers + batch, [], end
        os.truncate(part, whole)
    return answers


def main() -> None:
    """Generate, unless the same answers are there already."""
    parser = argparse.ArgumentParser(prog="python -m eval.generate")
    parser.add_argument("--policy", required=True, help="directory of the policy, or its Hub id")
    parser.add_argument("--policy-revision", help="commit, for a model from the Hub")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", required=True, help="directory")
    parser.add_argument("--greedy", action="store_true", help="one greedy answer to each prompt")
    parser.add_argument("--samples", type=int, default=0, help="sampled answers to each prompt")
    parser.add_argument("--temperature", type=float, default=1.0, help="of samples, where a prompt has none of its own")
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=128, help="answers drawn at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of weights and computation")
    parser.add_argument("--engine", choices=list(ENGINES), default="transformers", help="vllm must be installed")
    arguments = parser.parse_args()
    decoding = Decoding(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Decoding)})
    checkpoint = Checkpoint(arguments.policy, arguments.policy_revision)
    out = Path(arguments.out)
    settings = {
        "policy": checkpoint.digest, "decoding": dataclasses.asdict(decoding), "dtype": arguments.dtype,
        "engine": arguments.engine,
    }  # fmt: skip
    planned = plan("eval.generate", settings, {"prompts": arguments.prompts})
    if up_to_date(out, planned):
        print(f"{out}: done already, nothing to do")
        return
    tasks = read_tasks(arguments.prompts)
    slots(tasks, decoding)  # refuses before a model is loaded
    out.mkdir(parents=True, exist_ok=True)
    part = out / "answers.part.jsonl"
    if not (out / "plan.json").exists() or read_json(out / "plan.json") != planned:
        part.unlink(missing_ok=True)  # another policy's or another seed's answers
        write_json(out / "plan.json", planned)
    draw, tokenizer = ENGINES[arguments.engine](checkpoint, arguments.dtype, decoding)
    answers, facts = generate(draw, tokenizer, tasks, decoding, part)
    write_jsonl(out / "answers.jsonl", answers)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    write_manifest(out, planned, outputs=["answers.jsonl"], facts=facts, circumstances={"device": device})
    part.unlink()
    print(f"{len(answers)} answers in {out / 'answers.jsonl'}")


if __name__ == "__main__":
    run_command(main)
