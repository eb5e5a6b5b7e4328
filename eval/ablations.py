"""The points of an ablation: its records are those of policies named

    METHOD-REGIME-aALPHA-bBETA    a grid over alpha and beta
    METHOD-REGIME-kK              learning from K responses to a prompt

such as nca-hard-a0.5-b1 and infonca-hard-k3, in a results folder (scores.jsonl, trend.jsonl, manifests.jsonl).
"""

import dataclasses
import math
import re

from data_prep.files import InputError
from eval.records import Estimate, Results

NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"
POLICY = re.compile(rf"(\w+)-([\w.-]+?)(?:-a({NUMBER})-b({NUMBER})|-k(\d+))")


@dataclasses.dataclass(frozen=True)
class Point:
    """One policy of a grid, at the end of its training. kl: KL(pi || mu) in nats a response; None if not measured."""

    method: str
    regime: str
    alpha: float | None
    beta: float | None
    responses: int | None  # K
    score: Estimate
    kl: Estimate | None


def points(results: Results, decoding: str, benchmark: str, metric: str) -> list[Point]:
    """Every point with that score, by method, regime, alpha, beta and K."""
    found = []
    for policy in sorted({key[0] for key in results.scores}):
        matched = POLICY.fullmatch(policy)
        score = results.score(policy, decoding, benchmark, metric)
        if matched is None or score is None:
            continue
        method, regime, alpha, beta, k = matched.groups()
        ends = results.ends.get(policy, {})
        kl = results.end(policy, "kl") if ends and all("kl" in end for end in ends.values()) else None
        found.append(Point(
            method, regime, None if alpha is None else float(alpha), None if beta is None else float(beta),
            None if k is None else int(k), score, kl,
        ))  # fmt: skip
    return sorted(found, key=lambda p: (p.method, p.regime, p.alpha or 0.0, p.beta or 0.0, p.responses or 0))


def grid(found: list[Point], over: str) -> list[Point]:
    """The points over `over` ("alpha" or "responses"); InputError if there are none."""
    chosen = [p for p in found if getattr(p, over) is not None and (over != "alpha" or p.kl is not None)]
    if not chosen:
        name = "METHOD-REGIME-aALPHA-bBETA, with a score and KL" if over == "alpha" else "METHOD-REGIME-kK"
        raise InputError(f"no policy named {name}; run the ablation first, or name another score")
    return chosen


def half_widths(estimate: Estimate) -> tuple[float, float]:
    """How far the interval reaches below and above the value; zero where there is none."""
    if math.isnan(estimate.low):
        return 0.0, 0.0
    return max(estimate.value - estimate.low, 0.0), max(estimate.high - estimate.value, 0.0)
