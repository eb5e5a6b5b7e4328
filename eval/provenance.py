"""From a number in a table back to its records: what a cell was computed from.

A reference is "s3" (a score record), "t5" (the trend of one run on one split) or "m" + hash (a manifest), with the
number of the record among all of a scale's folders.
"""

import csv
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.files import InputError, read_jsonl, to_json
from eval import claims, tables
from eval.curves import QUANTITIES
from eval.records import REGIMES, Results, read_scores

# References of a cell, from the heading above its table, the number of its row in the file, the row and the column.
Links = Callable[[str, int, dict[str, str], str], list[str]]


class Traced(dict):
    """A look-up that notes which of its keys were asked for."""

    def __init__(self, items: dict[Any, Any]):
        """items: what is looked up."""
        super().__init__(items)
        self.asked: list[Any] = []

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dict."""
        self.asked += [key] * (key in self)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.append(key)
        return super().__getitem__(key)


@dataclasses.dataclass
class Records:
    """All records of the folders, numbered; a reference is "s3" (score), "t5" (trend of one run) or "m" + hash."""

    scores: list[dict[str, Any]]
    trend: list[dict[str, Any]]  # one entry for each run and split, with its values over the steps
    manifests: list[dict[str, Any]]

    @classmethod
    def read(cls, root: Path) -> "Records":
        """Read scores.jsonl, trend.jsonl and manifests.jsonl of `root` and the folders below it."""
        found = cls([], [], [])
        for folder in folders(root):
            name = folder.relative_to(root).as_posix()
            if (folder / "scores.jsonl").exists():
                for line, score in enumerate(read_scores(folder / "scores.jsonl"), start=1):
                    found.scores.append({"folder": name, "line": line, **dataclasses.asdict(score)})
            if (folder / "trend.jsonl").exists():
                found.trend += trend_of(folder / "trend.jsonl", name)
            if (folder / "manifests.jsonl").exists():
                for _, record in read_jsonl(folder / "manifests.jsonl"):
                    # As text: JavaScript would write 1.0 as 1, and the hash is that of the text.
                    identity = to_json(record.get("identity", {}), indent=1)
                    found.manifests.append({"folder": name, **record, "identity": identity})
        return found

    def tracer(self, folder: str, results: Results) -> Callable[[Callable[[Results], Any]], list[str]]:
        """A function that says which records a computation on `results` reads."""
        traced = dataclasses.replace(
            results, scores=Traced(results.scores), ends=Traced(results.ends), work=Traced(results.work)
        )
        scores: dict[tuple[str, ...], list[str]] = {}
        for i, score in enumerate(self.scores):
            if score["folder"] == folder:
                key = tuple(score[name] for name in ("policy", "decoding", "benchmark", "metric"))
                scores.setdefault(key, []).append(f"s{i}")
        runs: dict[str, list[str]] = {}
        for i, run in enumerate(self.trend):
            if run["folder"] == folder and run["split"] == "heldout":
                runs.setdefault(run["policy"], []).append(f"t{i}")

        def trace(compute: Callable[[Results], Any]) -> list[str]:
            for looked_up in (traced.scores, traced.ends, traced.work):
                looked_up.asked.clear()
            compute(traced)
            found = [reference for key in traced.scores.asked for reference in scores[key]]
            found += [reference for key in (*traced.ends.asked, *traced.work.asked) for reference in runs.get(key, [])]
            return list(dict.fromkeys(found))

        return trace


def folders(root: Path) -> list[Path]:
    """The folder and those below it."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name one with records, such as results/tiny")
    return [root, *sorted(path for path in root.rglob("*") if path.is_dir())]


def trend_of(path: Path, folder: str) -> list[dict[str, Any]]:
    """The records of a trend.jsonl, as one entry for each run and split: lists of values over its steps."""
    runs: dict[tuple[str, int, str], dict[str, Any]] = {}
    for line, record in read_jsonl(path):
        try:
            names = {key: record[key] for key in ("policy", "method", "regime", "seed", "split", "manifest")}
            run = runs.setdefault(
                (names["policy"], names["seed"], names["split"]),
                {"folder": folder, **names, "beta": record.get("beta"), "lines": [], "steps": [], "kl": [],
                 "accuracy": [], "prompts": record.get("prompts"), "series": {}},
            )  # fmt: skip
            run["lines"].append(line)
            run["steps"].append(record["step"])
            run["kl"].append(record.get("kl"))
            run["accuracy"].append(record.get("accuracy"))
            sides = {"chosen": record["chosen"], "rejected": record["rejected"]}
            sides |= {f"rank {found['rank']}": found for found in record.get("ranks", [])}
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}:{line}: not a trend record ({error}); collect again") from None
        for side, values in sides.items():
            series = run["series"].setdefault(side, {})
            for quantity in QUANTITIES:
                if quantity in values:
                    series.setdefault(quantity, []).append(values[quantity])
    return list(runs.values())


def links(folder: Path, path: Path, records: Records, root: Path) -> Links:
    """What leads from a cell of a Markdown file's tables to its records: for tables.md and claims.md what its cell
    was computed from, for another table the manifests and records that the .csv beside it names."""
    name = folder.relative_to(root).as_posix()
    if path.name in ("tables.md", "claims.md") and (folder / "scores.jsonl").exists():
        trace = records.tracer(name, Results.read(folder))
        return (table_links if path.name == "tables.md" else claim_links)(trace)
    if path.with_suffix(".csv").exists():
        with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
            return csv_links(list(csv.DictReader(file)), name, records)
    return lambda *_: []


def table_links(trace: Callable[[Callable[[Results], Any]], list[str]]) -> Links:
    """References of eval.tables' cells."""

    def find(heading: str, number: int, row: dict[str, str], column: str) -> list[str]:
        regime = next((regime for regime in REGIMES if regime in heading.lower()), "")
        policy = {label: policy for policy, label in tables.policies(regime).items()}.get(row.get("method"))
        if policy is None or column in ("method", "K"):
            return []
        cells = {**tables.QUALITY, **tables.TASKS}
        if column in cells:
            return trace(lambda results: cells[column][0](results, policy))
        return trace(lambda results: results.work.get(policy))

    return find


def claim_links(trace: Callable[[Callable[[Results], Any]], list[str]]) -> Links:
    """References of eval.claims' cells: the measured value, its seeds and the verdict."""
    known = {f"{claim.text} ({'>' if claim.above else '<'} {claim.threshold:g})": claim for claim in claims.CLAIMS}

    def find(heading: str, number: int, row: dict[str, str], column: str) -> list[str]:
        if column in ("claim", "regime") or row.get("claim") not in known:
            return []
        return trace(lambda results: known[row["claim"]].quantity(results, row["regime"]))

    return find


def csv_links(rows: list[dict[str, str]], folder: str, records: Records) -> Links:
    """References of a table whose CSV has the same rows, in the same order, with `policy`, `manifests` and `ours`: the
    records of that policy and those manifests whose mean is that number (or a hundredth of it), else the manifests."""

    def find(heading: str, number: int, row: dict[str, str], column: str) -> list[str]:
        if column != "ours" or number >= len(rows):
            return []
        policy, ours = rows[number].get("policy"), rows[number].get("ours")
        named = set((rows[number].get("manifests") or "").split())
        groups: dict[tuple[str, ...], list[int]] = {}  # a manifest can have several benchmarks
        for i, score in enumerate(records.scores):
            if score["folder"] == folder and score["policy"] == policy and score["manifest"] in named:
                groups.setdefault((score["benchmark"], score["metric"], score["decoding"]), []).append(i)
        found = []
        for members in groups.values() if ours else ():
            mean = math.fsum(records.scores[i]["value"] for i in members) / len(members)
            if any(math.isclose(factor * mean, float(ours), abs_tol=1e-5) for factor in (1, 100)):
                found += [f"s{i}" for i in members]
        return found or [f"m{name}" for name in sorted(named)]

    return find
