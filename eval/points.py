"""The points of an ablation, from the score and trend records of policies whose names say what was varied:

    METHOD[-REGIME]-aALPHA-bBETA    also -alphaALPHA-betaBETA; without alpha for an objective that has none
    METHOD[-REGIME]-kK              learning from K responses to a prompt

such as nca-hard-a0.5-b1, dpo-hard-b0.5 and infonca-hard-k3. A policy METHOD[-REGIME] beside such is the point of the
method's own K, unless that is there by its own name.
"""

import dataclasses
import math
import re

from data_prep.files import InputError
from eval.records import METHODS, RESPONSES, Estimate, Results

NUMBER = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
NAMES = "|".join(sorted((method.replace("_", "[_-]") for method in METHODS), key=len, reverse=True))
REGIME = r"(?:-((?!alpha|beta|[abkK]\d)[\w.-]+?))??"
POLICY = re.compile(rf"({NAMES}){REGIME}(?:(?:-a(?:lpha)?{NUMBER})?-b(?:eta)?{NUMBER}|-[kK](\d+))?")


@dataclasses.dataclass(frozen=True)
class Point:
    """One policy, at the end of its training. kl: KL(pi || mu) in nats a response; None where it was not measured."""

    method: str
    regime: str
    alpha: float | None
    beta: float | None
    responses: int | None  # K
    score: Estimate
    kl: Estimate | None


def points(results: Results, decoding: str, benchmark: str, metric: str) -> list[Point]:
    """Every policy with that score and a name as above, by method, regime, alpha, beta and K."""
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
            method.replace("-", "_"), regime or "", None if alpha is None else float(alpha),
            None if beta is None else float(beta), None if k is None else int(k), score, kl,
        ))  # fmt: skip
    return sorted(found, key=lambda p: (p.method, p.regime, p.alpha or 0.0, p.beta or 0.0, p.responses or 0))


def over_strength(found: list[Point]) -> list[Point]:
    """The points over alpha and beta that have a KL; InputError if there are none."""
    grid = [point for point in found if point.beta is not None and point.kl is not None]
    if not grid:
        raise InputError("no policy METHOD-REGIME-aALPHA-bBETA has that score and a KL; run the ablation, or name "
                         "another --benchmark, --metric or --decoding")  # fmt: skip
    return grid


def over_responses(found: list[Point]) -> list[Point]:
    """The points over K; InputError if there are none."""
    grid = [point for point in found if point.responses is not None]
    if not grid:
        raise InputError("no policy METHOD-REGIME-kK has that score; run the ablation, or name another --benchmark, "
                         "--metric or --decoding")  # fmt: skip
    lines = {(point.method, point.regime) for point in grid}
    there = {(point.method, point.regime, point.responses) for point in grid}
    for point in found:
        own = RESPONSES[point.method]
        plain = point.beta is None and point.responses is None
        if plain and (point.method, point.regime) in lines and (point.method, point.regime, own) not in there:
            grid.append(dataclasses.replace(point, responses=own))
    return sorted(grid, key=lambda p: (p.method, p.regime, p.responses))


def half_widths(estimate: Estimate) -> tuple[float, float]:
    """How far the interval reaches below and above the value; zero where there is none."""
    if math.isnan(estimate.low):
        return 0.0, 0.0
    return max(estimate.value - estimate.low, 0.0), max(estimate.high - estimate.value, 0.0)
