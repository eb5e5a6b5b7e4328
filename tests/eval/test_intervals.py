"""Intervals and paired tests against closed forms."""

import math
import random

import pytest

from eval.intervals import binomial_interval, bootstrap_interval, paired_difference


def test_exact_binomial_interval_of_no_and_of_all_successes() -> None:
    """Clopper-Pearson at 0 of n: 1 - (0.025)^(1/n); all of n is its mirror image."""
    bound = 1 - 0.025 ** (1 / 20)
    assert binomial_interval(0, 20) == pytest.approx((0, bound))
    assert binomial_interval(20, 20) == pytest.approx((1 - bound, 1))


def test_bootstrap_interval_nears_the_normal_one() -> None:
    """For many items the percentile interval is the mean +- 1.96 standard errors."""
    rng = random.Random(0)
    values = [rng.gauss(3, 2) for _ in range(2000)]
    mean = math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values)) / len(values)
    low, high = bootstrap_interval(values)
    assert (mean - low) / error == pytest.approx(1.96, abs=0.1)
    assert (high - mean) / error == pytest.approx(1.96, abs=0.1)
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)


def test_paired_difference_is_exact_for_few_items() -> None:
    """n differences of one sign: 2 of 2^n sign flips are as extreme. Items without a difference add nothing."""
    found = paired_difference([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 1])
    assert (found.difference, found.n) == (pytest.approx(5 / 7), 7)
    assert found.p_value == pytest.approx(2 / 2**5)
    assert paired_difference([1, 0, 1], [1, 0, 1]).p_value == 1
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1], [1, 2])


def test_paired_test_rejects_as_often_as_it_says() -> None:
    """Under the null, p < 0.05 happens about 5 times in 100."""
    rng = random.Random(1)
    low = 0
    for seed in range(100):
        ours, theirs = ([rng.gauss(0, 1) for _ in range(30)] for _ in range(2))
        low += paired_difference(ours, theirs, seed).p_value < 0.05
    assert low <= 12


def test_paired_difference_where_one_item_moved() -> None:
    """One differing item is no evidence: both of its flips are as extreme, so p = 1."""
    found = paired_difference([1.0, 2.0, 4.0], [1.0, 2.0, 3.0])
    assert found.p_value == 1.0
    assert found.difference == pytest.approx(1 / 3)
