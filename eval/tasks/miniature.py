"""The miniature's arithmetic as a local benchmark file for eval.reasoning.

python -m eval.tasks.miniature --prompts FILE --out DIR

Writes DIR/arithmetic/test.jsonl: {id, question, answer}, the answer ending in "#### N" as GSM8K's do.
"""

import argparse
from pathlib import Path

from data_prep.files import InputError, run_command, write_jsonl
from data_prep.miniature.arithmetic import SOURCE
from data_prep.rows import read_prompts


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(prog="python -m eval.tasks.miniature")
    parser.add_argument("--prompts", required=True, type=Path, help="of the miniature, with their truths")
    parser.add_argument("--out", required=True, type=Path, help="directory")
    arguments = parser.parse_args()
    items = [item for item in read_prompts(arguments.prompts) if item.get("truth", {}).get("source") == SOURCE]
    if not items:
        raise InputError(f"{arguments.prompts}: no arithmetic with truths; give prompts of the miniature world")
    count = write_jsonl(
        arguments.out / "arithmetic" / "test.jsonl",
        (
            {"id": item["id"], "question": item["truth"]["prompt"], "answer": f"#### {item['truth']['answer']}"}
            for item in items
        ),
    )
    print(f"{count} questions in {arguments.out / 'arithmetic' / 'test.jsonl'}")


if __name__ == "__main__":
    run_command(main)
