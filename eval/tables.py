"""Tables, from the records alone.

    python -m eval.tables --results results/tiny
    python -m eval.tables --table table2 --scale tiny [--results results/tiny/table2]

The first writes tables.md of the miniature and the same numbers, unrounded, as tables.csv. The second writes one of the
paper's tables (or the table behind Figure 4 or 6) with the paper's values beside ours: see eval/paper_tables.py.
"""

import argparse
import csv
import io
import math
from collections.abc import Callable
from pathlib import Path

from data_prep.files import InputError, run_command, write_text
from eval import paper_tables
from eval.records import METHODS, REGIMES, RESPONSES, Estimate, Results

Cell = Callable[[Results, str], Estimate | None]


def score(decoding: str, benchmark: str, metric: str) -> Cell:
    """A cell with a score."""
    return lambda results, policy: results.score(policy, decoding, benchmark, metric)


def end(*path: str) -> Cell:
    """A cell with a number of the last held-out trend record."""
    return lambda results, policy: results.end(policy, *path)


QUALITY: dict[str, tuple[Cell, int]] = {  # column: (cell, decimals)
    "reward": (score("sampled", "all", "reward"), 2),
    "win vs DPO": (score("sampled", "all", "win_rate_vs_dpo"), 3),
    "win vs mu": (score("sampled", "all", "win_rate_vs_mu"), 3),
    "KL(pi, mu)": (end("kl"), 2),
    "chosen": (end("chosen", "log_ratio"), 2),
    "rejected": (end("rejected", "log_ratio"), 2),
    "accuracy": (end("accuracy"), 2),
}
TASKS: dict[str, tuple[Cell, int]] = {
    f"{name}, {decoding}": (score(decoding, benchmark, metric), 2)
    for benchmark, metric, name in (
        ("arithmetic", "exact_match", "arithmetic"),
        ("functions", "pass@1", "functions"),
        ("instructions", "constraints_met", "instructions"),
    )
    for decoding in ("sampled", "greedy")
}
NOTES = """
- **reward**: mean true score (1 to 10) of sampled answers (temperature 1) to held-out test prompts; **win**: share of
  prompts on which the answer scores higher than that of DPO (same regime) or of the reference policy mu, ties one half.
- **KL**, **chosen**, **rejected**: at the end of training, in nats a response; chosen and rejected are the mean
  log pi - log mu of the best response and of the worse ones on held-out rows (4 samples of mu each), whatever the
  method was trained on. **accuracy**: how often the best one has the higher log-ratio.
- **arithmetic**: exact match; **functions**: pass@1 (tests are run); **instructions**: all constraints met.
- **K**: responses to a prompt that the method learns from; **responses**, **tokens**: seen in training (first seed),
  each once forward and once backward. Methods with K = 4 use about twice the responses and compute of those with pairs;
  SFT on the best of 4 trains towards one of its four responses. `DPO x 3` is DPO given the same four responses.
- 95 % intervals in brackets: {interval}.
"""
INTERVALS = {
    False: "bootstrap over prompts (one seed; the likelihood columns then have none)",
    True: "Student's t over the seeds' means; each seed has its own prompts, world, mu and training. They are "
    "symmetric, and so can pass 0 or 1",
}


def shown(estimate: Estimate | None, digits: int) -> str:
    """A table cell; `not run` where nothing was measured."""
    return "not run" if estimate is None else estimate.show(digits)


def policies(regime: str) -> dict[str, str]:
    """Policy name to its label, in the order of the table."""
    return {"mu": "mu (SFT)", **{f"{method}-{regime}": label for method, label in METHODS.items()}}


def markdown(results: Results, regime: str, columns: dict[str, tuple[Cell, int]], with_work: bool) -> str:
    """One table of a regime."""
    head = ["method", *(["K", "responses", "tokens"] if with_work else []), *columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for policy, label in policies(regime).items():
        cells = [label]
        if with_work:
            method, work = policy.rpartition("-")[0], results.work.get(policy)
            seen = [f"{work[key]:,}" for key in ("responses_seen", "tokens_seen")] if work else ["-", "-"]
            cells += [str(RESPONSES.get(method, "-")), *seen]
        for name, (cell, digits) in columns.items():
            # mu is the zero of the likelihood columns, and DPO the rival of the win rate.
            nothing = policy == "mu" and name not in ("reward", *TASKS)
            itself = policy == f"dpo-{regime}" and name == "win vs DPO"
            cells.append("-" if nothing or itself else shown(cell(results, policy), digits))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(results: Results) -> str:
    """tables.md."""
    seeds = ", ".join(map(str, results.seeds))
    parts = [
        "# The experiment in miniature: tables",
        f"Seeds {seeds}. Made by `bash scripts/reproduce.sh --seeds {len(results.seeds)}`; each number is a record "
        "of `scores.jsonl` or `trend.jsonl`, whose `manifest` is the hash of a line of `manifests.jsonl` (command, "
        "commit, settings, inputs). The whole grid is shown: every method at both training strengths, with the same "
        "settings.",
    ]
    for regime in REGIMES:
        parts += [
            f"## {regime.capitalize()} regime (`train/recipes/tiny/{regime}.yaml`)",
            markdown(results, regime, QUALITY, with_work=True),
            markdown(results, regime, TASKS, with_work=False),
        ]
    parts.append(NOTES.format(interval=INTERVALS[len(results.seeds) > 1]).strip())
    return "\n\n".join(parts) + "\n"


def table_csv(results: Results) -> str:
    """tables.csv: regime, policy, column, value, low, high, and the value of each seed."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["regime", "policy", "column", "value", "low", "high", *(f"seed_{seed}" for seed in results.seeds)])
    for regime in REGIMES:
        for policy in policies(regime):
            for column, (cell, _) in {**QUALITY, **TASKS}.items():
                estimate = cell(results, policy)
                if estimate is not None:
                    numbers = (estimate.value, estimate.low, estimate.high, *estimate.seeds)
                    cells = ["" if math.isnan(number) else f"{number:.6f}" for number in numbers]
                    writer.writerow([regime, policy, column, *cells])
    return text.getvalue()


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(prog="python -m eval.tables")
    parser.add_argument("--results", type=Path, help="folder of the records (with --table: results/SCALE/TABLE)")
    parser.add_argument("--table", choices=paper_tables.TITLES)
    parser.add_argument("--scale", choices=paper_tables.BASES)
    arguments = parser.parse_args()
    if arguments.table:
        if not arguments.scale:
            raise InputError(f"--table {arguments.table}: name the scale too, --scale tiny or another")
        folder = arguments.results or Path("results") / arguments.scale / arguments.table
        lines = paper_tables.write(arguments.table, arguments.scale, folder)
        measured = sum(line.ours is not None for line in lines)
        print(f"{folder / arguments.table}.md, .csv, .tex: {measured} of {len(lines)} lines measured")
        return
    if not arguments.results:
        raise InputError("give --results DIR, or --table and --scale")
    results = Results.read(arguments.results)
    write_text(arguments.results / "tables.md", document(results))
    write_text(arguments.results / "tables.csv", table_csv(results))
    print(f"{arguments.results / 'tables.md'}: written")


if __name__ == "__main__":
    run_command(main)
