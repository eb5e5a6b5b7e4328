"""The theorems on the population optimum of InfoNCA and NCA, in worlds that can be enumerated or solved by hand."""

import itertools
import math
from functools import partial

import pytest

from eval import theory
from eval.theory import KS, WORLDS, Key, World, draws, float64, minimise, population_loss, w_K
from train.infonca import infonca_loss
from train.nca import nca_loss

NAMES = [world.name for world in WORLDS]
every_world_and_K = pytest.mark.parametrize(("world", "K"), list(itertools.product(NAMES, KS)))

# Two responses, mu = (3/4, 1/4), exp(reward / alpha) = (1, 3). With K = 2, by hand:
#   w(y1) = 3/4 * 2 * 1/2 + 1/4 * 2 * 1/4 = 7/8,    w(y2) = 3/4 * 2 * 3/4 + 1/4 * 2 * 1/2 = 11/8.
BY_HAND = World("by hand", mu=float64([0.75, 0.25]), rewards=float64([0.0, 2 * math.log(3)]), alpha=2.0)


@pytest.fixture(scope="module")
def values() -> dict[Key, float]:
    """All numbers of theory.csv."""
    return {key: value for world in WORLDS for key, value in theory.measure(world).items()}


def test_two_responses_by_hand() -> None:
    """M = 2, K = 2: NCA's optimum is log(7/8), log(11/8), and mu w = (21/32, 11/32) is the law of keep-one."""
    probability = draws(BY_HAND, 2)[1].tolist()
    assert probability == pytest.approx([9 / 16, 6 / 16, 1 / 16], rel=1e-12)
    r = minimise(population_loss(BY_HAND, 2, partial(nca_loss, beta=1.0)), 2)
    assert r.exp().tolist() == pytest.approx([7 / 8, 11 / 8], rel=1e-10)
    assert w_K(BY_HAND, 2).tolist() == pytest.approx([7 / 8, 11 / 8], rel=1e-12)
    assert theory.keep_one(BY_HAND, 2).tolist() == pytest.approx([21 / 32, 11 / 32], rel=1e-12)
    # The limit K = infinity: E_mu exp(reward / alpha) = 3/2, so exp(r) = (2/3, 2).
    assert BY_HAND.limit.exp().tolist() == pytest.approx([2 / 3, 2], rel=1e-12)


def test_best_of_two_by_hand() -> None:
    """alpha -> 0: mu w_2 is best-of-2. With mu = (3/4, 1/4) the better response is kept with 1 - (3/4)^2 = 7/16."""
    best_of = World("best of", mu=BY_HAND.mu, rewards=BY_HAND.rewards, alpha=0.01)
    r = minimise(population_loss(best_of, 2, partial(nca_loss, beta=1.0)), 2)
    assert (best_of.mu * r.exp()).tolist() == pytest.approx([9 / 16, 7 / 16], rel=1e-10)


def test_infonca_on_two_responses_by_hand() -> None:
    """M = 2: the optimum of InfoNCA has r(y2) - r(y1) = reward gap / alpha = log 3, at any K and beta."""
    for K, beta in itertools.product((2, 3, 5), (1.0, 0.1)):
        x = minimise(population_loss(BY_HAND, K, partial(infonca_loss, beta=beta)), 2)
        assert beta * (x[1] - x[0]).item() == pytest.approx(math.log(3), rel=1e-9)


def test_draws_are_all_ordered_tuples() -> None:
    """The multisets and their multinomial weights are the K-tuples of i.i.d. draws, summed over their order."""
    world, K = WORLDS[0], 4
    by_multiset: dict[tuple[int, ...], float] = {}
    for ordered in itertools.product(range(3), repeat=K):
        multiset = tuple(sorted(ordered))
        by_multiset[multiset] = by_multiset.get(multiset, 0.0) + math.prod(world.mu[list(ordered)].tolist())
    responses, probability = draws(world, K)
    assert {tuple(row): p for row, p in zip(responses.tolist(), probability.tolist(), strict=True)} == pytest.approx(
        by_multiset, rel=1e-12
    )
    for K in KS:
        assert draws(world, K)[1].sum().item() == pytest.approx(1.0, rel=1e-10)
        assert len(draws(world, K)[1]) == math.comb(K + 2, 2)


@every_world_and_K
def test_infonca_learns_the_reward_at_every_K(values: dict[Key, float], world: str, K: int) -> None:
    """InfoNCA: r = reward / alpha + C, with no bias at finite K."""
    assert values[world, "infonca", str(K), theory.INFONCA, "max"] < 1e-9


@every_world_and_K
def test_nca_optimum_is_log_w_K(values: dict[Key, float], world: str, K: int) -> None:
    """NCA: r = log w_K, enumerated apart from the loss; r <= log K, and mu exp(r) sums to 1."""
    assert values[world, "nca", str(K), theory.NCA, "max"] < 1e-9
    assert values[world, "nca", str(K), "optimal r", "max"] < math.log(K)
    assert values[world, "nca", str(K), theory.SUM.format(1.0), "sum"] == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("world", NAMES)
def test_nca_tends_to_the_normalised_reward(values: dict[Key, float], world: str) -> None:
    """K -> infinity: the gap of r to reward / alpha - log E_mu exp(reward / alpha) falls with K, and is far from 0
    at K = 4. With a rare best response it is still near 1 at K = 64: log 64 = 4.16 is below its limit 4.36."""
    gaps = [values[world, "nca", str(K), theory.GAP, "max"] for K in KS]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[1] > 0.3
    assert gaps[-1] < {"even": 0.03, "rare best": 1.0}[world]
    if world == "rare best":
        assert values[world, "nca", "inf", "optimal r", "y3"] > math.log(64)
        assert gaps[-1] > 0.9


def test_gap_of_nca_falls_like_one_over_K() -> None:
    """|log w_K - limit| is O(1/K): from K = 32 to K = 64 the gap halves."""
    world = WORLDS[0]
    gaps = [(w_K(world, K).log() - world.limit).abs().max().item() for K in (32, 64)]
    assert gaps[0] / gaps[1] == pytest.approx(2.0, abs=0.1)


@every_world_and_K
def test_nca_at_beta_one_is_keep_one_and_weighted_sft(values: dict[Key, float], world: str, K: int) -> None:
    """beta = 1: mu w_K is the law of 'draw K from mu, keep one by softmax(reward / alpha)', and the normalised
    policy that is the optimum of SFT weighted by p."""
    assert values[world, "nca", str(K), theory.LAW, "max"] < 1e-9
    assert values[world, "weighted_sft", str(K), theory.SFT, "max"] < 1e-9


@every_world_and_K
def test_no_policy_has_the_nca_optimum_below_beta_one(values: dict[Key, float], world: str, K: int) -> None:
    """beta < 1: sum_y mu exp(r / beta) = E_mu w_K^(1/beta) > (E_mu w_K)^(1/beta) = 1 (Jensen)."""
    of = next(each for each in WORLDS if each.name == world)
    for beta in theory.BETAS[1:]:
        total = values[world, "nca", str(K), theory.SUM.format(beta), "sum"]
        assert total == pytest.approx((of.mu * w_K(of, K) ** (1 / beta)).sum().item(), rel=1e-6)
        assert total > 1.02


def test_files_are_the_same_each_time(values: dict[Key, float]) -> None:
    """The same numbers, and numbers that differ by rounding error, give the same bytes; the table names its command."""
    noisy = {key: value * (1 + 1e-13) for key, value in values.items()}
    assert theory.csv(noisy) == theory.csv(values)
    assert theory.markdown(noisy) == theory.markdown(values)
    assert theory.markdown(values).startswith("Made by `python -m eval.theory --out DIR`.\n")
    lines = theory.csv(values).splitlines()
    assert lines[0] == "world,objective,K,quantity,outcome,value"
    assert {line.count(",") for line in lines} == {5}
