"""The benchmarks' questions, from local files or from the Hub, and lm-eval's configuration of each.

Local files, plain or gzipped, in the layouts of their sources:

    gsm8k/test.jsonl, gsm8k/train.jsonl   {question, answer: "... #### 5"}; train only for shots
    math/test.jsonl                       {problem, solution, type or subject}
    gsm_plus/test.jsonl                   {question, answer, perturbation_type}
    svamp/test.json                       [{ID, Body, Question, Answer}]
    asdiv/test.json                       {Instances: [{Input, Output Answer, split}]}, of which split = test
    theoremqa/test.json                   [{id, Question, Answer, Answer_type}]
    bbh/NAME.json                         {examples: [{input, target}]}, for each of the 27 tasks
    arithmetic/test.jsonl                 {id, question, answer}, of the miniature (eval.tasks.miniature writes it)
"""

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.tasks._yaml_loader import load_yaml  # private: lm-eval is pinned for it
from lm_eval.tasks.minerva_math import utils as minerva

from data_prep.files import InputError

HERE = Path(__file__).resolve().parent
PACKAGE = Path(lm_eval.__file__).parent / "tasks"
TASKS = ("gsm8k", "math", "gsm_plus", "svamp", "asdiv", "theoremqa", "bbh", "arithmetic")
FILES = {  # in the data folder
    "gsm8k": "gsm8k/test.jsonl", "math": "math/test.jsonl", "gsm_plus": "gsm_plus/test.jsonl",
    "svamp": "svamp/test.json", "asdiv": "asdiv/test.json", "theoremqa": "theoremqa/test.json",
    "arithmetic": "arithmetic/test.jsonl",
}  # fmt: skip
BBH = tuple(sorted(path.stem for path in (PACKAGE / "bbh" / "cot_fewshot").glob("*.yaml") if path.stem[0] != "_"))
Record = dict[str, Any]
logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every override of its own defaults


def configs(task: str, data: str, shots: int | None = None, max_new_tokens: int | None = None) -> list[Record]:
    """lm-eval configurations of a benchmark: one, or for BBH one for each of its tasks that has data.

    data: a folder in the layout above, or "hub". shots, max_new_tokens: in place of those of the YAML.
    """
    if data == "hub" and task == "arithmetic":
        raise InputError("arithmetic is the miniature's and not on the Hub; give --data DIR")
    groups = [name for name in BBH if data == "hub" or _file(data, f"bbh/{name}.json")] if task == "bbh" else [None]
    if not groups:
        raise InputError(f"{data}/bbh: none of the 27 tasks' files is there, such as {BBH[0]}.json")
    found = []
    for group in groups:
        config = load_yaml(HERE / f"{task}.yaml")
        package = config.pop("package", None)
        if package:
            config = {**load_yaml(PACKAGE / package.format(group=group)), **config}
        label, hub = config.pop("label"), config.pop("hub")
        config["task"] = config["task"].format(group=group)
        if shots is not None:
            config["num_fewshot"] = shots
        if max_new_tokens is not None:
            config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": max_new_tokens}
        if not config["num_fewshot"] or "samples" in config.get("fewshot_config", {}):
            for key in ("training_split", "fewshot_split"):
                config.pop(key, None)
        for key in ("dataset_path", "dataset_name", "tag"):
            config.pop(key, None)
        config["custom_dataset"] = dataset
        config["dataset_kwargs"] = {
            "task": task, "group": group, "data": data, "hub": hub, "train": "fewshot_split" in config,
        }  # fmt: skip
        config["metadata"] = {"version": 1.0}
        found.append(config | {"label": label})
    return found


def dataset(
    task: str, group: str | None, data: str, hub: Record, train: bool, **metadata: Any
) -> dict[str, datasets.Dataset]:
    """The documents of a task by split. Called by lm-eval with a configuration's `dataset_kwargs`."""
    splits = {"test": list(_documents(task, group, data, hub, "test"))}
    if train:
        splits["train"] = list(_documents(task, group, data, hub, "train"))
    for name, documents in splits.items():
        if not documents:
            raise InputError(f"{data}: no {name} documents for {task}; look at its file")
    return {name: datasets.Dataset.from_list(documents) for name, documents in splits.items()}


def files(task: str, data: str, train: bool) -> dict[str, Path]:
    """The local files that a benchmark is read from, by name; InputError where one is missing."""
    if task == "bbh":
        found = {f"bbh/{name}": _file(data, f"bbh/{name}.json") for name in BBH}
        return {name: path for name, path in found.items() if path}
    names = [FILES[task], *(["gsm8k/train.jsonl"] if train else [])]
    paths = {name: _file(data, name) for name in names}
    for name, path in paths.items():
        if path is None:
            raise InputError(f"{data}/{name}: no such file, nor with .gz; python -m eval.reasoning --help names all")
    return {name: path for name, path in paths.items() if path}


def _file(data: str, name: str) -> Path | None:
    candidates = (Path(data, name), Path(data, f"{name}.gz"))
    return next((path for path in candidates if path.is_file()), None)


def _documents(task: str, group: str | None, data: str, hub: Record, split: str) -> Iterator[Record]:
    """Documents: each with id and group, and the fields that its task's prompt and scoring read."""
    for number, record in enumerate(_records(task, group, data, hub, split)):
        try:
            yield _document(task, group, record, number)
        except (KeyError, IndexError, TypeError, AssertionError) as error:
            raise InputError(
                f"{task}, {split} record {number}: not in the layout of its source ({type(error).__name__} {error})"
            ) from None


def _records(task: str, group: str | None, data: str, hub: Record, split: str) -> Iterator[Record]:
    if data == "hub":
        try:
            for name in [group] if group else hub["names"]:
                wanted = hub["train"] if split == "train" else hub["split"]
                for record in datasets.load_dataset(hub["path"], name, split=wanted):
                    yield {"type": name, **record}
        except (OSError, ValueError) as error:
            raise InputError(f"{hub['path']}: cannot be loaded ({' '.join(str(error).split())[:200]})") from None
        return
    name = f"bbh/{group}.json" if task == "bbh" else FILES[task] if split == "test" else "gsm8k/train.jsonl"
    path = _file(data, name)
    if path is None:
        raise InputError(f"{data}/{name}: no such file, nor with .gz")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = raw.decode("utf-8")
        lines = [json.loads(line) for line in text.split("\n") if line.strip()] if ".jsonl" in path.name else None
        content = lines if lines is not None else json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if task == "asdiv":
        content = [record for record in content["Instances"] if record["split"] == "test"]
    yield from content["examples"] if task == "bbh" else content


def _document(task: str, group: str | None, record: Record, number: int) -> Record:
    name = f"{task}-{number:05}"
    if task == "bbh":
        return {"id": f"{group}-{number:03}", "group": group, "input": record["input"], "target": record["target"]}
    if task in ("gsm8k", "arithmetic"):
        return {"id": str(record.get("id", name)), "group": "", "question": record["question"],
                "answer": record["answer"]}  # fmt: skip
    if task == "math":
        answer = minerva.remove_boxed(minerva.last_boxed_only_string(record["solution"]))
        return {
            "id": name, "group": record.get("subject") or record.get("type") or "", "question": record["problem"],
            "solution": record["solution"], "answer": minerva.normalize_final_answer(answer), "gold": answer,
        }  # fmt: skip
    if task == "gsm_plus":
        return {"id": name, "group": record["perturbation_type"], "question": record["question"],
                "gold": str(record["answer"])}  # fmt: skip
    if task == "svamp":
        question = f"{record['Body'].rstrip(' .')}. {record['Question']}"
        return {"id": str(record["ID"]), "group": "", "question": question, "gold": str(record["Answer"])}
    if task == "asdiv":
        if "Input" in record:
            question, gold = record["Input"], record["Output Answer"][0]
        else:  # the Hub's copy
            question, gold = f"{record['body']} {record['question']}", record["answer"].split(" (")[0]
        return {"id": name, "group": "", "question": question, "gold": gold}
    answer = record["Answer"]
    if isinstance(answer, str) and record["Answer_type"] != "option":  # the Hub's copy has text: 5, [1, 2], True
        answer = json.loads(answer.lower())
    return {
        "id": str(record.get("id", name)), "group": record["Answer_type"], "question": record["Question"],
        "gold": json.dumps(answer), "kind": record["Answer_type"],
    }  # fmt: skip
