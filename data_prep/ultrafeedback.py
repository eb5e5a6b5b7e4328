"""UltraFeedback to rows: one row for each prompt, with its (usually four) scored responses.

    python -m data_prep.ultrafeedback --out DIR [--input FILE ...] [--score ...] [--truthfulqa keep]
    python -m data_prep.ultrafeedback --out DIR --split-like RELEASED_DIR
    python -m data_prep.ultrafeedback --out DIR --released reward|preference [--input FILE ...]

Without --input the data come from the Hub at the pinned revision. DIR gets train.jsonl, test.jsonl and
manifest.json, whose facts say for each record and each response whether it was kept or why it was dropped.

--score       overall           overall_score as published: what the authors' scripts read
              overall-repaired  undoes the fault of early revisions that turned 1 into 10
                                (OpenBMB/UltraFeedback issue 8), by the rule of that repository's README: a 10
                                with a fine-grained mean <= 2 becomes 1, with > 4 it stays. Between the two the
                                upstream asked GPT-4 again, so here the response is dropped. At the pinned
                                revision the repair has been made already.
              fine-grained      mean of the numeric ones among the four aspect ratings (1 to 5)
--truthfulqa  drop (default) or keep the prompts of the source truthful_qa, wherever they stand. The paper's set
              held them (derived: 61,966 + 2,000 rows are all but one of the records; without TruthfulQA
              HuggingFaceH4/ultrafeedback_binarized has 61,135 for training).
--split-like  a directory built with --released: its prompts are split as there, all others are dropped.
              Otherwise a prompt is a test prompt by a hash of (seed, prompt), 2,000 of 63,966 on average;
              other rows never move it.
--released    the authors' own sets, into the same rows: `reward` (4 responses) or `preference` (pairs).
              Repeated prompts and ties stay as they were released. Local files are told apart by their names,
              which must begin with train or test.

Layouts: README of OpenBMB/UltraFeedback; scripts in the repositories of the released sets (of the script for
`reward` only the first part could be read: the names score_A0 .. score_A3 are those that the authors' trainer
reads). Responses keep the order of the source.
"""

import argparse
import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.files import InputError, run_command, sha256_text, to_json
from data_prep.manifest import file_digest, up_to_date
from data_prep.rows import Row, read_rows
from data_prep.sources import (
    RELEASED,
    ULTRAFEEDBACK,
    column,
    make_row,
    plan_build,
    read_records,
    write_build,
)

SCORES = ("overall", "overall-repaired", "fine-grained")
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
TEST_SHARE = 2_000 / 63_966
PLACEHOLDER = "N/A"


class Prompt(NamedTuple):
    """One record. candidates: (response, its score or the reason why it has none)."""

    where: str
    messages: list[dict[str, str]]
    source: str
    candidates: list[tuple[str, float | str]]


# ---- layouts: from a record to a Prompt


def parse_score(value: Any) -> float | str:
    """A finite score from a number or its text, or the reason why there is none."""
    if value is None or value == "":
        return "missing_score"
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return "unparsable_score"
    return score if math.isfinite(score) else "unparsable_score"


def fine_grained(completion: Mapping[str, Any]) -> float | str:
    """Mean of the numeric aspect ratings of a completion, or the reason why there is none."""
    annotations = completion.get("annotations")
    aspects = [annotations.get(name) for name in ASPECTS] if isinstance(annotations, dict) else []
    ratings = [parse_score(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    numbers = [rating for rating in ratings if isinstance(rating, float)]  # others: "N/A", does not apply
    return sum(numbers) / len(numbers) if numbers else "missing_score"


def read_score(completion: Mapping[str, Any], choice: str) -> float | str:
    """The score of a completion of UltraFeedback, or why there is none. choice: one of SCORES."""
    if choice == "fine-grained":
        return fine_grained(completion)
    score = parse_score(completion.get("overall_score"))
    if choice == "overall" or score != 10:
        return score
    mean = fine_grained(completion)
    if isinstance(mean, str) or 2 < mean <= 4:
        return "doubtful_10"
    return 1.0 if mean <= 2 else 10.0


def original_prompt(record: Mapping[str, Any], where: str, score: str) -> Prompt:
    """UltraFeedback's own layout: instruction, source, completions with response and scores."""
    candidates = []
    for completion in column(record, "completions", list, where):
        if not isinstance(completion, dict) or "response" not in completion:
            raise InputError(f"{where}: each of the completions must be an object with a response")
        candidates.append((completion["response"], read_score(completion, score)))
    message = {"role": "user", "content": column(record, "instruction", str, where)}
    return Prompt(where, [message], column(record, "source", str, where), candidates)


def released_prompt(record: Mapping[str, Any], where: str, names: Mapping[str, str]) -> Prompt:
    """The released layouts: conversations that differ in the last message, each with a score.

    names: from the column of each conversation to that of its score
    """
    prompts, candidates = [], []
    for name, score_name in names.items():
        messages = column(record, name, list, where)
        if len(messages) < 2 or not all(
            isinstance(message, dict) and isinstance(message.get("content"), str) for message in messages
        ):
            raise InputError(f"{where}: column {name!r} must hold a prompt and an answer as chat messages")
        prompts.append([{key: message.get(key) for key in ("role", "content")} for message in messages[:-1]])
        candidates.append((messages[-1]["content"], parse_score(column(record, score_name, object, where))))
    if any(prompt != prompts[0] for prompt in prompts):
        raise InputError(f"{where}: the conversations of the record have different prompts")
    return Prompt(where, prompts[0], "ultrafeedback", candidates)


RELEASED_COLUMNS = {
    "reward": {f"A{i}": f"score_A{i}" for i in range(4)},
    "preference": {"chosen": "score_chosen", "rejected": "score_rejected"},
}


# ---- from Prompts to rows


def prompt_id(messages: Iterable[Mapping[str, str]]) -> str:
    """SHA-256 of the prompt's text: for one user message the prompt_id of the released sets."""
    return sha256_text("\n".join(message["content"] for message in messages))


def build_rows(
    prompts: Iterable[Prompt], *, truthfulqa: str, repeated: str, released: Container[str] | None = None
) -> tuple[list[Row], dict[str, dict[str, int]]]:
    """Rows in the order of `prompts`, and what became of each record and each response.

    truthfulqa: "drop" or "keep". repeated: "drop" leaves one record of each prompt (chosen by its content, so
    that the order of records does not matter); "keep" leaves all that differ and gives them different ids.
    released: the prompt ids to which the rows are confined, if they are.
    """
    prompts = list(prompts)
    contaminated = {prompt_id(p.messages) for p in prompts if p.source == "truthful_qa" and truthfulqa == "drop"}
    records, responses = Counter(), Counter()
    rows: list[Row] = []
    for prompt in prompts:
        row_id = prompt_id(prompt.messages)
        fates = Counter(_fate(candidate) for candidate in prompt.candidates)
        usable = [candidate for candidate in prompt.candidates if _fate(candidate) == "kept"]
        if row_id in contaminated:
            reason = "contaminated"
        elif not prompt.messages[-1]["content"].strip():
            reason = "empty_prompt"
        elif released is not None and row_id not in released:
            reason = "not_in_the_released_set"
        elif len(usable) < 2:
            reason = "fewer_than_2_usable_responses"
        elif all(text == PLACEHOLDER for text, _ in usable):
            reason = "placeholder"  # what the released sets hold for prompts without four responses
        else:
            reason = "kept"
            rows.append(
                make_row(
                    prompt.where,
                    id=row_id,
                    prompt=prompt.messages,
                    responses=[text for text, _ in usable],
                    rewards=[score for _, score in usable],
                    source=prompt.source,
                )
            )
        records[reason] += 1
        if reason != "kept":
            fates["in_dropped_record"] = fates.pop("kept", 0)
        responses.update(fates)
    kept = _resolve_repeated(rows, repeated)
    lost = sum(len(row.responses) for row in rows) - sum(len(row.responses) for row in kept)
    records.update({"kept": len(kept) - len(rows), "duplicate_prompt": len(rows) - len(kept)})
    responses.update({"kept": -lost, "in_dropped_record": lost})
    return kept, {"records": _tidy(records), "responses": _tidy(responses)}


def _fate(candidate: tuple[str, float | str]) -> str:
    text, score = candidate
    if not isinstance(text, str) or not text.strip():
        return "empty_response"
    return score if isinstance(score, str) else "kept"


def _tidy(counts: Counter[str]) -> dict[str, int]:
    return {"read": counts.total(), **{reason: counts[reason] for reason in sorted(counts) if counts[reason]}}


def _resolve_repeated(rows: list[Row], repeated: str) -> list[Row]:
    times = Counter(row.id for row in rows)
    digests = [_digest(row) if times[row.id] > 1 else "" for row in rows]
    groups: dict[str, set[str]] = {}
    for row, digest in zip(rows, digests, strict=True):
        groups.setdefault(row.id, set()).add(digest)
    kept, seen = [], set()
    for row, digest in zip(rows, digests, strict=True):
        group = groups[row.id]
        if (row.id, digest) in seen or (repeated == "drop" and digest != min(group)):
            continue
        seen.add((row.id, digest))
        unique = repeated == "drop" or len(group) == 1
        kept.append(row if unique else row.select(range(len(row.responses)), suffix=f"-{digest[:8]}"))
    return kept


def _digest(row: Row) -> str:
    """Hash of a row's content, the same for any order of its responses."""
    return sha256_text(to_json([row.source, sorted(zip(row.responses, row.rewards, strict=True))]))


def hashed_split(messages: Iterable[Mapping[str, str]], seed: int) -> str:
    """The split of a prompt, "test" for a TEST_SHARE of all: a matter of seed and prompt only."""
    return "test" if int(sha256_text(f"{seed} {prompt_id(messages)}"), 16) < TEST_SHARE * 2**256 else "train"


# ---- the two builds


def build_original(options: argparse.Namespace) -> None:
    """Rows from UltraFeedback's own records."""
    settings = {
        "score": options.score,
        "truthfulqa": options.truthfulqa,
        "split": "released" if options.split_like else {"seed": options.seed, "test_share": TEST_SHARE},
    }
    like = _split_files(options.split_like) if options.split_like else {}
    planned = plan_build("data_prep.ultrafeedback", settings, ULTRAFEEDBACK, options.input)
    planned["inputs"] |= {f"{split} of --split-like": file_digest(path) for split, path in like.items()}
    if up_to_date(options.out, planned):
        print(f"{options.out}: up to date")
        return
    splits = {prompt_id(row.prompt): split for split, path in like.items() for row in read_rows(path)}
    records = read_records(ULTRAFEEDBACK, options.input)
    rows, facts = build_rows(
        (original_prompt(record, where, options.score) for where, record in records),
        truthfulqa=options.truthfulqa,
        repeated="drop",
        released=splits if like else None,
    )
    files: dict[str, list[Row]] = {"train.jsonl": [], "test.jsonl": []}
    for row in rows:
        files[f"{splits[row.id] if like else hashed_split(row.prompt, options.seed)}.jsonl"].append(row)
    write_build(options.out, planned, files, facts)


def _split_files(directory: Path) -> dict[str, Path]:
    """The row files of a directory built with --released. Test comes last: it wins where a prompt is in both."""
    files = {split: directory / f"{split}.jsonl" for split in ("train", "test")}
    found = {split: path for split, path in files.items() if path.exists()}
    if not found:
        raise InputError(f"{directory}: neither train.jsonl nor test.jsonl; build it with --released first")
    return found


def build_released(options: argparse.Namespace) -> None:
    """Rows from a released set."""
    source, names = RELEASED[options.released], RELEASED_COLUMNS[options.released]
    local = {split: [path for path in options.input if path.name.startswith(split)] for split in source.splits}
    if sum(len(paths) for paths in local.values()) != len(options.input):
        raise InputError("with --released the names of --input files must begin with train or test")
    planned = plan_build("data_prep.ultrafeedback", {"released": options.released}, source, options.input)
    if up_to_date(options.out, planned):
        print(f"{options.out}: up to date")
        return
    files, facts = {}, {}
    for split, paths in local.items():
        if options.input and not paths:
            continue
        records = read_records(source, paths, split)
        files[f"{split}.jsonl"], facts[split] = build_rows(
            (released_prompt(record, where, names) for where, record in records),
            truthfulqa="keep",
            repeated="keep",
        )
    prompts = [{prompt_id(row.prompt) for row in rows} for rows in files.values()]
    facts["prompts_in_both_splits"] = len(set.intersection(*prompts)) if len(prompts) == 2 else 0
    write_build(options.out, planned, files, facts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.ultrafeedback", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--input", type=Path, nargs="+", default=[], metavar="FILE", help=".jsonl or .parquet")
    parser.add_argument("--released", choices=tuple(RELEASED))
    parser.add_argument("--score", choices=SCORES, default="overall")
    parser.add_argument("--truthfulqa", choices=("drop", "keep"), default="drop")
    parser.add_argument("--split-like", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="of the split by hash")
    options = parser.parse_args()
    if options.released:
        for name in ("score", "truthfulqa", "split_like", "seed"):
            if getattr(options, name) != parser.get_default(name):
                raise InputError(f"--{name.replace('_', '-')} does not go with --released, which is as it is")
        build_released(options)
    else:
        build_original(options)


if __name__ == "__main__":
    run_command(main)
