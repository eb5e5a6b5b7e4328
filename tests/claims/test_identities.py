"""The exact identities between the objectives, and what each says at pi = mu and at its optimum."""

import math

import pytest
import torch
from torch import Tensor

from train.dpo import dpo_loss
from train.infonca import infonca_loss
from train.labels import soft_labels
from train.nca import nca_loss
from train.nca_pair import nca_pair_loss

BETA = 0.1
TIGHT = {"rtol": 0, "atol": 1e-12}


def gradient(loss: Tensor, log_ratios: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), log_ratios)[0]


def pairs(B: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Random log-ratios, rewards at least 1 apart, and a full mask, [B, 2]. r = BETA * log-ratio runs to about 9."""
    generator = torch.Generator().manual_seed(0)
    x = (30 * torch.randn(B, 2, generator=generator, dtype=torch.float64)).requires_grad_()
    worse = 5 * torch.rand(B, 1, generator=generator, dtype=torch.float64)
    better = worse + 1 + torch.rand(B, 1, generator=generator, dtype=torch.float64)
    rewards = torch.cat([worse, better], dim=-1)
    rewards[::2] = rewards[::2].flip(-1)  # the better response is the first in half of the rows
    return x, rewards, torch.ones(B, 2, dtype=torch.bool)


def full(K: int, rewards: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """One prompt at pi = mu: log-ratios 0, the rewards given, and a full mask, [1, K]."""
    x = torch.zeros(1, K, dtype=torch.float64, requires_grad=True)
    return x, torch.tensor([rewards], dtype=torch.float64), torch.ones(1, K, dtype=torch.bool)


# At alpha = 0.02 a gap of 1 leaves exp(-50) on the worse response: the limit, to far below 1e-12.
@pytest.mark.parametrize("alpha", [0.0, 1e-8, 0.02])
def test_infonca_on_pairs_is_dpo(alpha: float) -> None:
    """K = 2, alpha -> 0: -log softmax(r)_w = -log sigma(r_w - r_l), in value and gradient."""
    x, rewards, mask = pairs()
    infonca = infonca_loss(x, rewards, mask, alpha=alpha, beta=BETA)
    dpo = dpo_loss(x, rewards, mask, beta=BETA)
    torch.testing.assert_close(infonca, dpo, **TIGHT)
    torch.testing.assert_close(gradient(infonca, x), gradient(dpo, x), **TIGHT)


@pytest.mark.parametrize("alpha", [0.0, 1e-8, 0.02])
def test_nca_on_pairs_is_pairwise_nca(alpha: float) -> None:
    """K = 2, alpha -> 0: p = (1, 0), so NCA is -log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l)."""
    x, rewards, mask = pairs()
    nca = nca_loss(x, rewards, mask, alpha=alpha, beta=BETA)
    pair = nca_pair_loss(x, rewards, mask, beta=BETA)
    torch.testing.assert_close(nca, pair, **TIGHT)
    torch.testing.assert_close(gradient(nca, x), gradient(pair, x), **TIGHT)


def test_infonca_on_pairs_at_alpha_above_zero_is_dpo_on_both_orders() -> None:
    """K = 2, any alpha: InfoNCA = p_w DPO(w over l) + p_l DPO(l over w), so it differs from DPO where p_l > 0."""
    x, rewards, mask = pairs()
    infonca = infonca_loss(x, rewards, mask, alpha=1.0, beta=BETA)
    dpo, reversed_dpo = (dpo_loss(x, sign * rewards, mask, beta=BETA) for sign in (1, -1))
    p_w = 1 / (1 + (-(rewards[:, 0] - rewards[:, 1]).abs()).exp())
    torch.testing.assert_close(infonca, p_w * dpo + (1 - p_w) * reversed_dpo, **TIGHT)
    assert ((infonca - dpo).abs() > 1e-3).any()


@pytest.mark.parametrize("K", [2, 3, 4, 7, 16, 64])
@pytest.mark.parametrize("alpha", [0.0, 1e-4, 1.0, 100.0])
def test_loss_at_the_reference(K: int, alpha: float) -> None:
    """At pi = mu: NCA is 2 ln 2 for every K and every p, InfoNCA ln K, DPO ln 2, pairwise NCA 2 ln 2."""
    x, rewards, mask = full(K, [float((5 * i) % K) for i in range(K)])
    expected = {"nca": 2 * math.log(2), "infonca": math.log(K), "dpo": math.log(2), "nca_pair": 2 * math.log(2)}
    measured = {
        "nca": nca_loss(x, rewards, mask, alpha=alpha, beta=BETA).item(),
        "infonca": infonca_loss(x, rewards, mask, alpha=alpha, beta=BETA).item(),
        "dpo": dpo_loss(x, rewards, mask, beta=BETA).item(),
        "nca_pair": nca_pair_loss(x, rewards, mask, beta=BETA).item(),
    }
    assert measured == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.01, 1.0])
@pytest.mark.parametrize(
    ("odds", "alpha"), [([1, 2, 5], 1.0), ([6, 1, 1, 2], 0.5), ([3, 1], 2.0), ([1, 1, 1, 1, 1], 1.0)]
)
def test_gradient_at_the_reference(odds: list[int], alpha: float, beta: float) -> None:
    """At pi = mu the gradient by the log-ratio is -beta (p_i - 1/K) for InfoNCA, and exactly half of it for NCA.

    Rewards alpha * log(odds) have p = odds / sum of odds, known without a softmax."""
    K = len(odds)
    x, rewards, mask = full(K, [alpha * math.log(o) for o in odds])
    infonca = gradient(infonca_loss(x, rewards, mask, alpha=alpha, beta=beta), x)[0].tolist()
    nca = gradient(nca_loss(x, rewards, mask, alpha=alpha, beta=beta), x)[0].tolist()
    expected = [-beta * (o / sum(odds) - 1 / K) for o in odds]
    assert infonca == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert nca == pytest.approx([slope / 2 for slope in expected], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("shift", [-3.0, 0.5, 40.0])
def test_common_shift_is_free_for_infonca_and_dpo_only(shift: float) -> None:
    """r + c for all responses of a prompt: InfoNCA and DPO do not see it. NCA at r = c costs log(2 + e^c + e^-c),
    whatever p is, so it is least at c = 0: NCA holds the likelihood where it is."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    rewards = torch.randn(16, 4, generator=generator, dtype=torch.float64)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    for loss in (
        lambda x: infonca_loss(x, rewards, mask, alpha=1.0, beta=1.0),
        lambda x: dpo_loss(x, rewards, mask, beta=1.0),
    ):
        torch.testing.assert_close(loss(x + shift), loss(x), **TIGHT)
    nca = nca_loss(torch.full_like(x, shift), rewards, mask, alpha=1.0, beta=1.0)
    expected = math.log(2 + math.exp(shift) + math.exp(-shift))
    assert nca.tolist() == pytest.approx([expected] * 16, rel=1e-12)
    assert expected > 2 * math.log(2) + 0.05


@pytest.mark.parametrize("odds", [[1, 2, 5], [6, 1, 1, 2], [3, 1], [1, 1, 1, 1, 1], [40, 1, 1, 1, 1, 1]])
def test_nca_is_least_at_log_K_p(odds: list[int]) -> None:
    """NCA's minimiser is r_i = log(K p_i), for each response by itself; with p uniform it is r = 0.

    Its value there is sum_i (p_i + 1/K) H(K p_i / (1 + K p_i)), H the entropy of a coin."""
    K, total = len(odds), sum(odds)
    _, rewards, mask = full(K, [math.log(o) for o in odds])
    best = torch.tensor([[math.log(K * o / total) / BETA for o in odds]], dtype=torch.float64, requires_grad=True)
    loss = nca_loss(best, rewards, mask, alpha=1.0, beta=BETA)
    assert gradient(loss, best)[0].tolist() == pytest.approx([0.0] * K, abs=1e-15)

    coins = [K * o / total / (1 + K * o / total) for o in odds]
    entropy = [-q * math.log(q) - (1 - q) * math.log(1 - q) for q in coins]
    expected = sum((o / total + 1 / K) * h for o, h in zip(odds, entropy, strict=True))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    for i in range(K):
        for step in (-0.1, 0.1):
            moved = best.detach() + step / BETA * torch.eye(K, dtype=torch.float64)[i]
            assert nca_loss(moved, rewards, mask, alpha=1.0, beta=BETA).item() > loss.item()


def test_one_response_stays_at_the_reference() -> None:
    """A single real response has p = 1 = 1/K: drawn up as much as down, so its fixed point is r = 0."""
    x, rewards, mask = full(2, [1.0, 9.0])
    mask[0, 1] = False
    assert gradient(nca_loss(x, rewards, mask, alpha=1.0, beta=BETA), x).tolist() == [[0.0, 0.0]]
    up = torch.full_like(x, 2.0, requires_grad=True)
    slope = gradient(nca_loss(up, rewards, mask, alpha=1.0, beta=1.0), up)[0].tolist()
    assert slope == pytest.approx([math.tanh(1.0), 0.0], rel=1e-12)  # sigma(2) - sigma(-2) = tanh(1)


def test_pairwise_nca_draws_the_chosen_to_ln_2() -> None:
    """The chosen response of a pair is drawn to r_w = ln 2 = 0.6931, where its part of the loss is
    log(3/2) + log(3)/2 = 0.9548; the rejected one is drawn down without a bound."""
    rewards, mask = torch.tensor([[2.0, 1.0]], dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
    far_down = -1e4  # the rejected response's own part, -1/2 log sigma(-r_l), is 0 here
    x = torch.tensor([[math.log(2), far_down]], dtype=torch.float64, requires_grad=True)
    loss = nca_pair_loss(x, rewards, mask, beta=1.0)
    assert loss.item() == pytest.approx(math.log(1.5) + math.log(3) / 2, rel=1e-12)
    assert loss.item() == pytest.approx(0.9548, abs=5e-5)
    assert gradient(loss, x)[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-15)
    for r_w in (0.68, 0.70):
        nearby = torch.tensor([[r_w, far_down]], dtype=torch.float64)
        assert nca_pair_loss(nearby, rewards, mask, beta=1.0).item() > loss.item()
    for r_l in (3.0, 0.0, -5.0):  # d/dr_l = sigma(r_l) / 2 > 0: down, everywhere
        x = torch.tensor([[0.0, r_l]], dtype=torch.float64, requires_grad=True)
        slope = gradient(nca_pair_loss(x, rewards, mask, beta=1.0), x)[0, 1].item()
        assert slope == pytest.approx(0.5 / (1 + math.exp(-r_l)), rel=1e-12)


def test_reward_shift_moves_no_label_and_no_loss() -> None:
    """A constant added to all rewards of a prompt cancels in p = softmax(reward / alpha) and so in both losses."""
    x, rewards, mask = full(4, [0.5, 3.0, 1.25, 2.0])
    shifted = rewards + 1000.0  # exact in float64
    assert torch.equal(soft_labels(shifted, mask, 0.5), soft_labels(rewards, mask, 0.5))
    moved = x + torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    for loss in (nca_loss, infonca_loss):
        losses = [loss(moved, values, mask, alpha=0.5, beta=1.0) for values in (rewards, shifted, rewards * 1.1)]
        assert torch.equal(losses[0], losses[1])
        assert not torch.isclose(losses[0], losses[2])  # a scale, unlike a shift, is a change of alpha
