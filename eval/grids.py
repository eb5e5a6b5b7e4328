"""The grids of Figures 4 and 6: which runs there are, at each scale. The paper's own grids are not known.

Policies are named METHOD-REGIME-kK or METHOD-REGIME-aALPHA-bBETA in score and trend records; the regime of the paper's
scale is the kind of its data. Pairs have no soft labels: theirs is the limit alpha = 0.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Point:
    """One run. policy: its name in the records. run: its folder, which scripts/train_mistral7b.sh names."""

    policy: str
    run: str
    method: str
    data: str  # reward (K scored responses) or preference (pairs)
    k: int
    alpha: float
    beta: float


# Of the hard regime; its recipe has alpha 1 and beta 0.5.
TINY_ALPHAS, TINY_BETAS, TINY_DEFAULT = (0.3, 1.0, 3.0), (0.1, 0.5), (1.0, 0.5)
# Of scripts/train_mistral7b.sh; the recipe has alpha 0.01 and beta 0.01.
ALPHAS, BETAS, DEFAULT = (0.01, 0.1, 1.0), (0.003, 0.01, 0.03, 0.1), (0.01, 0.01)
RESPONSES = (2, 3, 4)


def figure4(scale: str) -> list[Point]:
    """The best response and 1, 2 or 3 others, at the default alpha and beta."""
    points = []
    for method in ("nca", "infonca"):
        for k in RESPONSES:
            policy = f"{method}-{'hard' if scale == 'tiny' else 'reward'}-k{k}"
            run = policy if scale == "tiny" else method if k == 4 else f"{method}-K{k}"  # K = 4 is the run of Table 2
            points.append(Point(policy, run, method, "reward", k, *(TINY_DEFAULT if scale == "tiny" else DEFAULT)))
    return points


def figure6(scale: str) -> list[Point]:
    """On pairs (left) over beta, on K = 4 rewards (right) over alpha and beta; the latter is Figure 4, right, too."""
    points = []
    alphas, betas = (TINY_ALPHAS, TINY_BETAS) if scale == "tiny" else (ALPHAS, BETAS)
    for method in ("dpo", "nca_pair", "nca", "infonca"):
        data = "preference" if method in ("dpo", "nca_pair") else "reward"
        for alpha in alphas if data == "reward" else (0.0,):
            for beta in betas:
                policy = f"{method}-{'hard' if scale == 'tiny' else data}-a{alpha:g}-b{beta:g}"
                run = f"{method}-alpha{alpha:g}-beta{beta:g}" if data == "reward" else f"{method}-beta{beta:g}"
                run = policy if scale == "tiny" else run.replace("_", "-")
                points.append(Point(policy, run, method, data, 4 if data == "reward" else 2, alpha, beta))
    return points


GRIDS = {"figure4": figure4, "figure6": figure6}
