"""The theorems on InfoNCA and NCA, in a world small enough to enumerate: no sampling, no SGD.

A prompt has M possible responses y with reference probability mu(y) and a reward. The K responses of a row are
drawn i.i.d. from mu, so the population loss of a free table x(y) = log pi(y) - log mu(y) is the finite sum

    L(x) = sum over multisets c of K responses:  K! prod_y mu(y)^c_y / c_y!  *  loss(x at the K responses of c),

taken here with the repository's own losses and minimised by Newton's method in float64. With r = beta * x:

    InfoNCA       r(y) = reward(y) / alpha + C  for every K
    NCA           r(y) = log w_K(y),  w_K(y) = K E[ p_1 | y_1 = y ],  sum_y mu(y) w_K(y) = 1
    NCA, K = inf  r(y) = reward(y) / alpha - log E_mu exp(reward / alpha)

    python -m eval.theory --out DIR
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path

import torch
from torch import Tensor

from data_prep.files import run_command, write_text
from train.infonca import infonca_loss
from train.nca import nca_loss
from train.sft_best import weighted_sft_loss


@dataclass(frozen=True)
class World:
    """One prompt with M possible responses."""

    name: str
    mu: Tensor  # [M] probability of each response under the reference policy
    rewards: Tensor  # [M]
    alpha: float

    @property
    def scaled(self) -> Tensor:
        """reward / alpha, [M]."""
        return self.rewards / self.alpha

    @property
    def limit(self) -> Tensor:
        """The optimum of NCA at K = infinity, reward / alpha - log E_mu exp(reward / alpha), [M]."""
        return self.scaled - (self.mu.log() + self.scaled).logsumexp(-1)


float64 = partial(torch.tensor, dtype=torch.float64)
WORLDS = (
    World("even", mu=float64([0.5, 0.3, 0.2]), rewards=float64([2.0, 4.0, 6.0]), alpha=2.0),
    World("rare best", mu=float64([0.9, 0.09, 0.01]), rewards=float64([2.0, 4.0, 14.0]), alpha=2.0),
)
KS = (2, 4, 16, 64)
BETAS = (1.0, 0.5, 0.1)
Key = tuple[str, str, str, str, str]  # world, objective, K, quantity, outcome: a response, or the `max` or `sum` of all
INFONCA, NCA, GAP = "|r - reward/alpha - C|", "|r - log w_K|", "|r - r at K = inf|"
LAW, SFT, SUM = "|mu exp(r) - law of keep-one|", "|pi - mu exp(r) of NCA|", "mu exp(r/beta) at beta {}"


def draws(world: World, K: int) -> tuple[Tensor, Tensor]:
    """Every multiset of K responses, as indices [N, K], and its probability [N] under K i.i.d. draws from mu."""
    multisets = list(combinations_with_replacement(range(len(world.mu)), K))
    counts = float64([[multiset.count(y) for y in range(len(world.mu))] for multiset in multisets])
    log_multinomial = math.lgamma(K + 1) - (counts + 1).lgamma().sum(-1)
    return torch.tensor(multisets), (log_multinomial + counts @ world.mu.log()).exp()


def population_loss(world: World, K: int, loss: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """L(x), the mean of `loss` over all draws of K responses, as a function of the table x [M] of log-ratios."""
    responses, probability = draws(world, K)
    rewards, mask = world.rewards[responses], torch.ones_like(responses, dtype=torch.bool)
    return lambda x: (probability * loss(x[responses], rewards, mask, alpha=world.alpha)).sum()


def minimise(function: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """The minimiser [size] of a convex function: damped Newton from 0 until the gradient norm is below 1e-12."""
    gradient = torch.func.grad(function)
    x = torch.zeros(size, dtype=torch.float64)
    for _ in range(100):
        slope = gradient(x)
        if slope.norm() < 1e-12:
            return x
        # InfoNCA is flat along a common shift of x: the pseudo-inverse takes no step in that direction.
        inverse = torch.linalg.pinv(torch.autograd.functional.hessian(function, x), rtol=1e-12, hermitian=True)
        step = -inverse @ slope
        # The part of the step to take: at most 3, as the losses are flat far out; then halved until the slope
        # shrinks by a quarter of what Newton promises.
        part = min(1.0, 3 / step.abs().max().item())
        while gradient(x + part * step).norm() > (1 - part / 4) * slope.norm() and part > 1e-6:
            part /= 2
        x = x + part * step
    raise RuntimeError(f"no minimum found: gradient norm {slope.norm():.1e} after 100 Newton steps")


def w_K(world: World, K: int) -> Tensor:
    """w_K(y) = E[ K e^{s(y)} / (e^{s(y)} + sum over K - 1 draws of e^s) ], s = reward / alpha: [M].

    It enumerates the K - 1 other responses and uses no loss, so it is independent of the minimiser of NCA."""
    others, probability = draws(world, K - 1)
    weights = world.scaled.exp()
    return torch.stack([(probability * K * w / (w + weights[others].sum(-1))).sum() for w in weights])


def keep_one(world: World, K: int) -> Tensor:
    """The law [M] of the response kept when K are drawn from mu and one is kept by softmax(reward / alpha)."""
    responses, probability = draws(world, K)
    kept = probability[:, None] * world.scaled[responses].softmax(-1)  # [N, K]
    return torch.zeros_like(world.mu).index_add(0, responses.flatten(), kept.flatten())


def measure(world: World) -> dict[Key, float]:
    """Every optimum of one world, and its distance from what the theorems say."""
    values: dict[Key, float] = {}

    def largest(objective: str, K: int, quantity: str, numbers: Tensor) -> None:
        values[world.name, objective, str(K), quantity, "max"] = numbers.max().item()

    def each(objective: str, K: int | str, quantity: str, numbers: Tensor) -> None:
        for i, number in enumerate(numbers.tolist(), start=1):
            values[world.name, objective, str(K), quantity, f"y{i}"] = number

    M = len(world.mu)
    each("nca", "inf", "optimal r", world.limit)
    for K in KS:
        constant = minimise(population_loss(world, K, partial(infonca_loss, beta=1.0)), M) - world.scaled
        largest("infonca", K, INFONCA, (constant - constant.mean()).abs())

        r = minimise(population_loss(world, K, partial(nca_loss, beta=1.0)), M)
        each("nca", K, "optimal r", r)
        largest("nca", K, "optimal r", r)
        largest("nca", K, NCA, (r - w_K(world, K).log()).abs())
        largest("nca", K, GAP, (r - world.limit).abs())
        largest("nca", K, LAW, (world.mu * r.exp() - keep_one(world, K)).abs())
        for beta in BETAS:
            x = minimise(population_loss(world, K, partial(nca_loss, beta=beta)), M)
            values[world.name, "nca", str(K), SUM.format(beta), "sum"] = (world.mu * x.exp()).sum().item()

        sft = population_loss(world, K, weighted_sft_loss)
        logits = minimise(lambda logits, sft=sft: sft(logits.log_softmax(-1) - world.mu.log()), M)
        largest("weighted_sft", K, SFT, (logits.softmax(-1) - world.mu * r.exp()).abs())
    return values


def csv(values: dict[Key, float]) -> str:
    """theory.csv. Eight digits, nine decimals at most: the rest is rounding error, which differs between machines."""
    lines = [",".join((*key, f"{round(value, 9) + 0.0:.8g}")) for key, value in values.items()]  # + 0.0: no -0
    return "\n".join(["world,objective,K,quantity,outcome,value", *lines]) + "\n"


def markdown(values: dict[Key, float]) -> str:
    """theory.md: the optimum of NCA for each world and K, and what the numbers say of every objective."""

    def error(quantity: str, target: float = 0.0) -> str:
        largest = max(abs(value - target) for key, value in values.items() if key[3] == quantity)
        return f"largest error {'below 1e-9' if largest < 1e-9 else f'{largest:.2g}'}"

    head = ["world", "K", "max r", "log K", "max gap to K = inf", *(f"sum of {SUM.format(beta)}" for beta in BETAS)]
    lines = ["Made by `python -m eval.theory --out DIR`.", "", "The optimum r of the population NCA loss:", ""]
    lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    notes = [
        f"- InfoNCA: r = reward/alpha + C at every K ({error(INFONCA)}).",
        f"- NCA: r = log w_K(y), w_K(y) = K E[p_1 | y_1 = y] ({error(NCA)}), so r cannot pass log K.",
    ]
    for world in WORLDS:
        nca = {key[2:]: value for key, value in values.items() if key[:2] == (world.name, "nca")}
        for K in map(str, KS):
            cells = [nca[K, "optimal r", "max"], math.log(int(K)), nca[K, GAP, "max"]]
            cells += [nca[K, SUM.format(beta), "sum"] for beta in BETAS]
            lines.append(f"| {world.name} | {K} | {' | '.join(f'{cell:.4g}' for cell in cells)} |")
        notes.append(
            f"- In '{world.name}' the gap of NCA to reward/alpha - log E_mu exp(reward/alpha) is "
            f"{nca[str(KS[0]), GAP, 'max']:.2g} at K = {KS[0]} and {nca[str(KS[-1]), GAP, 'max']:.2g} at K = {KS[-1]}; "
            f"one response carries {(world.mu * world.limit.exp()).max():.0%} of that expectation."
        )
    notes += [
        f"- At beta = 1, mu exp(r) of NCA sums to 1 ({error(SUM.format(1.0), 1.0)}). It is the law of 'draw K from mu, "
        f"keep one by softmax(reward/alpha)' ({error(LAW)}) and the optimum of SFT weighted by p ({error(SFT)}).",
        "- At beta < 1, mu exp(r/beta) sums to more than 1: no normalised policy has the free optimum of NCA.",
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for theory.csv and theory.md")
    out = parser.parse_args().out
    values = {key: value for world in WORLDS for key, value in measure(world).items()}
    write_text(out / "theory.csv", csv(values))
    write_text(out / "theory.md", markdown(values))


if __name__ == "__main__":
    run_command(main)
