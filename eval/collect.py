"""From run directories to the committed records of results/.

python -m eval.collect --runs runs/tiny --seeds 0 1 2 --out results/tiny
python -m eval.collect --folders runs/tiny/table2 --out results/tiny/table2

The first form takes the folders seed-N of `--runs`; the second everything below the folders it names. There NAME=DIR
calls the policy of a run NAME, where its folder has another name.

scores.jsonl      every score of every seed, from eval.truth or from what else judges
trend.jsonl       every likelihood-trend record of every run, with policy, method, regime and seed
manifests.jsonl   the manifests behind them: a record's `manifest` is a `hash` here, with command and commit
cost.csv          wall and CPU seconds and peak memory of every stage: the one file that differs between runs
"""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.files import InputError, read_jsonl, run_command, write_jsonl, write_text
from data_prep.manifest import read_manifest
from eval.records import read_scores

DIGITS = 6  # decimals kept of a trend value, in nats


Stage = tuple[int | None, str, Path, dict[str, Any]]


def seed_stages(runs: Path, seeds: list[int]) -> Iterator[Stage]:
    """Seed, name, folder and manifest of every finished stage."""
    for seed in seeds:
        root = runs / f"seed-{seed}"
        for path in sorted(root.rglob("manifest.json")):
            yield seed, path.parent.relative_to(root).as_posix(), path.parent, read_manifest(path.parent)


def folder_stages(folders: list[str]) -> Iterator[Stage]:
    """The same for whatever is below some folders; the seed is that of the stage's settings, if it has one."""
    for item in folders:
        named, _, folder = item.rpartition("=")
        root = Path(folder)
        paths = sorted(root.rglob("manifest.json"))
        if not paths:
            raise InputError(f"{root}: no finished stage below it (no manifest.json); run the stages first")
        for path in paths:
            manifest = read_manifest(path.parent)
            name = (Path(named or root.name) / path.parent.relative_to(root)).as_posix()
            yield seed_of(manifest), name, path.parent, manifest


def seed_of(manifest: dict[str, Any]) -> int | None:
    """The seed among a stage's settings; a run keeps it in its recipe, answers with their decoding."""
    settings = manifest["identity"]["settings"]
    within = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return next((found["seed"] for found in within if "seed" in found), None)


def policy_of(name: str, folder: Path) -> str:
    """Which policy a stage is about: as its scores say, else by its folder."""
    if (folder / "scores.jsonl").exists():
        named = {score.policy for score in read_scores(folder / "scores.jsonl")}
        if len(named) == 1:
            return named.pop()
    return name.rpartition("/")[2]


def trend(stages: list[Stage]) -> Iterator[dict[str, Any]]:
    """All trend records, by seed, run and step. What follows the method in the policy's name is its regime."""
    for seed, name, folder, manifest in stages:
        if not (folder / "trend.jsonl").exists():
            continue
        policy = name.rpartition("/")[2]
        method, _, regime = policy.partition("-")
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
    parser.add_argument("--runs", type=Path, help="with the folders seed-N")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--folders", nargs="+", metavar="[NAME=]DIR", help="in place of --runs and --seeds")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    if bool(arguments.folders) == bool(arguments.runs and arguments.seeds):
        raise InputError("give --runs and --seeds, or --folders")
    if arguments.folders:
        found = list(folder_stages(arguments.folders))
        files = [folder / "scores.jsonl" for _, _, folder, _ in found if (folder / "scores.jsonl").exists()]
    else:
        found = list(seed_stages(arguments.runs, arguments.seeds))
        files = [arguments.runs / f"seed-{seed}" / "scores" / "scores.jsonl" for seed in arguments.seeds]
    scores = [dataclasses.asdict(score) for path in files for score in read_scores(path)]
    for name, records in (("scores.jsonl", scores), ("trend.jsonl", list(trend(found)))):
        if records:
            write_jsonl(arguments.out / name, records)
        else:  # a table of scores alone, or a figure of likelihoods alone
            (arguments.out / name).unlink(missing_ok=True)
    write_jsonl(
        arguments.out / "manifests.jsonl",
        (
            {
                "hash": manifest["hash"], "seed": seed, "stage": name, "policy": policy_of(name, folder),
                # --fresh clears the way for a run, and is no part of what it computes
                "command": manifest["command"].replace(" --fresh", ""), "commit": manifest["circumstances"]["commit"],
                "dirty": manifest["circumstances"]["dirty"], "identity": manifest["identity"],
            }
            for seed, name, folder, manifest in found
        ),
    )  # fmt: skip
    lines = ["seed,stage,wall_s,cpu_s,peak_mb"]
    for seed, name, _, manifest in found:
        cost = manifest["circumstances"]
        lines.append(f"{'' if seed is None else seed},{name},{cost['wall_s']},{cost['cpu_s']},{cost['peak_mb']}")
    write_text(arguments.out / "cost.csv", "\n".join(lines) + "\n")
    print(f"{arguments.out}: {len(scores)} scores, {len(found)} manifests")


if __name__ == "__main__":
    run_command(main)
