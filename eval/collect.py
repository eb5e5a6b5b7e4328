"""From run directories to the committed records of results/tiny/.

python -m eval.collect --runs runs/tiny --seeds 0 1 2 --out results/tiny

scores.jsonl      every score of every seed, from eval.truth
trend.jsonl       every likelihood-trend record of every run, with policy, method, regime and seed
manifests.jsonl   the manifests behind them: a record's `manifest` is a `hash` here, with command and commit
cost.csv          wall and CPU seconds and peak memory of every stage: the one file that differs between runs
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.files import read_jsonl, run_command, write_jsonl, write_text
from data_prep.manifest import read_manifest
from eval.records import read_scores

DIGITS = 6  # decimals kept of a trend value, in nats


def stages(runs: Path, seeds: list[int]) -> Iterator[tuple[int, str, Path, dict[str, Any]]]:
    """Seed, name, folder and manifest of every finished stage."""
    for seed in seeds:
        root = runs / f"seed-{seed}"
        for path in sorted(root.rglob("manifest.json")):
            yield seed, path.parent.relative_to(root).as_posix(), path.parent, read_manifest(path.parent)


def trend(runs: Path, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """All trend records, by seed, run and step."""
    for seed, name, folder, manifest in stages(runs, seeds):
        if not (folder / "trend.jsonl").exists():
            continue
        policy = name.rpartition("/")[2]
        method, _, regime = policy.rpartition("-")
        for _, record in read_jsonl(folder / "trend.jsonl"):
            labels = {"seed": seed, "policy": policy, "method": method, "regime": regime}
            yield {**labels, **rounded(record), "manifest": manifest["hash"]}


def rounded(value: Any) -> Any:
    """The same JSON value with its floats rounded."""
    if isinstance(value, float):
        return round(value, DIGITS)
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Collect."""
    parser = argparse.ArgumentParser(prog="python -m eval.collect")
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--seeds", required=True, type=int, nargs="+")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    found = list(stages(arguments.runs, arguments.seeds))
    files = [arguments.runs / f"seed-{seed}" / "scores" / "scores.jsonl" for seed in arguments.seeds]
    scores = [dataclasses.asdict(score) for path in files for score in read_scores(path)]
    write_jsonl(arguments.out / "scores.jsonl", scores)
    write_jsonl(arguments.out / "trend.jsonl", trend(arguments.runs, arguments.seeds))
    write_jsonl(
        arguments.out / "manifests.jsonl",
        (
            {
                "hash": manifest["hash"], "seed": seed, "stage": name, "policy": name.rpartition("/")[2],
                # --fresh clears the way for a run, and is no part of what it computes
                "command": manifest["command"].replace(" --fresh", ""), "commit": manifest["circumstances"]["commit"],
                "dirty": manifest["circumstances"]["dirty"], "identity": manifest["identity"],
            }
            for seed, name, _, manifest in found
        ),
    )  # fmt: skip
    lines = ["seed,stage,wall_s,cpu_s,peak_mb"]
    for seed, name, _, manifest in found:
        cost = manifest["circumstances"]
        lines.append(f"{seed},{name},{cost['wall_s']},{cost['cpu_s']},{cost['peak_mb']}")
    write_text(arguments.out / "cost.csv", "\n".join(lines) + "\n")
    print(f"{arguments.out}: {len(scores)} scores of {len(arguments.seeds)} seed(s)")


if __name__ == "__main__":
    run_command(main)
