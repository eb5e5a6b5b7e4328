"""UltraInteract pairs to rows with K = 2: a correct action against an incorrect one.

    python -m data_prep.ultrainteract --out DIR [--input FILE ...]

Without --input the data come from openbmb/UltraInteract_pair at the pinned revision. DIR gets rows.jsonl and
manifest.json, whose facts say for each record whether it was kept or why it was dropped.

The prompt of a row is the record's `trajectory` as it stands, turn by turn: the instruction and, in later turns,
earlier actions with the observations on them. The responses are `chosen` (reward 1) and `rejected` (reward 0):
the set has no scores, so the two numbers say only which one is correct. `source` is the task (Coding, Math_CoT,
Math_PoT, Logic). Columns: the card of openbmb/UltraInteract_pair. How the roles are spelt in `trajectory` could
not be read there; both public spellings are accepted.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from data_prep.files import InputError, run_command, sha256_text, to_json
from data_prep.manifest import up_to_date
from data_prep.rows import Row
from data_prep.sources import ULTRAINTERACT, column, make_row, plan_build, read_records, write_build

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


def build_rows(records: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[list[Row], dict[str, Any]]:
    """Rows in the order of the records, and what became of each record.

    The id is the record's own with a hash of the content: ids need not be unique in the source, equal records
    are dropped, and neither depends on the order of records.
    """
    rows, seen, fates, turns = [], set(), Counter(), Counter()
    for where, record in records:
        prompt = read_trajectory(record, where)
        chosen, rejected = (column(record, name, str, where) for name in ("chosen", "rejected"))
        task = column(record, "task", str, where)
        digest = sha256_text(to_json([task, prompt, chosen, rejected]))
        if not chosen.strip() or not rejected.strip():
            fates["empty_response"] += 1
        elif not prompt:
            fates["empty_trajectory"] += 1
        elif prompt[-1]["role"] == "assistant":
            fates["nothing_to_answer"] += 1
        elif chosen == rejected:
            fates["identical_responses"] += 1
        elif digest in seen:
            fates["duplicate"] += 1
        else:
            fates["kept"] += 1
            seen.add(digest)
            turns[sum(message["role"] == "user" for message in prompt)] += 1
            rows.append(
                make_row(
                    where,
                    id=f"{record.get('id') or 'pair'}-{digest[:16]}",
                    prompt=prompt,
                    responses=[chosen, rejected],
                    rewards=[1.0, 0.0],
                    source=task,
                )
            )
    tasks = Counter(row.source for row in rows)
    facts = {
        "records": {"read": fates.total(), **dict(sorted(fates.items()))},
        "rows_by_task": dict(sorted(tasks.items())),
        "rows_by_user_turns": {str(count): turns[count] for count in sorted(turns)},
    }
    return rows, facts


def read_trajectory(record: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """The `trajectory` of a record as chat messages."""
    messages = []
    for turn in column(record, "trajectory", list, where):
        role = turn.get("from") if isinstance(turn, dict) else None
        if role not in ROLES or not isinstance(turn.get("value"), str):
            raise InputError(f"{where}: a turn of the trajectory needs a text and one of {sorted(ROLES)}")
        messages.append({"role": ROLES[role], "content": turn["value"]})
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.ultrainteract", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--input", type=Path, nargs="+", default=[], metavar="FILE", help=".jsonl or .parquet")
    options = parser.parse_args()
    planned = plan_build("data_prep.ultrainteract", {}, ULTRAINTERACT, options.input)
    if up_to_date(options.out, planned):
        print(f"{options.out}: up to date")
        return
    rows, facts = build_rows(read_records(ULTRAINTERACT, options.input))
    write_build(options.out, planned, {"rows.jsonl": rows}, facts)


if __name__ == "__main__":
    run_command(main)
