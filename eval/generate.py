"""Answers: a policy's responses to prompts, greedy and sampled, into answers.jsonl.

    python -m eval.generate --policy RUN/policy --prompts FILE --out DIR --greedy --samples 4

Prompts are lines of {id, prompt: chat messages}. Each answer is a line of {id, decoding, sample, response, tokens,
finished}; finished is false where the length limit cut it. An interrupted command continues after the last whole
batch; batches do not depend on where it stopped, so the file ends the same.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.files import InputError, read_json, run_command, to_json, write_json, write_jsonl
from data_prep.manifest import plan, up_to_date, write_manifest
from data_prep.rows import read_prompts
from train.engine.models import Checkpoint
from train.engine.sampling import sample
from train.engine.tokens import Encoder


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


def generate(checkpoint: Checkpoint, prompts: list[dict[str, Any]], decoding: Decoding, part: Path) -> list[dict]:
    """Answer all prompts, in the order of (prompt, decoding, sample). `part` collects whole batches meanwhile."""
    model, tokenizer = checkpoint.load()
    encoder = Encoder(tokenizer, decoding.max_prompt_tokens, decoding.max_new_tokens)
    ids = [encoder.prompt(item["prompt"], item["id"])[1] for item in prompts]
    answers = _whole_batches(part)
    done = {answer["batch"] for answer in answers}
    batches = list(_batches(ids, decoding))
    with open(part, "a", encoding="utf-8") as file:
        for number, (temperature, items) in enumerate(tqdm(batches, desc="generate", unit="batch")):
            if number in done:
                continue
            responses = sample(
                model, tokenizer, [ids[i] for i, _ in items], max_new_tokens=decoding.max_new_tokens,
                temperature=temperature, seed=decoding.seed * 1_000_003 + number,
            )  # fmt: skip
            lines = []
            for (i, k), response in zip(items, responses, strict=True):
                finished = response[-1:] == [tokenizer.eos_token_id]
                text = tokenizer.decode(response, skip_special_tokens=True)
                lines.append({
                    "batch": number, "last": False, "order": i, "id": prompts[i]["id"],
                    "decoding": "sampled" if temperature else "greedy", "sample": k, "response": text,
                    "tokens": len(response), "finished": finished,
                })  # fmt: skip
            lines[-1]["last"] = True
            file.write("".join(to_json(line) + "\n" for line in lines))
            file.flush()
            answers += lines
    answers.sort(key=lambda answer: (answer["order"], answer["decoding"], answer["sample"]))
    kept = ("id", "decoding", "sample", "response", "tokens", "finished")
    return [{key: answer[key] for key in kept} for answer in answers]


def _batches(ids: list[list[int]], decoding: Decoding) -> Iterator[tuple[float, list[tuple[int, int]]]]:
    """(temperature, [(prompt, sample)]), prompts of like length together."""
    by_length = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    wanted = [(0.0, [(i, 0) for i in by_length])] if decoding.greedy else []
    wanted.append((decoding.temperature, [(i, k) for i in by_length for k in range(decoding.samples)]))
    for temperature, items in wanted:
        for start in range(0, len(items), decoding.batch):
            yield temperature, items[start : start + decoding.batch]


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
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch", type=int, default=128, help="answers drawn at once")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    decoding = Decoding(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Decoding)})
    checkpoint = Checkpoint(arguments.policy, arguments.policy_revision)
    out = Path(arguments.out)
    settings = {"policy": checkpoint.digest, "decoding": dataclasses.asdict(decoding)}
    planned = plan("eval.generate", settings, {"prompts": arguments.prompts})
    if up_to_date(out, planned):
        print(f"{out}: done already, nothing to do")
        return
    prompts = read_prompts(arguments.prompts)
    out.mkdir(parents=True, exist_ok=True)
    part = out / "answers.part.jsonl"
    if not (out / "plan.json").exists() or read_json(out / "plan.json") != planned:
        part.unlink(missing_ok=True)  # another policy's or another seed's answers
        write_json(out / "plan.json", planned)
    answers = generate(checkpoint, prompts, decoding, part)
    write_jsonl(out / "answers.jsonl", answers)
    facts = {
        "prompts": len(prompts),
        "answers": len(answers),
        "unfinished": sum(not answer["finished"] for answer in answers),
        "empty": sum(not answer["response"].strip() for answer in answers),
    }
    write_manifest(out, planned, outputs=["answers.jsonl"], facts=facts)
    part.unlink()
    print(f"{len(answers)} answers in {out / 'answers.jsonl'}")


if __name__ == "__main__":
    run_command(main)
