"""The paper's claims, each as a test that can fail, on the records of results/tiny.

    python -m eval.claims --results results/tiny

Writes claims.md and claims.csv. The claims, their quantities and thresholds stand below; none was changed after the
seeds of the committed results were run (development used seeds from 100 on).
"""

import argparse
import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.files import InputError, run_command, write_text
from eval.records import REGIMES, Estimate, Results

Quantity = Callable[[Results, str], Estimate | None]  # of a regime


@dataclasses.dataclass(frozen=True)
class Claim:
    """`quantity` is claimed to lie above (or below) `threshold`. group: the claim of the paper that it tests."""

    group: str
    text: str
    quantity: Quantity
    above: bool = True
    threshold: float = 0.0

    def verdict(self, estimate: Estimate | None) -> str:
        """supported or contradicted where the whole 95 % interval lies on one side of the threshold."""
        if estimate is None:
            return "not run"
        if len(estimate.seeds) < 2:
            return "one seed: not judged"
        if estimate.low > self.threshold:
            return "supported" if self.above else "contradicted"
        if estimate.high < self.threshold:
            return "contradicted" if self.above else "supported"
        return "not settled"


def chosen(method: str, less: str | None = None) -> Quantity:
    """Chosen log pi - log mu at the end of training, on held-out rows, nats a response."""
    path = ("chosen", "log_ratio")
    if less is None:
        return lambda results, regime: results.end(f"{method}-{regime}", *path)
    return lambda results, regime: results.end_difference(f"{method}-{regime}", f"{less}-{regime}", *path)


def better(method: str, than: str, decoding: str, benchmark: str, metric: str) -> Quantity:
    """A score of `method` less that of `than`, paired by seed."""

    def quantity(results: Results, regime: str) -> Estimate | None:
        other = than if than == "mu" else f"{than}-{regime}"
        return results.difference(f"{method}-{regime}", other, decoding, benchmark, metric)

    return quantity


def win_rate(method: str) -> Quantity:
    """Win rate against DPO of sampled answers."""
    return lambda results, regime: results.score(f"{method}-{regime}", "sampled", "all", "win_rate_vs_dpo")


LIKELIHOOD = "DPO and InfoNCA let the chosen likelihood fall, NCA keeps it (Sections 4 and 5, Figures 2 and 5)"
REWARDS = "Learning from K = 4 rewards beats learning from pairs (Section 5.1, Table 2)"
REASONING = "NCA beats DPO on math and code, where DPO can fall below the SFT model (Section 5.2, Table 3)"
BASELINE = "Not a claim of the paper: NCA against the simplest use of the same rewards"
REWARD, MATH, CODE = ("all", "reward"), ("arithmetic", "exact_match"), ("functions", "pass@1")

# "Keeps" is r > -0.1 at beta = 0.5, in nats of log-ratio: a ninth of what DPO loses in the paper's Figure 2 (-0.89),
# where NCA ends at +0.05 on pairs and, by the authors' model card, at -0.004 on K = 4 rewards. It was set after one
# development seed had been seen (101, hard regime: NCA -0.01, pairwise NCA -0.29).
KEPT = -0.2

CLAIMS = (
    Claim(LIKELIHOOD, "DPO's chosen log-ratio ends below 0", chosen("dpo"), above=False),
    Claim(LIKELIHOOD, "InfoNCA's chosen log-ratio ends below 0", chosen("infonca"), above=False),
    Claim(LIKELIHOOD, "NCA (K = 4) keeps the chosen log-ratio", chosen("nca"), threshold=KEPT),
    Claim(LIKELIHOOD, "pairwise NCA keeps the chosen log-ratio", chosen("nca_pair"), threshold=KEPT),
    Claim(LIKELIHOOD, "pairwise NCA keeps it higher than DPO (same pairs)", chosen("nca_pair", "dpo")),
    Claim(LIKELIHOOD, "NCA keeps it higher than InfoNCA (same rewards)", chosen("nca", "infonca")),
    Claim(REWARDS, "InfoNCA's reward is above DPO's", better("infonca", "dpo", "sampled", *REWARD)),
    Claim(REWARDS, "NCA's reward is above pairwise NCA's", better("nca", "nca_pair", "sampled", *REWARD)),
    Claim(REWARDS, "InfoNCA wins against DPO", win_rate("infonca"), threshold=0.5),
    Claim(REWARDS, "NCA wins against DPO", win_rate("nca"), threshold=0.5),
    Claim(
        REWARDS,
        "control: InfoNCA's reward is above that of DPO x 3 (same responses, but only their order)",
        better("infonca", "dpo_x3", "sampled", *REWARD),
    ),
    Claim(REASONING, "arithmetic, greedy: NCA above DPO", better("nca", "dpo", "greedy", *MATH)),
    Claim(REASONING, "arithmetic, sampled: NCA above DPO", better("nca", "dpo", "sampled", *MATH)),
    Claim(REASONING, "functions, greedy: NCA above DPO", better("nca", "dpo", "greedy", *CODE)),
    Claim(REASONING, "functions, sampled: NCA above DPO", better("nca", "dpo", "sampled", *CODE)),
    Claim(
        REASONING,
        "arithmetic, greedy: pairwise NCA above DPO (same pairs)",
        better("nca_pair", "dpo", "greedy", *MATH),
    ),
    Claim(REASONING, "arithmetic, greedy: DPO below mu", better("dpo", "mu", "greedy", *MATH), above=False),
    Claim(REASONING, "arithmetic, greedy: NCA above mu", better("nca", "mu", "greedy", *MATH)),
    Claim(REASONING, "functions, greedy: DPO below mu", better("dpo", "mu", "greedy", *CODE), above=False),
    Claim(REASONING, "functions, greedy: NCA above mu", better("nca", "mu", "greedy", *CODE)),
    Claim(
        BASELINE, "NCA's reward is above that of SFT on the best of 4", better("nca", "sft_best", "sampled", *REWARD)
    ),
    Claim(
        BASELINE,
        "arithmetic, greedy: NCA above SFT on the best of 4",
        better("nca", "sft_best", "greedy", *MATH),
    ),
)


def measured(results: Results) -> Iterator[tuple[Claim, str, Estimate | None, str]]:
    """Every claim in every regime, with its estimate and verdict."""
    for claim in CLAIMS:
        for regime in REGIMES:
            estimate = claim.quantity(results, regime)
            yield claim, regime, estimate, claim.verdict(estimate)


def document(results: Results, theory: str) -> str:
    """claims.md."""
    found = list(measured(results))
    lines = [
        "# The paper's claims at this scale",
        "",
        f"Seeds {', '.join(map(str, results.seeds))}; made by `bash scripts/reproduce.sh --seeds {len(results.seeds)}` "
        "from `scores.jsonl` and `trend.jsonl` (`python -m eval.claims --results results/tiny`).",
        "",
        "Each claim is put as a quantity that should lie above (or below) a threshold. It counts as **supported** or",
        "**contradicted** only where the whole 95 % interval (Student's t over the seeds' means) lies on one side,",
        "else as **not settled**. Claims and thresholds were fixed before these seeds were run; development used",
        f"seeds from 100 on. There are {len(found)} tests: at 95 % one or two can go wrong by chance. Two training",
        "strengths are shown, a gentle and a hard one, with the same settings for every method; neither was chosen",
        "for a method. `keeps the chosen log-ratio` means above -0.2 nats (r > -0.1, a ninth of DPO's fall in the",
        "paper's Figure 2); that threshold was set after one development seed (101) had been seen, where NCA had -0.01",
        "and pairwise NCA -0.29 in the hard regime.",
    ]
    for group in dict.fromkeys(claim.group for claim in CLAIMS):
        lines += [
            "",
            f"## {group}",
            "",
            "| claim | regime | measured [95 %] | by seed | verdict |",
            "|---|---|---|---|---|",
        ]
        for claim, regime, estimate, verdict in found:
            if claim.group == group:
                text = f"{claim.text} ({'>' if claim.above else '<'} {claim.threshold:g})"
                shown = estimate.show(2) if estimate else "not run"
                by_seed = ", ".join(f"{value:+.2f}" for value in estimate.seeds) if estimate else "-"
                lines.append(f"| {text} | {regime} | {shown} | {by_seed} | {verdict} |")
    lines += [
        "",
        "## The theorems, in a world that can be enumerated",
        "",
        theory.strip(),
        "",
        "The exact identities (InfoNCA at K = 2, alpha -> 0 is DPO; initial losses; invariances) are tests:",
        "`tests/claims/test_identities.py` and `tests/claims/test_theory.py`.",
    ]
    return "\n".join(lines) + "\n"


def table(results: Results) -> str:
    """claims.csv."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["claim", "regime", "side", "threshold", "value", "low", "high", "verdict"])
    for claim, regime, estimate, verdict in measured(results):
        numbers = (estimate.value, estimate.low, estimate.high) if estimate else (math.nan,) * 3
        cells = ["" if math.isnan(number) else f"{number:.6f}" for number in numbers]
        writer.writerow([claim.text, regime, "above" if claim.above else "below", claim.threshold, *cells, verdict])
    return text.getvalue()


def main() -> None:
    """Write the claims."""
    parser = argparse.ArgumentParser(prog="python -m eval.claims")
    parser.add_argument("--results", required=True, type=Path)
    arguments = parser.parse_args()
    results = Results.read(arguments.results)
    theory = arguments.results / "theory.md"
    if not theory.exists():
        raise InputError(f"{theory}: no such file; python -m eval.theory --out {arguments.results} writes it")
    write_text(arguments.results / "claims.md", document(results, theory.read_text(encoding="utf-8")))
    write_text(arguments.results / "claims.csv", table(results))
    print(f"{arguments.results / 'claims.md'}: written")


if __name__ == "__main__":
    run_command(main)
