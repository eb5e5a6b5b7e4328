"""Score a policy's answers with the ground truth and write them as rows.

    python -m data_prep.miniature.collect --prompts P.jsonl --answers A.jsonl --out DIR

An answer is {"id": a prompt's id, "sample": int, "response": str}; further keys are ignored. Writes
DIR/rows.jsonl and DIR/manifest.json. Empty responses are dropped, and prompts left with fewer than two.
"""

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from data_prep.files import InputError, read_jsonl, run_command
from data_prep.manifest import plan, up_to_date, write_manifest
from data_prep.miniature import world
from data_prep.rows import Row, write_rows


def read_prompts(path: Path) -> dict[str, dict[str, Any]]:
    """Prompts with truths, by id; InputError with file and line for a bad or repeated one."""
    prompts: dict[str, dict[str, Any]] = {}
    for number, record in read_jsonl(path):
        try:
            world.score(record["truth"], "x-x")  # two words that parse: reads all that scoring needs
            identity, _, _ = record["id"], record["prompt"], record["source"]
            hash(identity)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}:{number}: not a prompt of this world; build it again") from None
        if identity in prompts:
            raise InputError(f"{path}:{number}: prompt {identity!r} is there twice")
        prompts[identity] = {**record, "line": number}
    return prompts


def read_answers(path: Path, prompts: dict[str, dict[str, Any]]) -> dict[str, dict[int, str]]:
    """Responses by prompt id and sample; InputError with file and line for a bad, unknown or repeated one."""
    answers: dict[str, dict[int, str]] = {identity: {} for identity in prompts}
    for number, record in read_jsonl(path):
        identity, sample, response = (record.get(key) for key in ("id", "sample", "response"))
        if type(sample) is not int or not isinstance(response, str):
            raise InputError(f"{path}:{number}: expected id, sample (an integer) and response (a string)")
        if not isinstance(identity, str) or identity not in prompts:
            raise InputError(f"{path}:{number}: no prompt {identity!r}; give the prompts sampled from")
        if sample in answers[identity]:
            raise InputError(f"{path}:{number}: sample {sample} of {identity!r} is there twice; remove one")
        answers[identity][sample] = response
    return answers


def collect(prompts_path: Path, answers_path: Path, out: Path) -> dict[str, Any] | None:
    """Write rows.jsonl and manifest.json into `out`; return the counted facts, or None if up to date.

    Raises InputError for bad input, a prompt without answers, or if no prompt has two usable responses.
    """
    inputs = {"prompts": prompts_path, "answers": answers_path}
    planned = plan("data_prep.miniature.collect", {}, inputs)
    if up_to_date(out, planned):
        return None
    prompts = read_prompts(prompts_path)
    answers = read_answers(answers_path, prompts)
    rows, read, too_few, dropped_prompts, empty = [], 0, 0, 0, 0
    for identity, record in prompts.items():
        samples = answers[identity]
        if not samples:
            raise InputError(f"{prompts_path}:{record['line']}: no answers to {identity!r} in {answers_path}")
        kept = [samples[sample] for sample in sorted(samples) if samples[sample].strip()]
        read += len(samples)
        empty += len(samples) - len(kept)
        if len(kept) < 2:
            too_few += len(kept)
            dropped_prompts += 1
            continue
        rewards = [world.score(record["truth"], response) for response in kept]
        rows.append(Row(identity, record["prompt"], kept, rewards, record["source"]))
    if not rows:
        raise InputError(f"{answers_path}: no prompt has two non-empty responses; sample again")
    write_rows(out / "rows.jsonl", rows)
    facts = {
        "rows": len(rows),
        "prompts read": len(prompts),
        "prompts dropped": dropped_prompts,
        "responses": sum(len(row.responses) for row in rows),
        "responses read": read,
        "responses dropped": {"empty": empty, "fewer than two left": too_few},
        "mean reward": fmean(reward for row in rows for reward in row.rewards),
        "mean best of K": fmean(max(row.rewards) for row in rows),
        "share of rows tied": fmean(len(set(row.rewards)) == 1 for row in rows),
    }
    write_manifest(out, planned, outputs=["rows.jsonl"], facts=facts)
    return facts


def main() -> None:
    """Read the command line, collect, and print the facts."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.miniature.collect", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--prompts", type=Path, required=True, help="prompts-*.jsonl of the miniature world")
    parser.add_argument("--answers", type=Path, required=True, help="sampled responses")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    args = parser.parse_args()
    facts = collect(args.prompts, args.answers, args.out)
    if facts is None:
        print(f"{args.out}: up to date, nothing to do")
    else:
        print(f"{args.out}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))


if __name__ == "__main__":
    run_command(main)
