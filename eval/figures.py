"""The figures, from records alone. Each is OUT.png, OUT.svg and its data as OUT.csv.

    python -m eval.figures trend RUN [RUN ...] --out OUT [--paper CSV] [--quantity NAME]
        the likelihood of chosen and rejected responses over training, one line for each run (or the mean and range
        of its seeds). RUN is a run directory, a trend.jsonl, a Trainer's trainer_state.json or a .csv (eval.curves)
    python -m eval.figures --trend results/tiny/trend.jsonl --out OUT [--paper CSV]
        the same for a results folder: one column for each regime
    python -m eval.figures ranks RUN [RUN ...] --out OUT [--quantity NAME]
        each of the K responses over training, by rank of reward; one panel for each method and regime
    python -m eval.figures kl RESULTS --out OUT          score against KL(pi || mu) over alpha and beta
    python -m eval.figures responses RESULTS --out OUT   score against K
        from an ablation's records (eval.points)

A line over training is the mean over seeds, its band their range; a bar is a 95 % interval. With --paper the
published curves of Figure 2 are laid over it, all in units of the learned reward r = beta * (log pi - log mu) and
over the share of training. That figure plots NCA's chosen line at twice its margin + rejected, and twice the end
value of the authors' model card; here it is drawn at margin + rejected (results/paper/figure2_likelihood.csv).
"""

import argparse
import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_prep.files import InputError, atomic_path, run_command, write_text
from eval.curves import QUANTITIES, SIDES, Curve, Run, curves, rank_curves, read_paper, read_runs, read_trend
from eval.drawing import close, draw, draw_ablation, draw_ranks, draw_runs
from eval.points import Point, over_responses, over_strength, points
from eval.records import Results


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """CSV: floats with six decimals, NaN and None as empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        cells = ["" if cell is None or cell != cell else cell for cell in row]
        writer.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells])
    return text.getvalue()


def curves_csv(found: dict[tuple[str, str, str], Curve], last: str = "side") -> str:
    """The data of a figure over training."""
    head = ["regime", "method", last, "share_of_training", "mean", "lowest_seed", "highest_seed"]
    return table(head, ([*key, *map(float, point)] for key, curve in sorted(found.items()) for point in curve))


def runs_csv(runs: Sequence[Run], quantity: str) -> str:
    """The data of a figure of any runs, every seed by itself: what `trend` reads as a source again."""
    head = ["step", "method", *SIDES, "seed", "share_of_training", "quantity"]
    return table(head, ([float(step), run.label, float(chosen), float(rejected), run.seed, step / run.steps, quantity]
                        for run in runs for step, chosen, rejected in run.points))  # fmt: skip


def points_csv(found: Sequence[Point]) -> str:
    """The data of an ablation's figure."""
    names = ("score", "kl")
    head = ["method", "regime", "alpha", "beta", "K", "seeds"]
    head += [column for name in names for column in (name, f"{name}_low", f"{name}_high")]
    rows = []
    for point in found:
        row = [point.method, point.regime, point.alpha, point.beta, point.responses, len(point.score.seeds)]
        for estimate in (point.score, point.kl):
            row += [estimate.value, estimate.low, estimate.high] if estimate else [None] * 3
        rows.append(row)
    return table(head, rows)


def save(figure: Any, out: Path, data: str) -> None:
    """Write the three files; each is replaced only by a whole one."""
    for ending, options in (
        (".png", {"dpi": 130, "metadata": {"Software": None}}),
        (".svg", {"metadata": {"Date": None}}),
    ):
        with atomic_path(out.with_name(out.name + ending)) as temporary:
            figure.savefig(temporary, format=ending[1:], **options)
    close(figure)
    write_text(out.with_name(out.name + ".csv"), data)
    print(f"{out}.png, .svg, .csv: written")


def runs_of(sources: Sequence[Path], quantity: str) -> list[Run]:
    """The runs of all sources. Those of one name that are no seeds of each other (a seed twice, or other settings) are
    told apart by where they lie."""
    found = [(source, run) for source in sources for run in read_runs(source, quantity)]
    count = Counter((run.label, run.seed) for _, run in found)
    settings = Counter(label for label, _ in {(run.label, run.settings) for _, run in found})
    apart = {label for (label, _), times in count.items() if times > 1 or settings[label] > 1}
    named = [
        dataclasses.replace(run, label=f"{run.label} ({source})") if run.label in apart else run
        for source, run in found
    ]
    again = [key for key, times in Counter((run.label, run.seed) for run in named).items() if times > 1]
    if again:
        raise InputError(f"{again[0][0]}, seed {again[0][1]}: named twice; name each source once")
    return named


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trend", type=Path, help="trend.jsonl of a results folder")
    kinds = parser.add_subparsers(dest="kind", metavar="trend | ranks | kl | responses")
    shared = argparse.ArgumentParser(add_help=False)
    for target in (parser, shared):
        target.add_argument("--out", type=Path, required=target is shared, help="path without its ending")
    paper = argparse.ArgumentParser(add_help=False)
    for target in (parser, paper):
        target.add_argument("--paper", type=Path, help="digitised Figure 2, to lay over the runs")
    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument("sources", type=Path, nargs="+", metavar="RUN")
    runs.add_argument("--quantity", choices=QUANTITIES, default="r", help="what is drawn (default r)")
    kinds.add_parser("trend", parents=[shared, paper, runs])
    kinds.add_parser("ranks", parents=[shared, runs])
    for name in ("kl", "responses"):
        kind = kinds.add_parser(name, parents=[shared])
        kind.add_argument("results", type=Path, metavar="RESULTS", help="folder with the records of the ablation")
        kind.add_argument("--benchmark", default="all")
        kind.add_argument("--metric", default="reward")
        kind.add_argument("--decoding", default="sampled")
    arguments = parser.parse_args()
    if arguments.kind is None and not (arguments.trend and arguments.out):
        parser.error("name a figure (trend, ranks, kl, responses), or --trend and --out")
    return arguments


def main() -> None:
    """Draw."""
    arguments = parse()
    paper = read_paper(arguments.paper) if getattr(arguments, "paper", None) else None
    if arguments.kind in ("kl", "responses"):
        score = (arguments.decoding, arguments.benchmark, arguments.metric)
        every = points(Results.read(arguments.results), *score)
        found = over_strength(every) if arguments.kind == "kl" else over_responses(every)
        label = f"{arguments.metric.replace('_', ' ')}, {arguments.benchmark}, {arguments.decoding}"
        save(draw_ablation(found, arguments.kind, label), arguments.out, points_csv(found))
    elif arguments.kind == "ranks":
        records = [record for source in arguments.sources for record in read_trend(source)]
        ranks = rank_curves(records, arguments.quantity)
        save(draw_ranks(ranks, QUANTITIES[arguments.quantity]), arguments.out, curves_csv(ranks, "rank"))
    elif arguments.kind == "trend":
        if paper and arguments.quantity != "r":
            raise InputError(f"--paper: the published curves are r; leave out --quantity {arguments.quantity}")
        runs = runs_of(arguments.sources, arguments.quantity)
        save(draw_runs(runs, QUANTITIES[arguments.quantity], paper), arguments.out,
             runs_csv(runs, arguments.quantity))  # fmt: skip
    else:
        quantity = "r" if paper else "log_ratio"
        trend = curves(read_trend(arguments.trend), quantity)
        save(draw(trend, QUANTITIES[quantity], paper), arguments.out, curves_csv(trend))


if __name__ == "__main__":
    run_command(main)
