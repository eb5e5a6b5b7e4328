"""eval.claims: each claim measures what it says, and its verdict follows from the interval, in both directions."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import REGIMES, by_seed_end, by_seed_score, number, student, write_results

from eval import claims
from eval.claims import CLAIMS, Claim
from eval.records import Estimate, pool

FLIPPED = {"supported": "contradicted", "contradicted": "supported"}
estimates = st.one_of(
    st.none(), st.lists(st.floats(-10, 10).map(lambda x: round(x, 3)), min_size=1, max_size=5).map(pool)
)


def claim(above: bool = True, threshold: float = 0.0) -> Claim:
    return Claim("group", "text", lambda results, regime: None, above, threshold)


def mirrored(estimate: Estimate | None) -> Estimate | None:
    return estimate and Estimate(-estimate.value, -estimate.high, -estimate.low, tuple(-v for v in estimate.seeds))


@given(estimates, st.booleans(), st.sampled_from([0.0, 0.5, -1.0]))
def test_verdict_flips_with_the_sign(estimate: Estimate | None, above: bool, threshold: float) -> None:
    """The opposite claim on the same numbers, and the same claim on mirrored numbers, have the opposite verdict."""
    verdict = claim(above, threshold).verdict(estimate)
    assert claim(not above, threshold).verdict(estimate) == FLIPPED.get(verdict, verdict)
    assert claim(above, -threshold).verdict(mirrored(estimate)) == FLIPPED.get(verdict, verdict)


def test_verdicts_by_hand() -> None:
    """The whole interval on one side settles a claim; an interval that touches the threshold does not."""
    above = claim(threshold=0.5)
    assert above.verdict(None) == "not run"
    assert above.verdict(pool([0.9])).startswith("one seed")
    assert above.verdict(Estimate(0.7, 0.51, 0.9, (0.6, 0.8))) == "supported"
    assert above.verdict(Estimate(0.3, 0.1, 0.49, (0.2, 0.4))) == "contradicted"
    assert above.verdict(Estimate(0.6, 0.5, 0.7, (0.5, 0.7))) == "not settled"
    assert above.verdict(Estimate(0.4, 0.3, 0.5, (0.3, 0.5))) == "not settled"
    assert above.verdict(Estimate(0.5, 0.2, 0.8, (0.4, 0.6))) == "not settled"
    assert claim(False, 0.5).verdict(Estimate(0.3, 0.1, 0.49, (0.2, 0.4))) == "supported"


def chosen(method: str, less: str | None = None) -> Callable[[Path, str], pandas.Series]:
    def values(folder: Path, regime: str) -> pandas.Series:
        ours = by_seed_end(folder, f"{method}-{regime}", "chosen", "log_ratio")
        return ours if less is None else ours - by_seed_end(folder, f"{less}-{regime}", "chosen", "log_ratio")

    return values


def gap(method: str, than: str, *score: str) -> Callable[[Path, str], pandas.Series]:
    def values(folder: Path, regime: str) -> pandas.Series:
        other = "mu" if than == "mu" else f"{than}-{regime}"
        return by_seed_score(folder, f"{method}-{regime}", *score) - by_seed_score(folder, other, *score)

    return values


def wins(method: str) -> Callable[[Path, str], pandas.Series]:
    return lambda folder, regime: by_seed_score(folder, f"{method}-{regime}", "sampled", "all", "win_rate_vs_dpo")


REWARD = ("sampled", "all", "reward")
MATH, CODE = ("greedy", "arithmetic", "exact_match"), ("greedy", "functions", "pass@1")
# What each claim says in words: its numbers by seed, the side, the threshold.
MEANT: dict[str, tuple[Callable[[Path, str], pandas.Series], str, float]] = {
    "DPO's chosen log-ratio ends below 0": (chosen("dpo"), "below", 0),
    "InfoNCA's chosen log-ratio ends below 0": (chosen("infonca"), "below", 0),
    "NCA (K = 4) keeps the chosen log-ratio": (chosen("nca"), "above", -0.2),
    "pairwise NCA keeps the chosen log-ratio": (chosen("nca_pair"), "above", -0.2),
    "pairwise NCA keeps it higher than DPO (same pairs)": (chosen("nca_pair", "dpo"), "above", 0),
    "NCA keeps it higher than InfoNCA (same rewards)": (chosen("nca", "infonca"), "above", 0),
    "InfoNCA's reward is above DPO's": (gap("infonca", "dpo", *REWARD), "above", 0),
    "NCA's reward is above pairwise NCA's": (gap("nca", "nca_pair", *REWARD), "above", 0),
    "InfoNCA wins against DPO": (wins("infonca"), "above", 0.5),
    "NCA wins against DPO": (wins("nca"), "above", 0.5),
    "control: InfoNCA's reward is above that of DPO x 3 (same responses, but only their order)": (
        gap("infonca", "dpo_x3", *REWARD), "above", 0,
    ),
    "arithmetic, greedy: NCA above DPO": (gap("nca", "dpo", *MATH), "above", 0),
    "arithmetic, sampled: NCA above DPO": (gap("nca", "dpo", "sampled", *MATH[1:]), "above", 0),
    "functions, greedy: NCA above DPO": (gap("nca", "dpo", *CODE), "above", 0),
    "functions, sampled: NCA above DPO": (gap("nca", "dpo", "sampled", *CODE[1:]), "above", 0),
    "arithmetic, greedy: pairwise NCA above DPO (same pairs)": (gap("nca_pair", "dpo", *MATH), "above", 0),
    "arithmetic, greedy: DPO below mu": (gap("dpo", "mu", *MATH), "below", 0),
    "arithmetic, greedy: NCA above mu": (gap("nca", "mu", *MATH), "above", 0),
    "functions, greedy: DPO below mu": (gap("dpo", "mu", *CODE), "below", 0),
    "functions, greedy: NCA above mu": (gap("nca", "mu", *CODE), "above", 0),
    "NCA's reward is above that of SFT on the best of 4": (gap("nca", "sft_best", *REWARD), "above", 0),
    "arithmetic, greedy: NCA above SFT on the best of 4": (gap("nca", "sft_best", *MATH), "above", 0),
}  # fmt: skip


def written(run: Any, folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Run eval.claims; (claim, regime) to its line of claims.csv."""
    done = run(claims.main, "--results", folder)
    assert done.code == 0, done.err
    with open(folder / "claims.csv", newline="") as file:
        return {(row["claim"], row["regime"]): row for row in csv.DictReader(file)}


def narrow(*key: Any) -> float:
    """Seeds that differ little, so that many verdicts are settled."""
    return number(*key[:1], *[k for k in key[1:] if not isinstance(k, int) or k > 2]) + 0.05 * number(*key)


@pytest.mark.parametrize("numbers", [number, narrow])
def test_claims_measure_what_they_say(numbers, run, tmp_path) -> None:
    """Every claim in both regimes: numbers by pandas and scipy, the verdict by comparing the interval in words."""
    folder = write_results(tmp_path, number=numbers)
    found = written(run, folder)
    assert set(found) == {(text, regime) for text in MEANT for regime in REGIMES}
    assert len(CLAIMS) == len(MEANT)
    verdicts = set()
    for (text, regime), row in found.items():
        values, side, threshold = MEANT[text]
        value, low, high = student(list(values(folder, regime)))
        assert [float(row[key]) for key in ("value", "low", "high")] == pytest.approx([value, low, high], abs=2e-6)
        assert (row["side"], float(row["threshold"])) == (side, threshold)
        right, wrong = (low > threshold, high < threshold) if side == "above" else (high < threshold, low > threshold)
        assert row["verdict"] == ("supported" if right else "contradicted" if wrong else "not settled")
        verdicts.add(row["verdict"])
    if numbers is narrow:
        assert verdicts >= {"supported", "contradicted"}
    document = (folder / "claims.md").read_text()
    for (text, regime), row in found.items():
        (line,) = [line for line in document.splitlines() if line.startswith(f"| {text} (") and f"| {regime} |" in line]
        assert line.endswith(f"| {row['verdict']} |")
        assert f"| {float(row['value']):.2f} [" in line or math.isclose(float(row["value"]), 0, abs_tol=0.005)


def test_opposite_numbers_opposite_verdicts(run, tmp_path) -> None:
    """With all trend numbers mirrored, supported claims that something lies above or below 0 become contradicted, and
    the reverse."""
    before = written(run, write_results(tmp_path / "one", number=narrow))
    after = written(run, write_results(tmp_path / "other", number=lambda *key: -narrow(*key)))
    texts = [text for text in MEANT if "chosen log-ratio ends" in text or "keeps it" in text]
    settled = 0
    for text in texts:
        for regime in REGIMES:
            verdict = before[text, regime]["verdict"]
            assert after[text, regime]["verdict"] == FLIPPED.get(verdict, verdict)
            settled += verdict in FLIPPED
    assert settled >= 4


def test_not_run(run, tmp_path) -> None:
    """Claims on a method without records are `not run`, with empty cells; the others are judged."""
    found = written(run, write_results(tmp_path, without=["infonca-hard"]))
    for (text, regime), row in found.items():
        touched = "InfoNCA" in text and regime == "hard"
        assert (row["verdict"] == "not run") == touched
        assert (row["value"] == "") == touched
    assert "not run" in (tmp_path / "claims.md").read_text()


def test_one_seed_is_not_judged(run, tmp_path) -> None:
    """From one seed no claim is called supported or contradicted: there is no interval over seeds."""
    found = written(run, write_results(tmp_path, seeds=(0,)))
    assert {row["verdict"] for row in found.values()} == {"one seed: not judged"}


def test_same_records_same_bytes(run, tmp_path) -> None:
    """Run twice, the files are the same; the theory's text stands in the document."""
    folder, runs = write_results(tmp_path), []
    (folder / "theory.md").write_text("a theorem of its own\n")
    for _ in range(2):
        written(run, folder)
        runs.append([(folder / name).read_bytes() for name in ("claims.md", "claims.csv")])
    assert runs[0] == runs[1]
    assert b"a theorem of its own" in runs[0][0]


def test_missing_input(run, tmp_path) -> None:
    """Without scores or without the theory's results: one line."""
    for name in ("scores.jsonl", "theory.md"):
        folder = write_results(tmp_path / name)
        (folder / name).unlink()
        assert name in run(claims.main, "--results", folder).refusal
