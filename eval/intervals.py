"""An interval for every number: 95 %, over items, and paired tests between methods on the same items."""

import dataclasses
import math
from collections.abc import Sequence

import numpy
from scipy import stats

RESAMPLES = 10_000
EXACT_UP_TO = 12  # items with a difference: up to here all sign flips are counted


def binomial_interval(successes: int, n: int) -> tuple[float, float]:
    """The exact (Clopper-Pearson) 95 % interval of a share, as two shares."""
    found = stats.binomtest(successes, n).proportion_ci(0.95, method="exact")
    return float(found.low), float(found.high)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean over items; the value itself where all are equal."""
    array = numpy.asarray(values, dtype=float)
    if (array == array[0]).all():
        return float(array[0]), float(array[0])
    draws = stats.bootstrap(
        (array,), numpy.mean, n_resamples=RESAMPLES, method="percentile", batch=500, rng=numpy.random.default_rng(seed)
    )
    return float(draws.confidence_interval.low), float(draws.confidence_interval.high)


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """Ours less theirs, mean over the same n items, with its bootstrap interval and two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int


def paired_difference(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> PairedDifference:
    """Compare two methods on the same items, in the same order: a sign-flip permutation test of the mean
    difference (exact for few differing items). ValueError if they are not as many."""
    differences = numpy.asarray([a - b for a, b in zip(ours, theirs, strict=True)], dtype=float)
    low, high = bootstrap_interval(differences, seed)
    moved = differences[differences != 0]
    p_value = 1.0  # for one moved item too: both of its flips are as extreme
    if len(moved) > 1:
        test = stats.permutation_test(
            (moved,), numpy.mean, permutation_type="samples", rng=numpy.random.default_rng(seed), batch=500,
            n_resamples=math.inf if len(moved) <= EXACT_UP_TO else RESAMPLES,
        )  # fmt: skip
        p_value = float(test.pvalue)
    return PairedDifference(float(differences.mean()), low, high, p_value, len(differences))
