"""Where the public data sets come from, and how all commands read records and write rows.

    python -m data_prep.sources        prints data sets, revisions, licences and disk

A record is one JSON object in the layout of its source, from the Hub at a pinned revision or from local files
(.jsonl or .parquet) in the same layout.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.files import InputError, read_jsonl, run_command, to_json
from data_prep.manifest import plan, write_manifest
from data_prep.rows import Row, read_parquet, write_rows


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set on the Hub. splits: its split for each of ours. download_mb, records: as the Hub lists them."""

    repo: str
    revision: str
    licence: str
    splits: dict[str, str]
    download_mb: int
    records: int


# The revision that both authors' scripts name (huggingface.co/datasets/ChenDRAG/ultrafeedback_reward and
# .../ultrafeedback_preference, generate_dataset_*.py). The same revision holds the repaired overall_score.
ULTRAFEEDBACK = Source(
    "openbmb/UltraFeedback", "40b436560ca83a8dba36114c22ab3c66e43f6d5e", "MIT", {"train": "train"}, 945, 63_967
)
# 61,966 / 2,000 is printed for the preference set (all_results.json of ChenDRAG/zephyr-NCA-preference) and
# only implied for the reward set.
RELEASED = {
    "reward": Source(
        "ChenDRAG/ultrafeedback_reward",
        "3199ef5e56723d7b66c9df3253b4c9c7831561aa",
        "MIT",
        {"train": "train_prefs", "test": "test_prefs"},
        284,
        63_966,
    ),
    "preference": Source(
        "ChenDRAG/ultrafeedback_preference",
        "79fa2be4a38af96deacad12381695ff3de2865c9",
        "MIT",
        {"train": "train_prefs", "test": "test_prefs"},
        229,
        63_966,
    ),
}
# The last upload of the data file; later commits up to 2025 changed the card only, as far as could be seen.
ULTRAINTERACT = Source(
    "openbmb/UltraInteract_pair",
    "bf7f94d20a16d1ca2575d2cf873efe2c4adbba04",
    "MIT",
    {"train": "train"},
    248,
    219_522,
)


def plan_build(module: str, settings: Mapping[str, Any], source: Source, inputs: Sequence[Path]) -> dict[str, Any]:
    """`manifest.plan` for rows made from local `inputs` or, without any, from `source` at its revision."""
    origin = {} if inputs else {"repo": source.repo, "revision": source.revision}
    return plan(
        module,
        {**settings, **origin},
        {f"input {number}": path for number, path in enumerate(inputs, start=1)},
    )


def read_records(source: Source, inputs: Sequence[Path], split: str = "train") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, record) for each record of local `inputs` or, without any, of the split on the Hub.

    where: "file:number", for messages. Raises InputError in one line for unreadable or empty input.
    """
    count = 0
    for path in inputs:
        count_before = count
        for number, record in read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path):
            count += 1
            yield f"{path}:{number}", record
        if count == count_before:
            raise InputError(f"{path}: no records; give a file with at least one")
    if not inputs:
        for number, record in enumerate(_load_from_hub(source, source.splits[split]), start=1):
            yield f"{source.repo} {split}:{number}", record


def _load_from_hub(source: Source, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source.repo, revision=source.revision, split=split)
    except (OSError, datasets.exceptions.DatasetsError, ValueError) as error:
        # Offline and unreachable both end here: ConnectionError and FileNotFoundError are OSErrors.
        raise InputError(
            f"cannot load {source.repo} at {source.revision[:8]} from the Hub ({type(error).__name__}); "
            "go online, or give local files in the same layout with --input"
        ) from None


def column(record: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """`record[name]`, which must be of type `kind`; else InputError with the columns that are there."""
    if name not in record:
        raise InputError(f"{where}: no column {name!r}; found {', '.join(sorted(record)) or 'none'}")
    if not isinstance(record[name], kind):
        raise InputError(f"{where}: column {name!r} holds {type(record[name]).__name__}, expected {kind.__name__}")
    return record[name]


def make_row(where: str, **fields: Any) -> Row:
    """A Row; what it refuses is reported with `where`."""
    try:
        return Row(**fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def write_build(
    directory: Path, planned: Mapping[str, Any], files: Mapping[str, list[Row]], facts: Mapping[str, Any]
) -> None:
    """Write the non-empty row files and the manifest of a build, and print the facts."""
    if not any(files.values()):
        raise InputError(f"no row is left, nothing was written: {to_json(facts)}")
    for name, rows in files.items():
        if rows:
            write_rows(directory / name, rows)
        else:
            (directory / name).unlink(missing_ok=True)
    outputs = [name for name, rows in files.items() if rows]
    facts = {**facts, "outputs": {name: summarize(files[name]) for name in outputs}}
    write_manifest(directory, planned, outputs=outputs, facts=facts)
    print(f"{directory}: {to_json(facts, indent=1)}")


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts of a set of rows: K histogram, and rows whose best reward or a text stands there twice."""
    sizes = Counter(len(row.responses) for row in rows)
    return {
        "rows": len(rows),
        "responses": sum(len(row.responses) for row in rows),
        "rows_by_K": {str(size): sizes[size] for size in sorted(sizes)},
        "rows_with_tied_best": sum(row.rewards.count(max(row.rewards)) > 1 for row in rows),
        "rows_with_identical_responses": sum(len(set(row.responses)) < len(row.responses) for row in rows),
    }


def main() -> None:
    print(f"{'data set':34} {'revision':42} {'licence':8} {'records':>8} {'download':>9}")
    for source in (ULTRAFEEDBACK, *RELEASED.values(), ULTRAINTERACT):
        size = f"{source.download_mb} MB"
        print(f"{source.repo:34} {source.revision:42} {source.licence:8} {source.records:8,} {size:>9}")


if __name__ == "__main__":
    run_command(main)
