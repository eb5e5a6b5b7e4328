"""The paper's empirical claims: the committed results follow from their records, and a toy shows the main effect.

What results/tiny says about each claim is not asserted here: it is a measurement (results/tiny/claims.md).
"""

import csv
import hashlib
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from scipy import stats
from torch import Tensor

from data_prep.files import run_command
from eval import claims, figures, tables
from eval.records import METHODS, REGIMES, RESPONSES
from train.dpo import dpo_loss
from train.nca_pair import nca_pair_loss

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "results" / "tiny"
PAPER = ROOT / "results" / "paper" / "figure2_likelihood.csv"


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict[str, Any]]]:
    """The committed records; NaN and infinities are refused, they are not JSON."""
    if not (TINY / "scores.jsonl").exists():
        pytest.skip(f"{TINY} holds no results; bash scripts/reproduce.sh --seeds 3 makes them")
    if shutil.which("git"):
        words = ["git", "-C", str(ROOT), "diff", "--quiet", "HEAD", "--", "results/tiny"]
        if subprocess.run(words, check=False, capture_output=True).returncode == 1:
            pytest.skip("results/tiny was measured anew here; these tests are of the committed results")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the records")

    return {
        name: [
            json.loads(line, parse_constant=refuse)
            for line in (TINY / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
            if line
        ]
        for name in ("scores", "trend", "manifests")
    }


def call(monkeypatch: pytest.MonkeyPatch, main: Callable[[], None], *words: Any) -> None:
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
    handler = signal.getsignal(signal.SIGTERM)
    run_command(main)
    signal.signal(signal.SIGTERM, handler)


def test_results_regenerate_from_records(records, monkeypatch, tmp_path) -> None:
    """Tables, claims and the data of both figures come out of the committed records, byte for byte."""
    for name in ("scores.jsonl", "trend.jsonl", "manifests.jsonl", "theory.md"):
        shutil.copy(TINY / name, tmp_path)
    call(monkeypatch, tables.main, "--results", tmp_path)
    call(monkeypatch, claims.main, "--results", tmp_path)
    trend = tmp_path / "trend.jsonl"
    call(monkeypatch, figures.main, "--trend", trend, "--out", tmp_path / "likelihood_trend")
    both = tmp_path / "likelihood_trend_and_paper"
    call(monkeypatch, figures.main, "--trend", trend, "--out", both, "--paper", PAPER)
    made = ("tables.md", "tables.csv", "claims.md", "claims.csv", "likelihood_trend.csv", f"{both.name}.csv")
    for name in made:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name
    for name in ("likelihood_trend", both.name):  # their bytes depend on the fonts of a machine
        assert all((TINY / f"{name}{ending}").stat().st_size > 10_000 for ending in (".png", ".svg"))


def test_whole_grid(records) -> None:
    """At least 3 seeds; every method in both regimes, and mu, for every seed, with the same measurements."""
    seeds = {record["seed"] for record in records["scores"]}
    assert len(seeds) >= 3
    grid = {f"{method}-{regime}" for method in METHODS for regime in REGIMES}
    assert REGIMES == ("gentle", "hard")
    measured: dict[tuple[str, int], set[tuple[str, str, str]]] = {}
    for r in records["scores"]:
        key = (r["decoding"], r["benchmark"], r["metric"])
        found = measured.setdefault((r["policy"], r["seed"]), set())
        assert key not in found, r
        found.add(key)
    assert set(measured) == {(policy, seed) for policy in grid | {"mu"} for seed in seeds}
    kinds = [
        {frozenset(found) for (policy, _), found in measured.items() if (policy[:4] == "dpo-", policy == "mu") == kind}
        for kind in ((False, False), (True, False), (False, True))
    ]  # DPO is not compared with itself, nor mu with anyone
    assert [len(kind) for kind in kinds] == [1, 1, 1]
    steps: dict[tuple[str, int], list[int]] = {}
    for r in records["trend"]:
        if r["split"] == "heldout":
            steps.setdefault((r["policy"], r["seed"]), []).append(r["step"])
    assert set(steps) == {(policy, seed) for policy in grid for seed in seeds}
    for seed in seeds:  # the same steps for every method that learns from the same rows
        for K in (2, 4):
            same = [steps[policy, seed] for policy in grid if RESPONSES[policy.rpartition("-")[0]] == K]
            assert all(found == same[0] for found in same)
    assert not [cell for cell in (TINY / "tables.md").read_text().split("|") if cell.strip() == "not run"]


def test_records_come_from_manifests(records) -> None:
    """Each record's manifest is a line of manifests.jsonl, of the same seed and policy; each hash is the SHA-256 of
    its identity; none was made by uncommitted code."""
    of = {(line["hash"], line["seed"], line["stage"]) for line in records["manifests"]}
    for record in records["scores"]:
        assert (record["manifest"], record["seed"], f"answers/{record['policy']}") in of
    for record in records["trend"]:
        assert (record["manifest"], record["seed"], f"runs/{record['policy']}") in of
    for line in records["manifests"]:
        text = json.dumps(line["identity"], sort_keys=True, ensure_ascii=False)
        assert hashlib.sha256(text.encode()).hexdigest() == line["hash"]
        assert line["dirty"] is False, (line["stage"], line["seed"])
        assert line["commit"]
        assert line["command"].startswith("python -m ")


def test_answers_are_those_of_the_runs(records) -> None:
    """Through the digests: a score's answers were drawn from the policy that its run wrote, and all runs of a seed
    began at the same mu, on the same rows for the same K."""
    identity = {(line["seed"], line["stage"]): line["identity"] for line in records["manifests"]}
    for seed in {seed for seed, _ in identity}:
        mu = identity[seed, "sft"]["outputs"]["policy"]
        runs = {stage[5:]: found for (at, stage), found in identity.items() if at == seed and stage[:5] == "runs/"}
        for policy, found in runs.items():
            assert found["settings"]["model"] == mu
            assert identity[seed, f"answers/{policy}"]["settings"]["policy"] == found["outputs"]["policy"]
            assert found["inputs"]["rows"] in (
                identity[seed, f"rows-{name}"]["outputs"]["rows.jsonl"] for name in ("train", "pairs")
            )
        assert len({found["inputs"]["eval_rows"] for found in runs.values()}) == 1
        for regime in REGIMES:  # one recipe for all methods
            recipes = [json.dumps(f["settings"]["recipe"]) for p, f in runs.items() if p.endswith(regime)]
            assert len(set(recipes)) == 1


def ends(frame: pandas.DataFrame, policy: str, side: str) -> pandas.Series:
    """log pi - log mu of a side at the end of training on held-out rows, by seed."""
    one = frame[(frame.policy == policy) & (frame.split == "heldout")]
    last = one.sort_values("step").groupby("seed").tail(1).set_index("seed")
    return last[side].map(lambda found: found["log_ratio"]).sort_index()


def test_likelihood_claims_follow_from_the_trend(records) -> None:
    """The six claims on likelihood, recomputed from trend.jsonl with pandas and scipy: value, interval, verdict."""
    frame = pandas.DataFrame(records["trend"])
    with open(TINY / "claims.csv", newline="", encoding="utf-8") as file:
        written = {(row["claim"], row["regime"]): row for row in csv.DictReader(file)}
    meant = {
        "DPO's chosen log-ratio ends below 0": ("dpo", None, "below"),
        "InfoNCA's chosen log-ratio ends below 0": ("infonca", None, "below"),
        "NCA (K = 4) keeps the chosen log-ratio": ("nca", None, "above"),
        "pairwise NCA keeps the chosen log-ratio": ("nca_pair", None, "above"),
        "pairwise NCA keeps it higher than DPO (same pairs)": ("nca_pair", "dpo", "above"),
        "NCA keeps it higher than InfoNCA (same rewards)": ("nca", "infonca", "above"),
    }
    for text, (method, other, side) in meant.items():
        for regime in REGIMES:
            values = ends(frame, f"{method}-{regime}", "chosen")
            if other:
                values = values - ends(frame, f"{other}-{regime}", "chosen")
            low, high = stats.ttest_1samp(values, 0).confidence_interval()
            row = written[text, regime]
            assert [float(row[k]) for k in ("value", "low", "high")] == pytest.approx(
                [values.mean(), low, high], abs=2e-6
            )
            up, down = ("supported", "contradicted") if side == "above" else ("contradicted", "supported")
            threshold = -0.2 if "keeps the" in text else 0  # what counts as kept, in nats
            assert row["verdict"] == (up if low > threshold else down if high < threshold else "not settled")


def test_trend_is_consistent(records) -> None:
    """In every record r = beta * log-ratio, margin = chosen r - rejected r; at step 0 pi is mu."""
    for r in records["trend"]:
        for side in ("chosen", "rejected"):
            assert r[side]["r"] == pytest.approx(r["beta"] * r[side]["log_ratio"], abs=2e-6)
            assert r[side]["log_ratio"] <= 0 or r[side]["logps"] > -1000
        assert r["margin"] == pytest.approx(r["chosen"]["r"] - r["rejected"]["r"], abs=3e-6)
        if r["step"] == 0:
            assert abs(r["chosen"]["log_ratio"]) + abs(r["rejected"]["log_ratio"]) < 2e-3
            assert r["accuracy"] == 0.5
        if r["split"] == "heldout":
            assert math.isfinite(r["kl"])


def test_scores_are_consistent(records) -> None:
    """Each value lies in its interval and range; the score of all prompts is the mean of the three families'."""
    at = {tuple(r[k] for k in ("seed", "policy", "decoding", "benchmark", "metric")): r for r in records["scores"]}
    for (*key, benchmark, metric), r in at.items():
        lowest, highest = (1, 10) if metric == "reward" else (0, 1)
        assert lowest <= r["low"] <= r["value"] <= r["high"] <= highest
        if benchmark == "all" and metric != "correct":
            parts = [at[*key, family, metric] for family in ("arithmetic", "functions", "instructions")]
            assert sum(part["n"] for part in parts) == r["n"]
            mean = sum(part["n"] * part["value"] for part in parts) / r["n"]
            assert r["value"] == pytest.approx(mean, abs=1e-9)


# The toy: a softmax policy over M outcomes for each of a few prompts, pi(y|x) ~ mu(y|x) exp(theta . phi(x, y)), mu
# uniform. The two responses of a pair share one feature that the other outcomes lack, as two answers of one model to
# one prompt share most of what they are.
PROMPTS, OUTCOMES, FEATURES, BETA = 8, 300, 12, 0.5


def toy_features(seed: int) -> Tensor:
    """phi, [prompts, outcomes, features]; outcomes 0 and 1 are the chosen and the rejected response."""
    phi = 0.5 * torch.randn(
        PROMPTS, OUTCOMES, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    phi[:, :, 0] = 0
    phi[:, :2, 0] = 1
    return phi


def toy_run(loss: Callable[..., Tensor], log_ratios: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Gradient descent on `size` parameters; mean log pi - log mu of (chosen, rejected), [steps + 1, 2]."""
    theta = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(PROMPTS, 2)
    mask = torch.ones(PROMPTS, 2, dtype=torch.bool)
    optimizer, seen = torch.optim.SGD([theta], lr=0.5), []
    for _ in range(1501):
        found = log_ratios(theta)
        seen.append(found.detach().mean(0))
        optimizer.zero_grad()
        loss(found, rewards, mask, beta=BETA).mean().backward()
        optimizer.step()
    return torch.stack(seen)


def toy_log_ratios(scores: Tensor) -> Tensor:
    """log pi - log mu of the pair, [prompts, 2], from scores [prompts, outcomes] added to log mu (uniform)."""
    return scores[:, :2] - (scores.logsumexp(-1, keepdim=True) - math.log(OUTCOMES))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_toy_dpo_lowers_the_chosen_likelihood_and_nca_keeps_it(seed) -> None:
    """Where the pair shares features, DPO widens the margin while the likelihood of both falls, without end; pairwise
    NCA, with the same settings, widens it with the chosen likelihood above mu's, and comes to rest."""
    phi = toy_features(seed)
    dpo, nca = (
        toy_run(loss, lambda theta: toy_log_ratios(phi @ theta), FEATURES) for loss in (dpo_loss, nca_pair_loss)
    )
    for curve in (dpo, nca):
        assert curve[0].tolist() == pytest.approx([0, 0], abs=1e-12)
        assert curve[-1, 0] - curve[-1, 1] > 1
    later = len(dpo) // 2
    assert dpo[-1, 0] < -3
    assert dpo[-1, 0] < dpo[later, 0] - 1
    assert nca[later:, 0].min() > 0.15
    assert nca[-1, 0] - nca[later, 0] < 0.3
    assert nca[-1, 0] < math.log(2) / BETA  # where its chosen term is at rest


@pytest.mark.parametrize("loss", [dpo_loss, nca_pair_loss])
def test_toy_without_shared_parameters(loss) -> None:
    """The control: with a parameter for every outcome nothing is shared, and DPO raises the chosen likelihood too."""
    curve = toy_run(loss, lambda theta: toy_log_ratios(theta.reshape(PROMPTS, OUTCOMES)), PROMPTS * OUTCOMES)
    assert curve[-1, 0] > 0.1
    assert curve[-1, 1] < -0.1
