"""Preference pairs, and subsets of K responses, from rows with scalar rewards.

    python -m data_prep.pairs ROWS --out DIR --strategy STRATEGY [--responses N] [--seed 0]
    python -m data_prep.pairs ROWS --out DIR --responses N [--seed 0]

best-vs-random  the best response against a random worse one: the paper's preference data (its DPO)
best-vs-rest    the best against each worse one ("DPO x 3" at K = 4)
all-pairs       each better one against each worse one ("DPO x 6" at K = 4)
released        as the script of the authors' preference set does it (generate_dataset_preference.py in
                huggingface.co/datasets/ChenDRAG/ultrafeedback_preference): the first best one against a "random"
                other, with the generator seeded anew for each prompt. Of four responses that is always the first
                or, where this is the best, the third. Meant for rows that hold all responses in source order.
--responses N   keeps the best response and N - 1 random others (the paper's ablation on K): the sets of a
                smaller N are contained in those of a larger. Rows with fewer responses stay as they are.

A preference always has a strictly higher reward on its first side: equal rewards, and equal texts, make no
pair and are counted (the authors' set holds such pairs). Where several responses share the highest reward the
"best" is drawn among them, but for `released`.

All draws but `released` order the responses of a row by a hash of (seed, row id, text). So neither other rows
nor the order of rows or responses changes a draw; and each pair of best-vs-random is one of best-vs-rest, and
each of those one of all-pairs, id included.
"""

import argparse
import random
from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.files import InputError, run_command, sha256_text, to_json
from data_prep.manifest import plan, up_to_date, write_manifest
from data_prep.rows import Row, read_rows, write_rows

STRATEGIES = ("best-vs-random", "best-vs-rest", "all-pairs", "released")


def ranking(row: Row, seed: int) -> tuple[list[int], list[str]]:
    """Indices of the responses by falling reward, equal rewards in drawn order, and the draw of each index."""
    draws = [sha256_text(to_json([seed, row.id, text])) for text in row.responses]
    return sorted(range(len(draws)), key=lambda i: (-row.rewards[i], draws[i])), draws


def keep_responses(row: Row, count: int, seed: int) -> Row:
    """The best response and `count` - 1 random others of the row, by falling reward.

    count: >= 2; a row with fewer responses keeps all of them
    """
    order, draws = ranking(row, seed)
    others = sorted(order[1:], key=lambda i: draws[i])[: count - 1]
    return row.select([i for i in order if i == order[0] or i in others])


def make_pairs(row: Row, strategy: str, seed: int) -> tuple[list[Row], Counter[str]]:
    """The K = 2 rows of one row, chosen response first, and how many candidate pairs became what.

    strategy: one of STRATEGIES
    Counted are `kept`, `tied` (equal rewards) and `identical` (equal texts); they add up to the candidates:
    1, K - 1 or K (K - 1) / 2. The id of a pair is the row's with the ranks of the two, as in "x#0-2".
    """
    order, draws = ranking(row, seed)
    if strategy == "released":
        candidates = [(row.best, _released_rival(row))]
    else:
        better = order if strategy == "all-pairs" else order[:1]
        candidates = [(i, j) for rank, i in enumerate(better) for j in order[rank + 1 :]]
    if strategy == "best-vs-random":
        # A pair that can be kept comes before one that cannot; the draw decides among equals.
        preference = ("kept", "identical", "tied").index
        candidates = [min(candidates, key=lambda pair: (preference(_fate(row, *pair)), draws[pair[1]]))]
    pairs = [
        row.select([i, j], suffix=f"#{order.index(i)}-{order.index(j)}")
        for i, j in candidates
        if _fate(row, i, j) == "kept"
    ]
    return pairs, Counter(_fate(row, i, j) for i, j in candidates)


def _released_rival(row: Row) -> int:
    generator = random.Random(42)
    while (rival := generator.randrange(len(row.responses))) == row.best:
        pass
    return rival


def _fate(row: Row, better: int, worse: int) -> str:
    if row.rewards[better] == row.rewards[worse]:
        return "tied"
    return "identical" if row.responses[better] == row.responses[worse] else "kept"


def convert(
    rows: list[Row], strategy: str | None, responses: int | None, seed: int
) -> tuple[list[Row], dict[str, Any]]:
    """Apply `--responses`, then `--strategy`, to all rows; return the new rows and the counts."""
    facts: dict[str, Any] = {"rows_read": len(rows)}
    if responses is not None:
        facts["rows_with_fewer_responses"] = sum(len(row.responses) < responses for row in rows)
        rows = [keep_responses(row, responses, seed) for row in rows]
    if strategy is not None:
        made, candidates, dropped, tied_best = [], Counter(), Counter(), 0
        for row in rows:
            pairs, fates = make_pairs(row, strategy, seed)
            made += pairs
            candidates += fates
            tied_best += bool(pairs) and row.rewards.count(max(row.rewards)) > 1
            if not pairs:
                dropped["all_tied" if set(fates) == {"tied"} else "identical"] += 1
        facts["rows_dropped"] = dict(sorted(dropped.items()))
        facts["rows_with_tied_best"] = tied_best
        facts["candidate_pairs"] = dict(sorted(candidates.items()))
        rows = made
    facts["rows_written"] = len(rows)
    return rows, facts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.pairs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("rows", type=Path, metavar="ROWS", help="rows, .jsonl or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="directory for rows.jsonl and manifest.json")
    parser.add_argument("--strategy", choices=STRATEGIES)
    parser.add_argument("--responses", type=int, metavar="N", help="keep the best and N - 1 others, N >= 2")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.strategy is None and options.responses is None:
        raise InputError("nothing to do: name a --strategy, or a number of --responses, or both")
    if options.responses is not None and options.responses < 2:
        raise InputError(f"--responses {options.responses}: at least 2 are needed")

    settings = {
        "strategy": options.strategy,
        "responses": options.responses,
        "seed": options.seed,
    }
    planned = plan("data_prep.pairs", settings, {"rows": options.rows})
    if up_to_date(options.out, planned):
        print(f"{options.out}: up to date")
        return
    rows, facts = convert(read_rows(options.rows), options.strategy, options.responses, options.seed)
    if not rows:
        raise InputError(f"{options.rows}: no row gives a pair ({to_json(facts['rows_dropped'])})")
    write_rows(options.out / "rows.jsonl", rows)
    write_manifest(options.out, planned, outputs=["rows.jsonl"], facts=facts)
    print(f"{options.out}: {to_json(facts)}")


if __name__ == "__main__":
    run_command(main)
