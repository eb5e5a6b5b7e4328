"""How the figures look: one style, told apart by the colour-blind and in grey."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from data_prep.files import InputError
from eval.curves import SIDES, Curve, Run, pooled
from eval.points import Point, half_widths
from eval.records import METHODS, REGIMES

# Okabe and Ito's colours, told apart by the colour-blind; dashes and markers tell them apart in grey.
STYLES = {
    "sft_best": ("#999999", (0, (1, 1)), "x"),
    "kto": ("#CC79A7", (0, (4, 1)), "v"),
    "ipo": ("#F0E442", (0, (4, 1, 1, 1)), "^"),
    "dpo": ("#D55E00", "solid", "s"),
    "dpo_x3": ("#E69F00", (0, (5, 2)), "D"),
    "nca_pair": ("#56B4E9", (0, (5, 2)), "P"),
    "infonca": ("#009E73", "solid", "^"),
    "nca": ("#0072B2", "solid", "o"),
}
# Ranks are ordered, and so are their colours: cividis, from dark (the best) to light.
PAPER_DASHES = {"dpo": (0, (1, 1.5)), "nca_pair": (0, (3, 1.2, 1, 1.2, 1, 1.2))}
RANK_DASHES, RANK_MARKERS = ("solid", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1))), "os^D"
CORRECTED = ("Paper: Figure 2, digitised (Mistral-7B, UltraFeedback pairs). It plots NCA's chosen line doubled; "
             "here it is margin + rejected.")  # fmt: skip


def style() -> None:
    """One style for all figures."""
    matplotlib.rcParams.update({"svg.hashsalt": "trend", "font.size": 9, "axes.spines.top": False,
                                "axes.spines.right": False})  # fmt: skip


def ordered(found: Iterable[str], first: Iterable[str]) -> list[str]:
    """Names in the order of `first`, then the others as they come."""
    names = list(dict.fromkeys(found))
    known = [name for name in first if name in names]
    return known + [name for name in names if name not in known]


def line(axis: Any, curve: Curve, look: tuple[Any, Any, str], label: str) -> None:
    """A curve with the range of its seeds."""
    place, mean, low, high = zip(*curve, strict=True)
    color, dashes, marker = look
    axis.plot(place, mean, color=color, linestyle=dashes, marker=marker, markersize=3.5, label=label)
    axis.fill_between(place, low, high, color=color, alpha=0.15, linewidth=0)


def lay_paper(axis: Any, side: str, paper: dict[tuple[str, str], list[tuple[float, float]]]) -> None:
    """The published curves of a side."""
    for (method, of), points in paper.items():
        if of == side:
            share, r = zip(*points, strict=True)
            axis.plot(share, r, color=STYLES[method][0], linestyle=PAPER_DASHES[method], linewidth=2,
                      label=f"{METHODS[method]}, paper (7B)")  # fmt: skip


def finish(figure: Any, axes: Any, paper: object) -> Any:
    """Legend and layout."""
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    if paper:
        figure.text(0.01, 0.005, CORRECTED, fontsize=7, color="#444444")
    figure.tight_layout(rect=(0, 0.02 if paper else 0, 1, 1))
    return figure


def draw(
    found: dict[tuple[str, str, str], Curve],
    unit: str,
    paper: dict[tuple[str, str], list[tuple[float, float]]] | None,
) -> Any:
    """The likelihood trend of a results folder: sides by regimes."""
    style()
    regimes = ordered((key[0] for key in found), REGIMES)
    figure, axes = pyplot.subplots(
        len(SIDES), len(regimes), figsize=(4.6 * len(regimes), 6.4), sharex=True, sharey="row", squeeze=False
    )
    for (column, regime), (row, side) in itertools.product(enumerate(regimes), enumerate(SIDES)):
        axis = axes[row][column]
        axis.axhline(0, color="black", linewidth=0.8)
        for method, label in METHODS.items():
            if (regime, method, side) in found and (not paper or (method, side) in paper):
                line(axis, found[regime, method, side], STYLES[method], label)
        lay_paper(axis, side, paper or {})
        axis.set_title(f"{side}, {regime} regime")
        axis.set_xlabel("share of training" if row == len(SIDES) - 1 else "")
        axis.set_ylabel(unit if column == 0 else "")
    return finish(figure, axes, paper)


def looks(runs: Sequence[Run]) -> dict[str, tuple[Any, Any, str]]:
    """A look for each label: its method's where that is still free, else one that is; InputError beyond eight."""
    found: dict[str, tuple[Any, Any, str]] = {}
    methods = {run.label: run.method for run in runs}
    free = dict(STYLES)
    for label in sorted(methods, key=lambda label: methods[label] not in STYLES):
        if not free:
            raise InputError(f"{len(methods)} lines: more than {len(STYLES)} cannot be told apart; name fewer runs")
        method = methods[label] if methods[label] in free else next(iter(free))
        found[label] = free.pop(method)
    return {label: found[label] for label in methods}


def draw_runs(runs: Sequence[Run], unit: str, paper: dict[tuple[str, str], list[tuple[float, float]]] | None) -> Any:
    """The likelihood trend of any runs: one panel for each side."""
    style()
    figure, axes = pyplot.subplots(1, len(SIDES), figsize=(9.6, 3.8), squeeze=False)
    for column, side in enumerate(SIDES):
        axis = axes[0][column]
        axis.axhline(0, color="black", linewidth=0.8)
        for label, look in looks(runs).items():
            line(axis, run_curve(runs, label, column, paper is not None), look, label)
        lay_paper(axis, side, paper or {})
        axis.set_title(side)
        axis.set_xlabel("share of training" if paper else "step")
        axis.set_ylabel(unit if column == 0 else "")
    return finish(figure, axes, paper)


def run_curve(runs: Sequence[Run], label: str, side: int, shares: bool) -> Curve:
    """The curve of the runs with a label, over steps or shares of training."""
    lines = []
    for run in runs:
        if run.label == label:
            steps, *values = zip(*run.points, strict=True)
            lines.append(([step / run.steps for step in steps] if shares else steps, values[side]))
    return pooled(lines)


def draw_ranks(found: dict[tuple[str, str, str], Curve], unit: str) -> Any:
    """Each of the K responses, by rank of reward: a panel for each method and regime."""
    style()
    panels = [(regime, method) for regime in ordered((key[0] for key in found), REGIMES)
              for method in ordered((key[1] for key in found if key[0] == regime), METHODS)]  # fmt: skip
    ranks = sorted({int(key[2]) for key in found})
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(2.6 * columns + 1.6, 2.3 * rows + 0.4), sharex=True, sharey=True, squeeze=False
    )
    colors = matplotlib.colormaps["cividis"]
    for place, (axis, panel) in enumerate(itertools.zip_longest(axes.flat, panels)):
        if panel is None:
            axis.set_axis_off()
            continue
        axis.axhline(0, color="black", linewidth=0.8)
        for i, rank in enumerate(ranks):
            if (*panel, str(rank)) in found:
                look = (colors(0.85 * i / max(len(ranks) - 1, 1)), RANK_DASHES[i % 4], RANK_MARKERS[i % 4])
                line(axis, found[*panel, str(rank)], look, f"rank {rank}{' (best)' if rank == 1 else ''}")
        axis.set_title(f"{METHODS.get(panel[1], panel[1])}, {panel[0]}", fontsize=9)
        axis.set_xlabel("share of training" if place + columns >= len(panels) else "", fontsize=8)
        axis.set_ylabel(unit if place % columns == 0 else "", fontsize=8)
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    figure.tight_layout()
    return figure


def draw_ablation(found: Sequence[Point], kind: str, score: str) -> Any:
    """Score against KL ("kl": a line for each method and alpha, over beta) or K ("responses"): regimes side by side."""
    style()
    regimes = ordered((point.regime for point in found), REGIMES)
    figure, axes = pyplot.subplots(1, len(regimes), figsize=(4.6 * len(regimes) + 1.6, 3.8), sharey=True, squeeze=False)
    alphas = sorted({point.alpha for point in found if point.alpha is not None}) if kind == "kl" else []
    methods = ordered((point.method for point in found), METHODS)
    for axis, regime in zip(axes[0], regimes, strict=True):
        for (beside, method), alpha in itertools.product(enumerate(methods), [None, *alphas]):
            of = [point for point in found if (point.regime, point.method, point.alpha) == (regime, method, alpha)]
            if not of:
                continue
            color, dashes, marker = STYLES[method]
            label, fill = METHODS[method], color
            if alpha is not None:
                dashes, label = RANK_DASHES[alphas.index(alpha) % 4], f"{label}, alpha {alpha:g}"
                fill = color if alpha == alphas[0] else "white"
            if kind == "kl":
                place = [point.kl.value for point in of]
            else:  # a little beside each other, so that no bar hides another
                place = [point.responses + 0.04 * (beside - (len(methods) - 1) / 2) for point in of]
            values = [point.score.value for point in of]
            bars = list(zip(*(half_widths(point.score) for point in of), strict=True))
            axis.errorbar(place, values, yerr=bars, color=color, marker=marker, linestyle=dashes, markersize=5,
                          capsize=2, elinewidth=0.8, markerfacecolor=fill, label=label)  # fmt: skip
            for x, y, point in zip(place, values, of, strict=True) if kind == "kl" else ():
                axis.annotate(f"{point.beta:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        notes = [f"{regime} regime"] * bool(regime) + ["small numbers: beta"] * (kind == "kl")
        axis.set_title("; ".join(notes))
        axis.set_xlabel("KL(pi || mu), nats a response" if kind == "kl" else "K, responses to a prompt")
        if kind == "responses":
            axis.set_xticks(sorted({point.responses for point in found}))
    axes[0][0].set_ylabel(score)
    return finish(figure, axes, None)


def close(figure: Any) -> None:
    """Free a figure that is written."""
    pyplot.close(figure)
