"""eval.truth: known answers get known scores; intervals and averages against other computations."""

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from scipy import stats

from data_prep.miniature import world
from eval import truth

PROMPTS = list(world.prompts(7, "test", 18))
CRITERIA = {
    "all": "correct",
    "arithmetic": "exact_match",
    "functions": "pass@1",
    "instructions": "constraints_met",
}
Answers = Callable[[dict[str, Any], int], str]  # of a prompt and a sample number


def perfect(prompt: dict[str, Any], sample: int) -> str:
    """A demonstration without a slip."""
    family = world.FAMILIES[prompt["source"]]
    return family.demonstrate(prompt["truth"], random.Random(sample), 0.0)


def bad(prompt: dict[str, Any], sample: int) -> str:
    """Nothing in it is asked for."""
    return "def f(: no #### no"


def empty(prompt: dict[str, Any], sample: int) -> str:
    return ""


def write_policy(folder: Path, answers: Answers, samples: int = 2, prompts: list[dict[str, Any]] = PROMPTS) -> str:
    """An answers folder with its manifest, written without the project's code; returns the manifest's hash."""
    folder.mkdir()
    lines = [
        {"id": p["id"], "decoding": decoding, "sample": k, "response": answers(p, k)}
        for p in prompts
        for decoding, count in (("greedy", 1), ("sampled", samples))
        for k in range(count)
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    identity = {"folder": folder.name}
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"hash": digest, "identity": identity}))
    return digest


@pytest.fixture
def judge(run, tmp_path):
    """Run eval.truth on folders of answers: its outcome, and its records by what they measure."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))

    def call(*names: str) -> tuple[Any, dict[tuple[str, ...], dict[str, Any]]]:
        folders = [f"{name}={tmp_path / name}" for name in names]
        words = ("--prompts", tmp_path / "prompts.jsonl", "--answers", *folders, "--seed", 3, "--out", tmp_path / "out")
        done = run(truth.main, *words)
        path = tmp_path / "out" / "scores.jsonl"
        if done.code:
            return done, {}
        records = [json.loads(line) for line in path.read_text().splitlines()]
        keyed = {tuple(r[k] for k in ("policy", "decoding", "benchmark", "metric")): r for r in records}
        assert len(keyed) == len(records)
        return done, keyed

    return call


def test_perfect_against_bad(judge, tmp_path) -> None:
    """Perfect answers have reward 10, are all correct and win always; bad ones have reward near 1 and always lose."""
    policies = {"mu": bad, "dpo-hard": bad, "nca-hard": perfect, "nca-gentle": perfect}
    hashes = {name: write_policy(tmp_path / name, answers) for name, answers in policies.items()}
    _, records = judge(*policies)
    for decoding in ("greedy", "sampled"):
        for benchmark, criterion in CRITERIA.items():
            n = len(PROMPTS) if benchmark == "all" else len(PROMPTS) // 3
            at = lambda policy, metric, where=(decoding, benchmark): records[(policy, *where, metric)]  # noqa: E731
            for policy, metric, value in (
                ("nca-hard", "reward", 10.0), ("nca-hard", criterion, 1.0), ("dpo-hard", criterion, 0.0),
                ("nca-hard", "win_rate_vs_mu", 1.0), ("nca-hard", "win_rate_vs_dpo", 1.0),
                ("nca-gentle", "win_rate_vs_mu", 1.0), ("dpo-hard", "win_rate_vs_mu", 0.5),
            ):  # fmt: skip
                found = at(policy, metric)
                assert (found["value"], found["low"], found["high"], found["n"]) == (value, value, value, n)
            assert at("dpo-hard", "reward")["value"] < 2.5
    # A rival is DPO of the same regime, or nothing; nobody is set against itself.
    assert {key[0] for key in records if key[3] == "win_rate_vs_dpo"} == {"nca-hard"}
    assert not any(key[0] == "mu" and key[3].startswith("win") for key in records)
    assert all(record["manifest"] == hashes[record["policy"]] for record in records.values())
    assert {(r["scale"], r["seed"], r["judge"].split()[0]) for r in records.values()} == {("tiny", 3, "truth")}
    assert len({r["judge"] for r in records.values()}) == 1  # with the version of its code


def test_ties_are_half_a_win(judge, tmp_path) -> None:
    """Against itself under another name every comparison is a tie; a policy that is better on a third of the prompts
    and equal on the others wins 1/3 + 1/2 * 2/3 = 2/3, and its rival 1/3."""
    third = lambda p, k: perfect(p, k) if p["source"] == "functions" else bad(p, k)  # noqa: E731
    for name, answers in {"mu": bad, "dpo-hard": bad, "nca-hard": third, "kto-hard": bad}.items():
        write_policy(tmp_path / name, answers)
    _, records = judge("mu", "dpo-hard", "nca-hard", "kto-hard")
    assert records["kto-hard", "sampled", "all", "win_rate_vs_dpo"]["value"] == 0.5
    assert records["nca-hard", "sampled", "all", "win_rate_vs_dpo"]["value"] == pytest.approx(2 / 3, abs=1e-12)
    assert records["nca-hard", "sampled", "functions", "win_rate_vs_dpo"]["value"] == 1
    assert records["nca-hard", "sampled", "arithmetic", "win_rate_vs_dpo"]["value"] == 0.5


def test_empty_answers(judge, tmp_path) -> None:
    """Empty answers are judged like any others: never correct, rewards from 1 to 10, below any perfect answer."""
    write_policy(tmp_path / "mu", empty)
    write_policy(tmp_path / "nca-hard", perfect)
    _, records = judge("mu", "nca-hard")
    for benchmark, criterion in CRITERIA.items():
        assert records["mu", "sampled", benchmark, criterion]["value"] == 0
        assert 1 <= records["mu", "sampled", benchmark, "reward"]["value"] < 5
        assert records["nca-hard", "sampled", benchmark, "win_rate_vs_mu"]["value"] == 1


def test_samples_are_averaged_within_a_prompt(judge, tmp_path) -> None:
    """pass@1 is the share of correct samples averaged over prompts, with an interval over prompts, not samples."""
    rng = random.Random(0)
    luck = {(p["id"], k): rng.random() < 0.2 + 0.1 * k for p in PROMPTS for k in range(4)}
    mixed = lambda p, k: (perfect if luck[p["id"], k] else bad)(p, k)  # noqa: E731
    write_policy(tmp_path / "mu", mixed, samples=4)
    _, records = judge("mu")
    frame = pandas.DataFrame([
        {"id": p["id"], "source": p["source"], "right": luck[p["id"], k]} for p in PROMPTS for k in range(4)
    ])  # fmt: skip
    means = frame.groupby(["source", "id"]).right.mean()
    for source in ("arithmetic", "functions", "instructions"):
        found = records["mu", "sampled", source, CRITERIA[source]]
        assert found["value"] == pytest.approx(means[source].mean(), abs=1e-12)
        assert found["n"] == len(PROMPTS) // 3
    found = records["mu", "sampled", "all", "correct"]
    expected = stats.bootstrap((means.to_numpy(),), numpy.mean, n_resamples=9999, method="percentile", rng=1)
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert found["low"] == pytest.approx(expected.confidence_interval.low, abs=0.1 * width)
    assert found["high"] == pytest.approx(expected.confidence_interval.high, abs=0.1 * width)
    # Were the 4 samples of a prompt counted as independent, the interval would be another one.
    greedy = records["mu", "greedy", "all", "correct"]
    assert greedy["value"] == pytest.approx(sum(luck[p["id"], 0] for p in PROMPTS) / len(PROMPTS), abs=1e-12)


@pytest.mark.parametrize("draw", ["normal", "bernoulli", "skewed"])
def test_interval_is_that_of_the_mean(draw) -> None:
    """On many prompts the bootstrap interval is mean +- 1.96 standard errors, and scipy's bootstrap agrees."""
    rng = numpy.random.default_rng(1)
    n = 2000
    values = {"normal": rng.normal(6, 2, n), "bernoulli": rng.random(n) < 0.3, "skewed": rng.exponential(1, n)}[draw]
    values = values.astype(float)
    mean, low, high = truth.interval(values)
    error = values.std(ddof=1) / n**0.5
    assert mean == pytest.approx(values.mean(), rel=1e-12)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    other = stats.bootstrap((values,), numpy.mean, n_resamples=4000, method="percentile", rng=2).confidence_interval
    assert (low, high) == pytest.approx((other.low, other.high), abs=0.2 * error)


def test_interval_covers_the_truth() -> None:
    """About 95 of 100 intervals hold the true mean: 300 sets of 60 prompts."""
    rng = numpy.random.default_rng(3)
    hits = 0
    for _ in range(300):
        _, low, high = truth.interval(rng.normal(0, 1, 60))
        hits += low <= 0 <= high
    assert 0.90 <= hits / 300 <= 0.985


def test_one_prompt_and_equal_values() -> None:
    """With no spread between prompts the interval is the value itself."""
    for values in (numpy.array([0.25]), numpy.full(30, 0.1)):
        assert truth.interval(values) == pytest.approx((values[0],) * 3, abs=1e-15)


@pytest.mark.parametrize("damage", ["missing", "unknown", "doubled"])
def test_incomplete_answers_are_refused(damage, judge, tmp_path) -> None:
    """An answer that is missing, is to no prompt, or stands in another's place: one line that names the file."""
    write_policy(tmp_path / "mu", perfect)
    path = tmp_path / "mu" / "answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[4] = {
        "missing": "",
        "unknown": lines[4].replace('"id": "test', '"id": "best'),
        "doubled": lines[0],
    }[damage]
    path.write_text("".join(lines))
    done, _ = judge("mu")
    assert str(path) in done.refusal
    assert not (tmp_path / "out" / "scores.jsonl").exists()


def test_unequal_numbers_of_samples_are_refused(judge, tmp_path) -> None:
    """Win rates need the same samples on both sides: other numbers of them are refused in one line."""
    write_policy(tmp_path / "mu", perfect, samples=2)
    write_policy(tmp_path / "nca-hard", perfect, samples=4)
    done, _ = judge("mu", "nca-hard")
    assert "nca-hard" in done.refusal


def test_prompts_without_truth_are_refused(judge, tmp_path) -> None:
    """Prompts that nobody can judge: one line."""
    write_policy(tmp_path / "mu", perfect)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({key: PROMPTS[0][key] for key in ("id", "prompt", "source")}) + "\n")
    done, _ = judge("mu")
    assert str(path) in done.refusal


def test_manifest_of_other_content_is_refused(judge, tmp_path) -> None:
    """Answers whose manifest was edited give no record."""
    write_policy(tmp_path / "mu", perfect)
    path = tmp_path / "mu" / "manifest.json"
    path.write_text(path.read_text().replace('"mu"', '"nu"'))
    done, _ = judge("mu")
    assert "hash" in done.refusal
