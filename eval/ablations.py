"""The grids of Figures 4 and 6: which runs there are, at each scale. The paper's own grids are not known."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Point:
    """One run. data: `reward` (K scored responses) or `preference` (pairs). alpha: None where there is none."""

    policy: str  # its name, in score and trend records
    method: str
    data: str
    k: int
    alpha: float | None
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
            if scale == "tiny":
                points.append(Point(f"{method}-hard-k{k}", method, "reward", k, *TINY_DEFAULT))
            else:  # K = 4 is the run of Table 2
                points.append(Point(method if k == 4 else f"{method}-K{k}", method, "reward", k, *DEFAULT))
    return points


def figure6(scale: str) -> list[Point]:
    """On pairs (left) over beta, on K = 4 rewards (right) over alpha and beta; the latter is Figure 4, right, too."""
    points = []
    alphas, betas = (TINY_ALPHAS, TINY_BETAS) if scale == "tiny" else (ALPHAS, BETAS)
    for method in ("dpo", "nca_pair"):
        for beta in betas:
            name = f"{method}-hard-b{beta:g}" if scale == "tiny" else f"{method.replace('_', '-')}-beta{beta:g}"
            points.append(Point(name, method, "preference", 2, None, beta))
    for method in ("nca", "infonca"):
        for alpha in alphas:
            for beta in betas:
                tiny = f"{method}-hard-a{alpha:g}-b{beta:g}"
                name = tiny if scale == "tiny" else f"{method}-alpha{alpha:g}-beta{beta:g}"
                points.append(Point(name, method, "reward", 4, alpha, beta))
    return points


GRIDS = {"figure4": figure4, "figure6": figure6}
