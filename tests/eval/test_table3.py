"""scripts/table3.sh: its plan, its refusals, its table, and the miniature from policies to a table."""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from eval import generate
from eval.records import METHODS, REGIMES, Score, read_scores

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def table3(monkeypatch):
    """The script as a module."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "scripts")  # for the processes that it starts
    spec = importlib.util.spec_from_file_location("table3", ROOT / "scripts" / "table3.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("scale", ["mistral-7b", "mixtral-8x7b"])
def test_plan_of_the_papers_scale(run, table3, scale) -> None:
    """--dry-run prints every command, the questions and what they take, and writes nothing."""
    done = run(table3.main, "--scale", scale, "--dry-run")
    assert done.code == 0, done.err
    commands = re.findall(r"python -m (eval\.\w+)", done.out)
    assert commands.count("eval.reasoning") == 3  # SFT, DPO and NCA
    assert commands.count("eval.generate") == 6  # HumanEval and LeetCode of each
    assert commands.count("eval.code") == 8  # the prompts of both, and the scores of each
    assert re.findall(r"\[(\d+)/18\]", done.out) == [str(number) for number in range(1, 19)]
    assert "| bbh | 6,511 |" in done.out
    assert "assumed, not measured" in done.out
    assert not (ROOT / "runs" / scale / "table3").exists()


def test_every_command_of_the_plan_parses(run, table3, monkeypatch) -> None:
    """The commands of eval.reasoning have the options that it takes."""
    from eval import reasoning

    seen = []
    monkeypatch.setattr(reasoning, "run", seen.append)
    for stage in table3.paper_stages("mistral-7b", {"nca": ("some/model", "c0ffee")}, "some data", Path("o u t")):
        if stage.module == "eval.reasoning":
            assert run(reasoning.main, *stage.arguments).code == 0
    (arguments,) = seen
    assert (arguments.policy, arguments.policy_revision, arguments.data) == ("some/model", "c0ffee", "some data")
    assert len(arguments.tasks) == 7


def test_missing_policies_are_named(run, table3, tmp_path) -> None:
    """Where policies are missing, one line says which command makes them."""
    refusal = run(table3.main, "--scale", "tiny", "--runs", tmp_path / "no runs").refusal
    assert "bash scripts/reproduce.sh --seeds 1" in refusal
    assert "--policy NAME=DIR" in run(table3.main, "--scale", "mistral-7b").refusal


def score(policy: str, value: float, seed: int, metric: str = "strict-match") -> Score:
    return Score("tiny", seed, policy, "greedy", "arithmetic", metric, "j", 2, value, value, value, "m")


def test_table(table3) -> None:
    """Seeds are pooled; the difference to DPO of the same regime is over the same questions, and DPO has none."""
    scores = [score(policy, value, seed) for policy, value in (("dpo-hard", 0.5), ("nca-hard", 1.0)) for seed in (0, 1)]
    scores.append(dataclasses.replace(scores[0], policy="mu"))
    samples = {
        "dpo-hard": {"0/a": 1, "0/b": 0, "1/a": 0, "1/b": 1},
        "nca-hard": dict.fromkeys(("0/a", "0/b", "1/a", "1/b"), 1),
    }
    samples["mu"] = samples["dpo-hard"]
    rows = {line.split(" | ")[0]: line for line in table3.document("tiny", scores, samples).split("\n")}
    assert rows["| nca-hard"].startswith("| nca-hard | 100.0 [100.0, 100.0] | - | - | +50.0 [")
    assert rows["| nca-hard"].endswith("p = 0.500 |")  # two questions differ: 2 of 4 sign flips are as extreme
    assert rows["| dpo-hard"] == "| dpo-hard | 50.0 [50.0, 50.0] | - | - | - |"


def test_miniature_end_to_end(run, table3, policies, tmp_path, monkeypatch) -> None:
    """From policies to a table in a folder with a space; a second run does nothing, and a changed policy is measured
    anew. (Policies with random weights, two of the paper's methods.)"""
    pytest.importorskip("eval.code")
    root = tmp_path / "a set" / "seed-0"
    from data_prep.miniature.world import build

    monkeypatch.setattr(table3, "METHODS", ("dpo", "nca"))
    monkeypatch.setattr(table3, "REGIMES", ("hard",))
    assert set(METHODS) > {"dpo", "nca"}
    assert "hard" in REGIMES
    build(root / "world", n_demonstrations=4, n_train=3, n_heldout=3, n_test=6)
    places = {"mu": root / "sft" / "policy", "dpo-hard": root / "runs" / "dpo-hard" / "policy",
              "nca-hard": root / "runs" / "nca-hard" / "policy"}  # fmt: skip
    for number, (name, place) in enumerate(places.items()):
        shutil.copytree(policies[number % 2], place)
        words = ("--policy", place, "--prompts", root / "world" / "prompts-test.jsonl", "--greedy")
        assert run(generate.main, *words, "--max-new-tokens", 8, "--out", root / "answers" / name).code == 0

    def table(*more: Any) -> str:
        done = run(table3.main, "--scale", "tiny", "--runs", root.parent, "--jobs", 1, *more)
        assert done.code == 0, done.err
        return (root.parent / "table3" / "table3.md").read_text()

    first = table()
    assert [line.split(" | ")[0] for line in first.split("\n")[8:-1]] == ["| mu", "| dpo-hard", "| nca-hard"]
    scores = read_scores(root.parent / "table3" / "scores.jsonl")
    assert {s.benchmark for s in scores} == {"arithmetic", "functions", "functions+"}
    assert all(s.n == 2 for s in scores)
    stamp = json.loads((root.parent / "table3" / "seed-0" / "mu" / "reasoning" / "manifest.json").read_text())
    assert table() == first
    again = json.loads((root.parent / "table3" / "seed-0" / "mu" / "reasoning" / "manifest.json").read_text())
    assert again == stamp
