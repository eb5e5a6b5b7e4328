"""The likelihood trend as a figure, from trend.jsonl alone.

    python -m eval.figures --trend results/tiny/trend.jsonl --out results/tiny/likelihood_trend [--paper CSV]

One column for each regime; above, the chosen response (best of its prompt), below, the rejected ones. A line is
the mean over seeds, its band their range. With --paper the published curves of Figure 2 are laid over it, both in
units of the learned reward r = beta * (log pi - log mu). Writes OUT.png, OUT.svg and OUT.csv.
"""

import argparse
import csv
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy

matplotlib.use("Agg")
from matplotlib import pyplot

from data_prep.files import InputError, read_jsonl, run_command, write_text
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
SIDES = ("chosen", "rejected")
PAPER_COLUMNS = {  # of results/paper/figure2_likelihood.csv
    ("dpo", "chosen"): "dpo_chosen",
    ("dpo", "rejected"): "dpo_rejected",
    ("nca_pair", "chosen"): "nca_chosen_implied_by_margin",
    ("nca_pair", "rejected"): "nca_rejected",
}
Curve = list[tuple[float, float, float, float]]  # share of training, mean, lowest and highest seed


def curves(records: list[dict[str, Any]], quantity: str) -> dict[tuple[str, str, str], Curve]:
    """(regime, method, side) to its curve over training, from held-out records.

    Seeds can differ in their number of steps (a prompt with all rewards tied gives no pair): each is taken as a
    share of its own training, at the shares of the first seed, with straight lines between measurements.
    """
    seeds: dict[tuple[str, str, str], dict[int, list[tuple[int, float]]]] = {}
    for record in records:
        if record["split"] == "heldout":
            for side in SIDES:
                points = seeds.setdefault((record["regime"], record["method"], side), {})
                points.setdefault(record["seed"], []).append((record["step"], record[side][quantity]))
    found = {}
    for key, of_seed in seeds.items():
        lines = []
        for seed in sorted(of_seed):
            steps, values = numpy.array(sorted(of_seed[seed])).T
            lines.append((steps / steps[-1], values))
        grid = lines[0][0]
        at_grid = numpy.array([numpy.interp(grid, shares, values) for shares, values in lines])
        found[key] = list(zip(grid, at_grid.mean(0), at_grid.min(0), at_grid.max(0), strict=True))
    return found


def read_paper(path: Path) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The published curves: (method, side) to [(share of training, r)]."""
    if not path.exists():
        raise InputError(f"{path}: no such file; the published curves are in results/paper/")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    if not rows:
        raise InputError(f"{path}: not the digitised Figure 2 (no rows)")
    try:
        return {
            key: [(float(row["epoch_fraction"]), float(row[column])) for row in rows]
            for key, column in PAPER_COLUMNS.items()
        }
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not the digitised Figure 2 ({error})") from None


def draw(
    found: dict[tuple[str, str, str], Curve],
    unit: str,
    paper: dict[tuple[str, str], list[tuple[float, float]]] | None,
) -> Any:
    """The figure: sides by regimes."""
    matplotlib.rcParams.update({"svg.hashsalt": "trend", "font.size": 9, "axes.spines.top": False,
                                "axes.spines.right": False})  # fmt: skip
    regimes = [regime for regime in REGIMES if any(key[0] == regime for key in found)]
    figure, axes = pyplot.subplots(
        len(SIDES), len(regimes), figsize=(4.6 * len(regimes), 6.4), sharex=True, sharey="row", squeeze=False
    )
    for column, regime in enumerate(regimes):
        for row, side in enumerate(SIDES):
            axis = axes[row][column]
            axis.axhline(0, color="black", linewidth=0.8)
            for method, label in METHODS.items():
                if (regime, method, side) not in found or (paper and (method, side) not in paper):
                    continue
                share, mean, low, high = zip(*found[regime, method, side], strict=True)
                color, dashes, marker = STYLES[method]
                axis.plot(share, mean, color=color, linestyle=dashes, marker=marker, markersize=3.5, label=label)
                axis.fill_between(share, low, high, color=color, alpha=0.15, linewidth=0)
            for (method, of), points in (paper or {}).items():
                if of == side:
                    share, r = zip(*points, strict=True)
                    axis.plot(share, r, color=STYLES[method][0], linestyle=(0, (1, 1.5)), linewidth=2,
                              label=f"{METHODS[method]}, paper (7B)")  # fmt: skip
            axis.set_title(f"{side}, {regime} regime")
            axis.set_xlabel("share of training" if row == len(SIDES) - 1 else "")
            axis.set_ylabel(unit if column == 0 else "")
    axes[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    figure.tight_layout()
    return figure


def curves_csv(found: dict[tuple[str, str, str], Curve]) -> str:
    """The data of the figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["regime", "method", "side", "share_of_training", "mean", "lowest_seed", "highest_seed"])
    for key, curve in sorted(found.items()):
        writer.writerows([*key, *(f"{number:.6f}" for number in point)] for point in curve)
    return text.getvalue()


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(prog="python -m eval.figures")
    parser.add_argument("--trend", required=True, type=Path, help="trend.jsonl with the records of several runs")
    parser.add_argument("--out", required=True, type=Path, help="path of the figure, without its ending")
    parser.add_argument("--paper", type=Path, help="digitised Figure 2, to lay over the runs on pairs")
    arguments = parser.parse_args()
    records = [record for _, record in read_jsonl(arguments.trend)]
    if not records:
        raise InputError(f"{arguments.trend}: no records")
    paper = read_paper(arguments.paper) if arguments.paper else None
    found = curves(records, "r" if paper else "log_ratio")
    unit = "r = beta (log pi - log mu)" if paper else "log pi - log mu, nats a response"
    figure = draw(found, unit, paper)
    figure.savefig(arguments.out.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(arguments.out.with_suffix(".svg"), metadata={"Date": None})
    write_text(arguments.out.with_suffix(".csv"), curves_csv(found))
    print(f"{arguments.out}.png, .svg, .csv: written")


if __name__ == "__main__":
    run_command(main)
