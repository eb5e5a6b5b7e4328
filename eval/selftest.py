"""Known answers, before anything is spent: does every scorer give 100 for right answers and 0 for empty ones?

    python -m eval.selftest

Prints a table and exits with 1 if a check fails. The questions are made up here; none is a benchmark's.
"""

import importlib
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_prep.files import run_command, write_json, write_jsonl
from eval.checks import Check

# Where others' scorers check themselves: each module has selftest() -> list[Check].
ELSEWHERE = ("eval.code", "eval.mt_bench")
BOXED = "Step by step we get \\boxed{%s}."

# task: (its file's records, right answers, wrong answers)
QUESTIONS: dict[str, tuple[list[dict[str, Any]], list[str], list[str]]] = {
    "gsm8k": (
        [
            {"question": "Lea owns 3 kites and buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
            {"question": "A van of $1,200 costs 50 more with tax. How much?", "answer": "That is 1250.\n#### 1,250"},
        ],
        ["3 + 4 = 7. #### 7", "In all $1,250.\n#### 1,250"],
        ["#### 8", "#### 125"],
    ),
    "math": (
        [
            {"problem": "Halve 3.", "solution": "It is $\\boxed{\\frac{3}{2}}$.", "type": "Prealgebra"},
            {"problem": "Factor $x^2-1$.", "solution": "We get $\\boxed{(x-1)(x+1)}$.", "type": "Algebra"},
        ],
        # in both forms, so that each of the three extractions finds it
        [
            "\\boxed{\\frac32}\nFinal Answer: The final answer is $\\frac{3}{2}$. I hope it is correct.",
            "\\boxed{(x+1)(x-1)}\nFinal Answer: The final answer is $(x+1)(x-1)$. I hope it is correct.",
        ],
        [
            "\\boxed{\\frac23}\nFinal Answer: The final answer is $\\frac{2}{3}$. I hope it is correct.",
            "\\boxed{x^2}\nFinal Answer: The final answer is $x^2$. I hope it is correct.",
        ],
    ),
    "gsm_plus": (
        [
            {"question": "Ivo jogs 1.5 km twice. How far?", "answer": "3", "perturbation_type": "numbers"},
            {"question": "Ivo jogs twice. How far?", "answer": "None", "perturbation_type": "critical thinking"},
        ],
        [BOXED % "3.0", BOXED % "\\text{None}"],
        [BOXED % "3.5", BOXED % "0"],
    ),
    "svamp": (
        [
            {"ID": "s-1", "Body": "Uma has 9 reeds and cuts 4", "Question": "How many are left?", "Answer": 5.0},
            {"ID": "s-2", "Body": "Two boats carry 1000 logs each.", "Question": "How many logs?", "Answer": 2000.0},
        ],
        [BOXED % "5", BOXED % "2{,}000"],
        [BOXED % "13", BOXED % "2"],
    ),
    "asdiv": (
        [
            {"Input": "6 jars and 2 lids: their ratio?", "Output Answer": ["3:1"], "split": "test"},
            {"Input": "Half of 2.5?", "Output Answer": ["1.25"], "split": "test"},
            {"Input": "Not asked: 1 + 1?", "Output Answer": ["2"], "split": "train"},
        ],
        [BOXED % "3:1", BOXED % "1.25"],
        [BOXED % "1:3", BOXED % "12.5"],
    ),
    "theoremqa": (
        [
            {"id": "t-1", "Question": "A tenth, squared?", "Answer": 0.01, "Answer_type": "float"},
            {"id": "t-2", "Question": "Is 7 prime?", "Answer": True, "Answer_type": "bool"},
            {"id": "t-3", "Question": "The roots of x^2 = 4?", "Answer": [2, -2], "Answer_type": "list of integer"},
            {"id": "t-4", "Question": "(a) no (b) yes?", "Answer": "(b)", "Answer_type": "option"},
            {"id": "t-5", "Question": "How many days has a week?", "Answer": 7, "Answer_type": "integer"},
        ],
        [BOXED % r"\frac{1}{100}", BOXED % r"\text{True}", BOXED % "[2, -2]", BOXED % "(b)", BOXED % "7"],
        [BOXED % "0.02", BOXED % "False", BOXED % "[2, 2]", BOXED % "(a)", BOXED % "8"],
    ),
    "bbh": (
        [{"input": "not ( False ) is", "target": "True"}, {"input": "False or False is", "target": "False"}],
        ["So the answer is True.", "So the answer is False."],
        ["So the answer is False.", "So the answer is True."],
    ),
}  # fmt: skip


def reasoning(folder: Path) -> list[Check]:
    """The checks of every reasoning benchmark and metric. folder: for the made-up data."""
    from eval.reasoning import score_responses
    from eval.tasks import docs

    configs, kinds = [], {"right answers": {}, "wrong answers": {}, "empty answers": {}}
    for task, (records, right, wrong) in QUESTIONS.items():
        if task == "bbh":
            write_json(folder / "bbh" / "boolean_expressions.json", {"examples": records})
        elif task == "asdiv":
            write_json(folder / docs.FILES[task], {"Instances": records})
        elif docs.FILES[task].endswith(".jsonl"):
            write_jsonl(folder / docs.FILES[task], records)
        else:
            write_json(folder / docs.FILES[task], records)
        (config,) = docs.configs(task, str(folder), 0)
        configs.append(config)
        names = [item["id"] for item in config["custom_dataset"](**config["dataset_kwargs"])["test"]]
        for given, responses in zip(kinds.values(), (right, wrong, [""] * len(right)), strict=True):
            given |= zip(names, responses, strict=True)
    found = []
    for kind, given in kinds.items():
        verdicts: dict[tuple[str, str], list[int]] = {}
        for sample in score_responses(configs, given):
            for metric, verdict in sample["verdicts"].items():
                verdicts.setdefault((sample["benchmark"], metric), []).append(verdict)
        for (task, metric), values in verdicts.items():
            expected = 100 if kind == "right answers" else 0
            found.append(Check(f"{task}, {metric}: {kind}", expected, 100 * sum(values) / len(values)))
    return found


def everything() -> tuple[list[Check], list[str]]:
    """All checks there are, and the modules that have none here."""
    with tempfile.TemporaryDirectory() as folder:
        found, absent = reasoning(Path(folder)), []
    for name in ELSEWHERE:
        if importlib.util.find_spec(name) is None or not hasattr(importlib.import_module(name), "selftest"):
            absent.append(name)
        else:
            found += importlib.import_module(name).selftest()
    return found, absent


def main() -> None:
    """Print the table."""
    found, absent = everything()
    print(f"{'check':<52} {'expected':>8} {'found':>8}")
    for check in found:
        verdict = "" if check.passed else "  FAILED"
        print(f"{check.name:<52} {check.expected:>8g} {check.found:>8g}{verdict}")
    failed = sum(not check.passed for check in found)
    for name in absent:
        print(f"{name:<52} not checked: it has no self-test here")
    print(f"{len(found)} checks, {failed} failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
