"""Every objective against its equation in plain Python, and against the edges of its domain."""

import math
import random
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from train.dpo import dpo_loss
from train.infonca import infonca_loss
from train.ipo import ipo_loss
from train.kto import kto_loss
from train.labels import soft_labels
from train.nca import nca_loss
from train.nca_pair import nca_pair_loss
from train.sft_best import weighted_sft_loss

# The objectives under one signature: (log_ratios, rewards, mask, alpha, beta) -> [B].
LOSSES: dict[str, Callable[..., Tensor]] = {
    "nca": lambda x, rewards, mask, alpha, beta: nca_loss(x, rewards, mask, alpha=alpha, beta=beta),
    "infonca": lambda x, rewards, mask, alpha, beta: infonca_loss(x, rewards, mask, alpha=alpha, beta=beta),
    "weighted_sft": lambda x, rewards, mask, alpha, beta: weighted_sft_loss(x, rewards, mask, alpha=alpha),
    "dpo": lambda x, rewards, mask, alpha, beta: dpo_loss(x, rewards, mask, beta=beta),
    "nca_pair": lambda x, rewards, mask, alpha, beta: nca_pair_loss(x, rewards, mask, beta=beta),
    "ipo": lambda x, rewards, mask, alpha, beta: ipo_loss(x, rewards, mask, beta=beta),
    "kto": lambda x, rewards, mask, alpha, beta: kto_loss(x, rewards, mask, beta=beta),
}
SOFT = ["nca", "infonca", "weighted_sft"]  # labels are softmax(reward / alpha)
PAIRED = ["dpo", "nca_pair", "ipo", "kto"]  # the best response against those it beats

every_objective = pytest.mark.parametrize("name", LOSSES)
soft_objectives = pytest.mark.parametrize("name", SOFT)


def log_sigma(z: float) -> float:
    return min(z, 0.0) - math.log1p(math.exp(-abs(z)))


def sigma(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > 0 else 1 - 1 / (1 + math.exp(z))


def labels(rewards: list[float], alpha: float) -> list[float]:
    """p_i = exp(reward_i / alpha) / sum_j exp(reward_j / alpha); at alpha = 0 the best responses share all weight."""
    top = max(rewards)
    weights = [float(s == top) if alpha == 0 else math.exp((s - top) / alpha) for s in rewards]
    return [weight / sum(weights) for weight in weights]


def plain_loss(
    name: str, x: list[float], rewards: list[float], alpha: float, beta: float, at: list[float] | None = None
) -> float:
    """The loss of one prompt, written from its equation with loops and `math`.

    x: the K log-ratios. `at`: the log-ratios at which KTO's z0, which has no gradient, is taken (default: x)."""
    K, r, p = len(x), [beta * value for value in x], labels(rewards, alpha)
    w = rewards.index(max(rewards))
    losers = [i for i in range(K) if rewards[i] < rewards[w]]
    if name == "nca":
        return -sum(p[i] * log_sigma(r[i]) + log_sigma(-r[i]) / K for i in range(K))
    if name == "infonca":
        log_sum = max(r) + math.log(sum(math.exp(value - max(r)) for value in r))
        return -sum(p[i] * (r[i] - log_sum) for i in range(K))
    if name == "weighted_sft":
        return -sum(p[i] * x[i] for i in range(K))
    if not losers:
        return 0.0
    if name == "dpo":
        return sum(-log_sigma(r[w] - r[i]) for i in losers) / len(losers)
    if name == "nca_pair":
        rejected = sum(log_sigma(-r[i]) for i in losers) / len(losers)
        return -log_sigma(r[w]) - 0.5 * log_sigma(-r[w]) - 0.5 * rejected
    if name == "ipo":
        return sum((x[w] - x[i] - 1 / (2 * beta)) ** 2 for i in losers) / len(losers)
    assert name == "kto"
    z0 = max(0.0, sum(beta * value for value in at or x) / K)
    return (1 - sigma(r[w] - z0)) + sum(1 - sigma(z0 - r[i]) for i in losers) / len(losers)


def plain_gradient(name: str, x: list[float], rewards: list[float], alpha: float, beta: float) -> list[float]:
    """The derivative of `plain_loss` by each log-ratio: central differences, so no rule of calculus is shared."""
    step, slopes = 1e-5, []
    for i in range(len(x)):
        up, down = ([v + sign * step * (j == i) for j, v in enumerate(x)] for sign in (1, -1))
        rise = plain_loss(name, up, rewards, alpha, beta, at=x) - plain_loss(name, down, rewards, alpha, beta, at=x)
        slopes.append(rise / (2 * step))
    return slopes


def loss_and_gradient(
    name: str, x: Tensor, rewards: Tensor, mask: Tensor | None = None, alpha: float = 1.0, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The loss of each prompt [B] and the gradient of their sum by the log-ratios [B, K]."""
    x = x.detach().clone().requires_grad_()
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    loss = LOSSES[name](x, rewards, mask, alpha, beta)
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def batch(B: int, K: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random log-ratios and rewards without ties, [B, K]: rewards of a prompt differ by 0.5 or more."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(B, K, generator=generator, dtype=dtype)
    order = torch.stack([torch.randperm(K, generator=generator) for _ in range(B)])
    return x, 1 + 0.5 * order.to(dtype)


@every_objective
@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.1), (0.3, 1.0), (2.0, 0.5)])
def test_loss_and_gradient_are_those_of_the_equation(name: str, alpha: float, beta: float) -> None:
    """On ragged rows, ties included, each loss [B] and its gradient equal the equation written out in Python."""
    random.seed(0)
    B, K = 24, 6
    x = torch.full((B, K), 7.0, dtype=torch.float64)
    rewards = torch.full((B, K), 99.0, dtype=torch.float64)  # a masked slot would win, if it were looked at
    mask = torch.zeros(B, K, dtype=torch.bool)
    rows = []
    for b in range(B):
        slots = sorted(random.sample(range(K), random.randint(2, K)))
        row = [random.gauss(0, 3) for _ in slots]
        scores = [float(random.randint(1, 4)) for _ in slots] if b else [2.0 for _ in slots]  # row 0: all tied
        x[b, slots], rewards[b, slots] = (torch.tensor(values, dtype=torch.float64) for values in (row, scores))
        mask[b, slots] = True
        rows.append((slots, row, scores))

    loss, gradient = loss_and_gradient(name, x, rewards, mask, alpha, beta)

    expected = torch.zeros(B, K, dtype=torch.float64)
    for b, (slots, row, scores) in enumerate(rows):
        assert loss[b].item() == pytest.approx(plain_loss(name, row, scores, alpha, beta), rel=1e-12, abs=1e-12)
        slope = plain_gradient(name, row, scores, alpha, beta)
        expected[b, slots] = torch.tensor(slope, dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


@every_objective
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_padding_changes_nothing(name: str, garbage: float) -> None:
    """Masked slots, whatever they hold, change neither loss nor gradient, and get no gradient themselves."""
    x, rewards = batch(5, 3, seed=1)
    loss, gradient = loss_and_gradient(name, x, rewards)

    padded_x, padded_rewards = (torch.full((5, 6), garbage, dtype=torch.float64) for _ in range(2))
    mask = torch.zeros(5, 6, dtype=torch.bool)
    slots = [1, 3, 4]  # padding before, between and after them
    padded_x[:, slots], padded_rewards[:, slots], mask[:, slots] = x, rewards, True
    padded_loss, padded_gradient = loss_and_gradient(name, padded_x, padded_rewards, mask)

    torch.testing.assert_close(padded_loss, loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(padded_gradient[:, slots], gradient, rtol=1e-14, atol=1e-16)
    assert (padded_gradient[~mask] == 0).all()


@every_objective
def test_order_of_responses_does_not_matter(name: str) -> None:
    """A permutation of the responses (no ties) leaves the loss and permutes the gradient."""
    x, rewards = batch(8, 5, seed=2)
    loss, gradient = loss_and_gradient(name, x, rewards)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted_loss, permuted_gradient = loss_and_gradient(name, x[:, order], rewards[:, order])
    torch.testing.assert_close(permuted_loss, loss, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(permuted_gradient, gradient[:, order], rtol=1e-13, atol=1e-13)


@every_objective
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_float32_holds_far_from_the_reference(name: str, alpha: float) -> None:
    """At |r| = 1e3, where exp overflows in float32, loss and gradient are finite and the loss is the right one."""
    signs = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1], [-1, -1, -1, 1]], dtype=torch.float32)
    rewards = torch.tensor([[4, 3, 2, 1]] * 3, dtype=torch.float32)
    loss, gradient = loss_and_gradient(name, 1e4 * signs, rewards, alpha=alpha, beta=0.1)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    expected = [plain_loss(name, row, [4, 3, 2, 1], alpha, 0.1) for row in (1e4 * signs).tolist()]
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@every_objective
@pytest.mark.parametrize("K", [2, 3, 4, 16, 64])
def test_any_number_of_responses(name: str, K: int) -> None:
    """The equation holds at every K, also where rewards run far apart (K = 64: 31.5)."""
    x, rewards = batch(4, K, seed=K)
    loss, _ = loss_and_gradient(name, x, rewards, alpha=2.0, beta=0.3)
    expected = [plain_loss(name, *row, 2.0, 0.3) for row in zip(x.tolist(), rewards.tolist(), strict=True)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


@soft_objectives
@pytest.mark.parametrize("alpha", [0.0, 1e-8, 1.0, 1e8])
def test_identical_rewards_give_uniform_labels(name: str, alpha: float) -> None:
    """Equal rewards: p_i = 1/K at every alpha, so NCA pulls to r = 0, InfoNCA to equal r, SFT to all alike."""
    x, _ = batch(3, 4, seed=3)
    _, gradient = loss_and_gradient(name, x, torch.full((3, 4), 7.0, dtype=torch.float64), alpha=alpha, beta=1.0)
    expected = {
        "nca": (2 * x.sigmoid() - 1) / 4,
        "infonca": x.softmax(-1) - 1 / 4,
        "weighted_sft": torch.full_like(x, -1 / 4),
    }[name]
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", PAIRED)
def test_identical_rewards_give_no_pair(name: str) -> None:
    """Equal rewards: no response beats another, so the paired objectives have loss 0 and no gradient."""
    x, _ = batch(3, 4, seed=4)
    loss, gradient = loss_and_gradient(name, x, torch.full((3, 4), 7.0, dtype=torch.float64))
    assert (loss == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", PAIRED)
def test_paired_objectives_see_only_the_order_of_rewards(name: str) -> None:
    """Any increasing map of the rewards leaves the loss; swapping best and worst changes it."""
    x, rewards = batch(6, 4, seed=5)
    loss, _ = loss_and_gradient(name, x, rewards)
    assert torch.equal(loss_and_gradient(name, x, rewards.exp() - 100)[0], loss)
    assert not torch.isclose(loss_and_gradient(name, x, -rewards)[0], loss).any()


@soft_objectives
def test_alpha_zero_is_the_limit(name: str) -> None:
    """With reward gaps of 0.5 or more, |L(alpha) - L(0)| shrinks like exp(-0.5 / alpha) and is gone at 1e-8."""
    x, rewards = batch(6, 4, seed=6)
    at_zero, gradient_at_zero = loss_and_gradient(name, x, rewards, alpha=0.0)
    scale = 10 * x.abs().max().item()
    previous = math.inf
    for alpha in (0.2, 0.1, 0.05, 0.02):
        loss, _ = loss_and_gradient(name, x, rewards, alpha=alpha)
        gap = (loss - at_zero).abs().max().item()
        assert 0 < gap < min(previous, scale * math.exp(-0.5 / alpha))
        previous = gap
    loss, gradient = loss_and_gradient(name, x, rewards, alpha=1e-8)
    assert torch.equal(loss, at_zero)
    assert torch.equal(gradient, gradient_at_zero)


@soft_objectives
def test_huge_alpha_forgets_the_rewards(name: str) -> None:
    """alpha -> infinity: the loss tends to that of equal rewards."""
    x, rewards = batch(6, 4, seed=7)
    equal, _ = loss_and_gradient(name, x, torch.zeros_like(rewards))
    torch.testing.assert_close(loss_and_gradient(name, x, rewards, alpha=1e12)[0], equal, rtol=1e-10, atol=1e-10)


def test_labels_by_hand() -> None:
    """softmax(reward / alpha): ties share at alpha = 0, a near-tie is no tie, and e^(ln 3) : 1 = 3 : 1."""
    mask = torch.tensor([[True, True, True, False]])
    tied = torch.tensor([[3.0, 1.0, 3.0, 5.0]])
    assert soft_labels(tied, mask, 0.0).tolist() == [[0.5, 0.0, 0.5, 0.0]]
    assert soft_labels(tied, mask, 1e-8).tolist() == [[0.5, 0.0, 0.5, 0.0]]
    near = torch.tensor([[3.0, 1.0, 3.0 - 2.0**-20, 5.0]])
    assert soft_labels(near, mask, 0.0).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    # A reward gap far below alpha leaves the two alike: alpha = 1e-4 is not yet the limit.
    assert soft_labels(near, mask, 1e-4)[0, 2].item() == pytest.approx(1 / (1 + math.exp(2.0**-20 / 1e-4)), rel=1e-5)
    odds = torch.tensor([[2 * math.log(3.0), 0.0, 0.0, 5.0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.2, 0.2, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(soft_labels(odds, mask, 2.0), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("shift", [-64.0, 2.0**15, -(2.0**20)])
def test_reward_shift_leaves_labels(alpha: float, shift: float) -> None:
    """softmax((reward + c) / alpha) = softmax(reward / alpha), bit for bit where reward + c is exact in float32."""
    rewards = torch.tensor([[1.0, 2.5, 2.0], [4.0, 1.0, 4.0]])
    mask = torch.ones_like(rewards, dtype=torch.bool)
    p = soft_labels(rewards, mask, alpha)
    assert torch.equal(soft_labels(rewards + shift, mask, alpha), p)
    expected = [labels(row, alpha) for row in rewards.tolist()]
    torch.testing.assert_close(p, torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_huge_rewards_do_not_overflow() -> None:
    """Rewards of 1e30 and tiny alpha still give labels: the best response, or its ties."""
    rewards = torch.tensor([[1e30, 3e30, 2e30], [-1e30, -1e30, -2e30]])
    mask = torch.ones_like(rewards, dtype=torch.bool)
    for alpha in (0.0, 1e-8, 1.0):
        assert soft_labels(rewards, mask, alpha).tolist() == [[0, 1, 0], [0.5, 0.5, 0]]


@soft_objectives
def test_negative_alpha_is_refused(name: str) -> None:
    """A temperature below 0 would reward the worst response: ValueError."""
    x, rewards = batch(1, 2, seed=8)
    with pytest.raises(ValueError, match="alpha"):
        loss_and_gradient(name, x, rewards, alpha=-1.0)


@pytest.mark.parametrize(("name", "loss_type"), [("dpo", "sigmoid"), ("nca_pair", "nca_pair"), ("ipo", "ipo")])
def test_agrees_with_trl(name: str, loss_type: str) -> None:
    """On pairs, loss and gradient are those of TRL's DPOTrainer with the same loss_type.

    Its private `_compute_loss` is called on a stub, with a "model" that hands out the log-probabilities. Responses
    have one token: TRL's IPO divides log-ratios by the response length, ours (and the IPO paper) do not."""
    DPOTrainer = pytest.importorskip("trl").DPOTrainer
    B, beta = 8, 0.3
    log_mu = -20 + torch.randn(2, B, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x, _ = batch(B, 2, seed=9)
    rewards = torch.tensor([[2.0, 1.0]] * B, dtype=torch.float64)  # chosen, rejected
    loss, gradient = loss_and_gradient(name, x, rewards, beta=beta)

    log_pi = (log_mu + x.T).reshape(2 * B, 1).requires_grad_()  # TRL's batch: all chosen, then all rejected
    zeros = torch.zeros(2 * B, 1)
    outputs = SimpleNamespace(log_probs=log_pi, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t),
        aux_loss_enabled=False, use_weighting=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0], beta=beta, label_smoothing=0.0,
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    prompt_and_response = torch.tensor([[0, 1]] * 2 * B)
    inputs = {
        "input_ids": prompt_and_response,
        "completion_mask": prompt_and_response,
        "ref_chosen_logps": log_mu[0],
        "ref_rejected_logps": log_mu[1],
    }
    trl_loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    trl_loss.backward()

    torch.testing.assert_close(loss.mean(), trl_loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient / B, log_pi.grad.reshape(2, B).T, rtol=1e-10, atol=1e-14)
