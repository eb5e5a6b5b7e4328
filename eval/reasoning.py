"""Reasoning benchmarks through lm-eval: a policy's greedy answers, what was extracted from them, and scores.

    python -m eval.reasoning --policy RUN/policy --tasks gsm8k,math --data DIR --out DIR
    python -m eval.reasoning score --task gsm8k --generations FILE --data DIR --out DIR

--data is a folder of local files in the layout that eval/tasks/docs.py describes, or "hub". The second form scores
given responses, lines of {id, response}, by the same code. Written to --out:

    answers/answers.jsonl   {task, id, response}; killed and run again, it continues after the last whole batch
    samples.jsonl           {benchmark, group, id, response, extracted, verdicts}
    scores.jsonl            eval.records.Score: the share of right answers with its exact binomial interval, for each
                            benchmark and metric, and for its groups (BENCHMARK/GROUP), such as BBH's 27 tasks
    table.md                the same to be read, each benchmark labelled `paper` (a column of Table 3) or `extension`

The policy's own chat template is applied and no BOS is added to it, as in training. Shots, where a task has any, are
fixed (the first of its train split, or those of lm-eval's task) and each is a turn of the chat.
"""

import argparse
import dataclasses
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from data_prep.files import (
    InputError,
    read_json,
    read_jsonl,
    run_command,
    sha256_text,
    to_json,
    write_json,
    write_jsonl,
    write_text,
)
from data_prep.manifest import plan, read_manifest, up_to_date, write_manifest
from eval.intervals import binomial_interval
from eval.records import Score
from eval.tasks import docs, scoring

LIBRARIES = ("lm_eval", "math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime")
Key = tuple[str, str]  # lm-eval task, document id
Sample = dict[str, Any]


class Recorded(LM):
    """An lm-eval model that answers from a record, and asks `model` (lm-eval's HFLM) for what is not there yet.

    Batches depend on the requests alone, and each is on disk before the next begins, so that an interrupted run
    continues and ends with the same answers.
    """

    def __init__(self, answers: dict[Key, str], model: Any = None, part: Path | None = None, batch: int = 1):
        """answers: the record. part: the file that whole batches are added to."""
        super().__init__()
        self.answers, self.model, self.part, self.batch = answers, model, part, batch
        self.first_requests: dict[str, dict[str, Any]] = {}
        if model is not None:
            text = model.tokenizer.apply_chat_template(
                [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
            )
            self.bos = self._count_bos(model.tokenizer(text, add_special_tokens=False).input_ids)

    def _count_bos(self, ids: list[int]) -> int:
        bos = self.model.tokenizer.bos_token_id
        return 0 if bos is None else ids.count(bos)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The responses, in the order of the requests."""
        if self.model is not None:
            self._answer(requests)
        missing = [key for key in map(_key, requests) if key not in self.answers]
        if missing:
            raise InputError(f"{len(missing)} of {len(requests)} answers are missing, the first for {missing[0]}")
        return [self.answers[_key(request)] for request in requests]

    def _answer(self, requests: list[Instance]) -> None:
        lengths = [self._length(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (to_json(requests[i].args[1]), -lengths[i], i))
        batches = [order[start : start + self.batch] for start in range(0, len(order), self.batch)]
        for items in tqdm(batches, desc="generate", unit="batch"):
            wanted = [requests[i] for i in items]
            keys = [_key(request) for request in wanted]
            if all(key in self.answers for key in keys):
                continue
            found = dict(zip(keys, self.model.generate_until(wanted, disable_tqdm=True), strict=True))
            if self.part:
                with open(self.part, "a", encoding="utf-8") as file:
                    file.write("".join(_line(key, response) for key, response in found.items()))
            self.answers |= found

    def _length(self, request: Instance) -> int:
        """Tokens of a prompt. InputError if it does not fit (lm-eval would cut it on the left) or has another number
        of BOS than a prompt in training."""
        context, options = request.args
        (ids,) = self.model.tok_batch_encode([context])[0].tolist()
        bos = self._count_bos(ids)
        if bos != self.bos:
            raise InputError(f"{_key(request)}: {bos} BOS tokens in the prompt, {self.bos} in training")
        first = {"id": request.doc["id"], "bos": bos, "tokens": len(ids), "ids": ids}
        self.first_requests.setdefault(request.task_name, first)
        room = self.model.max_length - options["max_gen_toks"]
        if len(ids) > room:
            raise InputError(
                f"{_key(request)}: a prompt of {len(ids)} tokens leaves no room for {options['max_gen_toks']} in the "
                f"model's {self.model.max_length}; give fewer --max-new-tokens"
            )
        return len(ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt's text, by the policy's own template."""
        return self.model.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template itself."""
        return self.model.chat_template(chat_template) if self.model else None

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's request cache, which is not used."""
        return self.model.tokenizer_name if self.model else ""

    def loglikelihood(self, requests: list[Instance]) -> Any:
        """No benchmark here asks for it."""
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def _key(request: Instance) -> Key:
    return request.task_name, request.doc["id"]


def _line(key: Key, response: str) -> str:
    return to_json({"task": key[0], "id": key[1], "response": response}) + "\n"


def evaluate(lm: Recorded, configs: list[dict[str, Any]], limit: int | None = None) -> list[Sample]:
    """Run benchmarks on a model or a record: their samples, in the order of documents. Main thread only."""
    labels = {config["task"]: config["label"] for config in configs}
    found = simple_evaluate(
        model=lm, tasks=[{key: value for key, value in config.items() if key != "label"} for config in configs],
        task_manager=TaskManager(include_defaults=False), limit=limit, log_samples=True, bootstrap_iters=0,
        apply_chat_template=lm.model is not None, fewshot_as_multiturn=lm.model is not None,
        random_seed=0, numpy_random_seed=0, torch_random_seed=0, fewshot_random_seed=0,
    )  # fmt: skip
    samples: dict[Key, Sample] = {}
    for task in labels:
        benchmark = "bbh" if task.startswith("bbh_") else task
        for item in found["samples"][task]:
            response = item["resps"][0][0]
            sample = samples.setdefault((task, item["doc"]["id"]), {
                "benchmark": benchmark, "group": item["doc"]["group"], "id": item["doc"]["id"], "task": task,
                "doc_hash": item["doc_hash"], "response": response, "extracted": {}, "verdicts": {},
            })  # fmt: skip
            if item["filter"] == "none":
                sample["extracted"] = scoring.extracted(benchmark, response)
                sample["verdicts"] = {name: int(item[name]) for name in sorted(item["metrics"])}
            else:
                sample["extracted"][item["filter"]] = item["filtered_resps"][0]
                sample["verdicts"][item["filter"]] = int(item["exact_match"])
        for name, value in found["results"][task].items():
            _check_mean(task, name, value, samples)
    return list(samples.values())


def _check_mean(task: str, name: str, value: Any, samples: dict[Key, Sample]) -> None:
    """Our mean of the verdicts must be the one that lm-eval computed."""
    metric, comma, kind = name.partition(",")
    if not comma or metric.endswith("_stderr"):
        return
    verdicts = [s["verdicts"][metric if kind == "none" else kind] for (of, _), s in samples.items() if of == task]
    if abs(sum(verdicts) / len(verdicts) - float(value)) > 1e-9:
        raise RuntimeError(f"{task} {name}: lm-eval says {value}, its samples say {sum(verdicts) / len(verdicts)}")


def measure(samples: list[Sample], scale: str, seed: int, policy: str, manifest: str) -> list[Score]:
    """The scores of samples, for each benchmark and metric, then for each group."""
    right: dict[tuple[str, str], list[int]] = {}
    for sample in samples:
        names = [sample["benchmark"], f"{sample['benchmark']}/{sample['group']}" if sample["group"] else None]
        for name in filter(None, names):
            for metric, verdict in sample["verdicts"].items():
                right.setdefault((name, metric), []).append(verdict)
    scores = []
    for (benchmark, metric), verdicts in sorted(right.items(), key=lambda item: ("/" in item[0][0], item[0])):
        low, high = binomial_interval(sum(verdicts), len(verdicts))
        scores.append(Score(
            scale=scale, seed=seed, policy=policy, decoding="greedy", benchmark=benchmark, metric=metric,
            judge=f"lm_eval {metadata.version('lm_eval')}", n=len(verdicts), value=sum(verdicts) / len(verdicts),
            low=low, high=high, manifest=manifest,
        ))  # fmt: skip
    return scores


def table(scores: list[Score], labels: dict[str, str]) -> str:
    """table.md: per cent, with labels."""
    lines = ["| benchmark | label | metric | n | % right | 95 % (exact binomial) |", "|---|---|---|---|---|---|"]
    for score in scores:
        label = labels[score.benchmark.partition("/")[0]]
        values = f"{100 * score.value:.2f} | {100 * score.low:.2f} to {100 * score.high:.2f}"
        lines.append(f"| {score.benchmark} | {label} | {score.metric} | {score.n} | {values} |")
    return "\n".join(lines) + "\n"


def generate(arguments: argparse.Namespace, configs: list[dict[str, Any]], planned: dict[str, Any]) -> list[Sample]:
    """Answer all questions with the policy, and write answers/."""
    import torch
    from lm_eval.models.huggingface import HFLM  # slow to import, and scoring does without

    from train.engine.models import Checkpoint
    from train.engine.tokens import Encoder

    folder = arguments.out / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "answers.part.jsonl"
    if not (folder / "plan.json").exists() or read_json(folder / "plan.json") != planned:
        part.unlink(missing_ok=True)  # another policy's, or of other tasks
        write_json(folder / "plan.json", planned)
    model, tokenizer = Checkpoint(arguments.policy, arguments.policy_revision).load(
        dtype=getattr(torch, arguments.dtype), device_map="auto" if torch.cuda.is_available() else None
    )
    Encoder(tokenizer, 1, 1)  # refuses a tokenizer without a chat template
    # add_bos_token: the template alone decides about BOS, as in training.
    lm = Recorded(
        _whole_lines(part),
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch, add_bos_token=False),
        part, arguments.batch,
    )  # fmt: skip
    samples = evaluate(lm, configs, arguments.limit)
    write_jsonl(folder / "answers.jsonl", ({key: s[key] for key in ("task", "id", "response")} for s in samples))
    facts = {
        "answers": len(samples),
        "first_requests": lm.first_requests,
        "chat_template": sha256_text(str(tokenizer.chat_template)),
    }
    write_manifest(folder, planned, outputs=["answers.jsonl"], facts=facts)
    part.unlink(missing_ok=True)
    return samples


def _whole_lines(part: Path) -> dict[Key, str]:
    """The answers of an interrupted run; a line that was being written is cut off the file."""
    answers: dict[Key, str] = {}
    whole = 0
    if part.exists():
        for line in part.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            answers[record["task"], record["id"]] = record["response"]
            whole += len(line)
        os.truncate(part, whole)
    return answers


def write_scores(
    arguments: argparse.Namespace, configs: list[dict[str, Any]], samples: list[Sample], planned: dict[str, Any],
    policy: str, answers: str,
) -> None:  # fmt: skip
    """Write samples.jsonl, scores.jsonl, table.md and manifest.json, and print the benchmarks' lines."""
    labels = {sample["benchmark"]: config["label"] for config in configs for sample in samples
              if sample["task"] == config["task"]}  # fmt: skip
    scores = measure(samples, arguments.scale, arguments.seed, policy, answers)
    write_jsonl(arguments.out / "samples.jsonl", samples)
    write_jsonl(arguments.out / "scores.jsonl", map(dataclasses.asdict, scores))
    write_text(arguments.out / "table.md", table(scores, labels))
    documents = sha256_text(to_json([[sample["task"], sample["doc_hash"]] for sample in samples]))
    facts = {"items": len(samples), "labels": labels, "documents": documents}  # the Hub's can change
    write_manifest(arguments.out, planned, outputs=["samples.jsonl", "scores.jsonl", "table.md"], facts=facts)
    print(table([score for score in scores if "/" not in score.benchmark], labels), end="")


def _planned(arguments: argparse.Namespace, tasks: list[str], settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The plan of a command. Inputs are the tasks' YAML and data files, and `more`."""
    inputs: dict[str, Any] = {f"{task}.yaml": docs.HERE / f"{task}.yaml" for task in [*tasks, "_boxed"]}
    if arguments.data != "hub":
        for task in tasks:
            inputs |= docs.files(task, arguments.data, train=task == "gsm8k" and arguments.shots != 0)
    libraries = {name: metadata.version(name) for name in LIBRARIES}
    return plan("eval.reasoning", {"tasks": tasks, "data": arguments.data == "hub", "libraries": libraries, **settings},
                inputs | more)  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Answer and score."""
    from train.engine.models import Checkpoint

    checkpoint = Checkpoint(arguments.policy, arguments.policy_revision)
    names = ("batch", "dtype", "limit", "shots", "max_new_tokens")
    settings = {"policy": checkpoint.digest, **{name: getattr(arguments, name) for name in names}}
    planned = _planned(arguments, arguments.tasks, settings)
    folder = arguments.out / "answers"
    configs = [
        config for task in arguments.tasks
        for config in docs.configs(task, arguments.data, arguments.shots, arguments.max_new_tokens)
    ]  # fmt: skip
    policy = arguments.name or arguments.policy
    samples = None
    if not up_to_date(folder, planned):
        samples = generate(arguments, configs, planned)
    labels = {"scale": arguments.scale, "seed": arguments.seed, "name": policy}
    scored = _planned(arguments, arguments.tasks, {**settings, **labels}, answers=folder / "answers.jsonl")
    if samples is None and up_to_date(arguments.out, scored):
        print(f"{arguments.out}: done already, nothing to do")
        return
    if samples is None:
        record = {(r["task"], r["id"]): r["response"] for _, r in read_jsonl(folder / "answers.jsonl")}
        samples = evaluate(Recorded(record), configs, arguments.limit)
    write_scores(arguments, configs, samples, scored, policy, read_manifest(folder)["hash"])


def score(arguments: argparse.Namespace) -> None:
    """Score given responses."""
    tasks = [arguments.task]
    labels = {"scale": arguments.scale, "seed": arguments.seed, "name": arguments.name}
    planned = _planned(arguments, tasks, labels, generations=arguments.generations)
    if up_to_date(arguments.out, planned):
        print(f"{arguments.out}: done already, nothing to do")
        return
    configs = docs.configs(arguments.task, arguments.data, 0)
    given = {}
    for number, record in read_jsonl(arguments.generations):
        if not isinstance(record.get("id"), str) or not isinstance(record.get("response"), str):
            raise InputError(f"{arguments.generations}:{number}: expected id and response, both text")
        given[record["id"]] = record["response"]
    samples = score_responses(configs, given)
    write_scores(arguments, configs, samples, planned, arguments.name, planned["inputs"]["generations"])


def score_responses(configs: list[dict[str, Any]], given: dict[str, str]) -> list[Sample]:
    """The samples of responses by document id. InputError for a document without one."""
    record = {(config["task"], name): text for config in configs for name, text in given.items()}
    return evaluate(Recorded(record), configs)


def _tasks(text: str) -> list[str]:
    unknown = set(text.split(",")) - set(docs.TASKS)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown {', '.join(sorted(unknown))}; known are {','.join(docs.TASKS)}")
    return list(dict.fromkeys(text.split(",")))


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def main() -> None:
    """Both forms of the command."""
    scoring_only = sys.argv[1:2] == ["score"]
    parser = argparse.ArgumentParser(
        prog="python -m eval.reasoning" + (" score" if scoring_only else ""),
        description=docs.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", required=True, help='folder of local files (see above), or "hub"')
    parser.add_argument("--out", required=True, type=Path, help="directory")
    parser.add_argument("--scale", default="tiny", help="for the records")
    parser.add_argument("--seed", type=int, default=0, help="for the records")
    if scoring_only:
        parser.add_argument("--task", required=True, choices=docs.TASKS)
        parser.add_argument("--generations", required=True, type=Path, help="lines of {id, response}")
        parser.add_argument("--name", default="given", help="of the policy, for the records")
        parser.set_defaults(shots=0)
        score(parser.parse_args(sys.argv[2:]))
        return
    parser.add_argument("--policy", required=True, help="directory of the policy, or its Hub id")
    parser.add_argument("--policy-revision", help="commit, for a model from the Hub")
    parser.add_argument("--name", help='of the policy, for the records: "mu" or METHOD-REGIME')
    parser.add_argument("--tasks", required=True, type=_tasks, help=",".join(docs.TASKS))
    parser.add_argument("--limit", type=_at_least_one, help="only the first N questions of each task")
    parser.add_argument("--batch", type=_at_least_one, default=16, help="answers at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the policy")
    parser.add_argument("--shots", type=int, choices=range(6), help="in place of the tasks' own number")
    parser.add_argument("--max-new-tokens", type=_at_least_one, help="in place of the tasks' own limit")
    run(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
