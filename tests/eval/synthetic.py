"""A results folder with made-up numbers, written without the project's code."""

import json
import random
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pandas
from scipy import stats

METHODS = ("sft_best", "kto", "ipo", "dpo", "dpo_x3", "nca_pair", "infonca", "nca")
REGIMES = ("gentle", "hard")
CRITERIA = {
    "all": "correct",
    "arithmetic": "exact_match",
    "functions": "pass@1",
    "instructions": "constraints_met",
}
STEPS = (0, 2, 5)
Number = Callable[..., float]  # of a key


def number(*key: Any) -> float:
    """A number between -2 and 2 for each key."""
    return random.Random("/".join(map(str, key))).uniform(-2, 2)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_results(
    folder: Path, seeds: Sequence[int] = (0, 1, 2), without: Collection[str] = (), number: Number = number
) -> Path:
    """scores.jsonl, trend.jsonl, manifests.jsonl and theory.md of all policies but those `without`."""
    folder.mkdir(parents=True, exist_ok=True)
    policies = [("mu", "", "mu")] + [(m, r, f"{m}-{r}") for r in REGIMES for m in METHODS]
    policies = [found for found in policies if found[2] not in without]
    scores, trend, manifests = [], [], []
    for seed in seeds:
        for method, regime, policy in policies:
            for decoding in ("greedy", "sampled"):
                for benchmark, criterion in CRITERIA.items():
                    rivals = [] if policy == "mu" else ["win_rate_vs_mu", "win_rate_vs_dpo"]
                    for metric in ("reward", criterion, *rivals):
                        value = number("score", policy, decoding, benchmark, metric, seed)
                        scores.append({
                            "scale": "tiny", "seed": seed, "policy": policy, "decoding": decoding,
                            "benchmark": benchmark, "metric": metric, "n": 9, "value": value, "low": value - 0.25,
                            "high": value + 0.5, "judge": "truth", "manifest": "0",
                        })  # fmt: skip
            if policy == "mu":
                continue
            for step in STEPS:
                for split in ("heldout", "train"):
                    at = lambda name, key=(policy, step, split, seed): number("trend", *key, name)  # noqa: E731
                    sides = {
                        side: {"log_ratio": at(side), "r": at(f"{side} r"), "n": 9} for side in ("chosen", "rejected")
                    }
                    trend.append({
                        "seed": seed, "policy": policy, "method": method, "regime": regime, "step": step,
                        "split": split, **sides, "accuracy": at("accuracy"),
                        **({"kl": at("kl")} if split == "heldout" else {}), "manifest": "0",
                    })  # fmt: skip
            work = {"responses_seen": 1000 * seed + len(policy), "tokens_seen": 1_234_567}
            manifests.append({"hash": "0", "seed": seed, "policy": policy, "identity": {"facts": {"work": work}}})
            manifests.append({"hash": "1", "seed": seed, "policy": policy, "identity": {"facts": {}}})
    write_lines(folder / "scores.jsonl", scores)
    write_lines(folder / "trend.jsonl", trend)
    write_lines(folder / "manifests.jsonl", manifests)
    (folder / "theory.md").write_text("theory\n")
    return folder


def by_seed_score(folder: Path, policy: str, decoding: str, benchmark: str, metric: str) -> pandas.Series:
    """A score of each seed, by seed."""
    frame = pandas.read_json(folder / "scores.jsonl", lines=True)
    wanted = {"policy": policy, "decoding": decoding, "benchmark": benchmark, "metric": metric}
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame.set_index("seed").value.sort_index()


def by_seed_end(folder: Path, policy: str, *path: str) -> pandas.Series:
    """A held-out number of the last step of each seed, by seed."""
    frame = pandas.read_json(folder / "trend.jsonl", lines=True)
    frame = frame[(frame.policy == policy) & (frame.split == "heldout") & (frame.step == frame.step.max())]
    values = frame.set_index("seed")[path[0]].sort_index()
    return values.map(lambda found: found[path[1]]) if len(path) > 1 else values


def student(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval, by scipy."""
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return sum(values) / len(values), low, high
