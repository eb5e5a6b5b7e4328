"""Likelihood curves over training: from trend records, from other people's logs, and from the paper.

A source is one of
    RUN/                  a run directory of this project (plan.json, trend.jsonl)
    trend.jsonl           of a run, or of a results folder with many runs
    trainer_state.json    of a Trainer (or a directory with one): rewards/chosen and rewards/rejected in its log, as of
                          TRL, or rewards/A0 (chosen) and rewards/A1, ... (rejected, averaged), as of the paper's
                          released code; eval_rewards/... is taken where it is there
    *.csv                 columns step, method, chosen, rejected, and seed if there are several; lines from # on are
                          skipped. Its numbers are taken to be in the unit that is drawn
Curves of this project are those of held-out rows.
"""

import csv
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from data_prep.files import InputError, read_json, read_jsonl, to_json
from eval.records import METHODS

SIDES = ("chosen", "rejected")
QUANTITIES = {
    "r": "r = beta (log pi - log mu)",
    "log_ratio": "log pi - log mu, nats a response",
    "logps": "log pi, nats a response",
    "r_per_token": "r = beta (log pi - log mu), a token",
    "log_ratio_per_token": "log pi - log mu, nats a token",
    "logps_per_token": "log pi, nats a token",
}
PAPER_COLUMNS = {  # of results/paper/figure2_likelihood.csv
    ("dpo", "chosen"): "dpo_chosen",
    ("dpo", "rejected"): "dpo_rejected",
    ("nca_pair", "chosen"): "nca_chosen_implied_by_margin",
    ("nca_pair", "rejected"): "nca_rejected",
}
Curve = list[tuple[float, float, float, float]]  # place in training, mean, lowest and highest seed


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. Runs with one label are the seeds of one line; method is "" where it is not known."""

    label: str
    method: str
    seed: int
    points: tuple[tuple[float, float, float], ...]  # step, chosen, rejected
    steps: float  # of the whole training
    settings: str = ""  # what else decides its curve, as far as the source says: seeds of one line have the same


def pooled(lines: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Curve:
    """Mean and range of several (places, values), at the places of the first, with straight lines between
    measurements."""
    grid = lines[0][0]
    at_grid = numpy.array([numpy.interp(grid, places, values) for places, values in lines])
    return list(zip(grid, at_grid.mean(0), at_grid.min(0), at_grid.max(0), strict=True))


def curves(records: list[dict[str, Any]], quantity: str) -> dict[tuple[str, str, str], Curve]:
    """(regime, method, side) to its curve over training, from held-out records.

    Seeds can differ in their number of steps (a prompt with all rewards tied gives no pair): each is taken as a
    share of its own training, at the shares of the first seed.
    """
    series = ((r["regime"], r["method"], side, r["seed"], r["step"], r[side][quantity])
              for r in records if r["split"] == "heldout" for side in SIDES)  # fmt: skip
    return _over_seeds(series)


def rank_curves(records: list[dict[str, Any]], quantity: str) -> dict[tuple[str, str, str], Curve]:
    """(regime, method, rank) to the curve of the responses of that rank of reward ("1" is the best)."""
    series = ((r["regime"], r["method"], str(found["rank"]), r["seed"], r["step"], found[quantity])
              for r in records if r["split"] == "heldout" for found in r["ranks"])  # fmt: skip
    return _over_seeds(series)


def _over_seeds(series: Iterator[tuple[str, str, str, int, int, float]]) -> dict[tuple[str, str, str], Curve]:
    seeds: dict[tuple[str, str, str], dict[int, list[tuple[int, float]]]] = {}
    for *key, seed, step, value in series:
        seeds.setdefault(tuple(key), {}).setdefault(seed, []).append((step, value))
    found = {}
    for key, of_seed in seeds.items():
        lines = []
        for seed in sorted(of_seed):
            steps, values = numpy.array(sorted(of_seed[seed])).T
            lines.append((steps / max(steps[-1], 1), values))
        found[key] = pooled(lines)
    return found


def read_trend(path: Path) -> list[dict[str, Any]]:
    """The records of a trend.jsonl or of a run directory, each with policy, method, regime and seed; InputError
    unless they are trend records."""
    path = path / "trend.jsonl" if path.is_dir() else path
    labels = _labels_of_run(path.parent)
    records = []
    for number, record in read_jsonl(path):
        if not {"step", "split", *SIDES} <= set(record) or not {"policy", "method"} <= {*record, *labels}:
            raise InputError(f"{path}:{number}: not a likelihood-trend record (or without plan.json beside it)")
        records.append({**labels, **record})
    if not records:
        raise InputError(f"{path}: no records")
    return records


def _labels_of_run(folder: Path) -> dict[str, Any]:
    """What the records of a run directory do not say themselves."""
    if not (folder / "plan.json").exists():
        return {}
    settings = read_json(folder / "plan.json")["settings"]
    regime, recipe = settings["recipe_name"], dict(settings["recipe"])
    return {"policy": f"{settings['method']}-{regime}", "method": settings["method"], "regime": regime,
            "seed": recipe.pop("seed"), "settings": to_json(recipe, sort_keys=True)}  # fmt: skip


def read_runs(path: Path, quantity: str) -> list[Run]:
    """The runs of one source (see above), in `quantity`; InputError if it is none, or has not that quantity."""
    if path.is_dir():
        names = [path / name for name in ("trend.jsonl", "trainer_state.json") if (path / name).exists()]
        names += sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda found: int(found.parent.name[11:]))
        if not names:
            raise InputError(f"{path}: holds neither trend.jsonl nor trainer_state.json; name a run or a file")
        path = names[0] if names[0].parent == path else names[-1]
    if path.suffix == ".csv":
        return _runs_of_csv(path)
    if path.suffix == ".json":
        return [_run_of_trainer(path, quantity)]
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in read_trend(path):
        if record["split"] == "heldout":
            runs.setdefault((record["policy"], record["seed"]), []).append(record)
    found = []
    for (policy, seed), records in runs.items():
        method = records[0]["method"]
        label = policy.replace(method, METHODS.get(method, method), 1).replace("-", ", ", 1)
        try:
            points = [(record["step"], *(record[side][quantity] for side in SIDES)) for record in records]
        except KeyError as error:
            raise InputError(f"{path}: has no {error} for {policy}; name another --quantity") from None
        settings = records[0].get("settings", f"beta {records[0].get('beta')}")
        found.append(_run(path, label, method, seed, points, settings=settings))
    return found


def _runs_of_csv(path: Path) -> list[Run]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    runs: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for number, row in enumerate(csv.DictReader(lines), start=1):
        try:
            values = tuple(float(row[column]) for column in ("step", *SIDES))
            runs.setdefault((row["method"], int(row.get("seed") or 0)), []).append(values)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: row {number} ({error}): expected numbers in step, chosen, rejected and a method"
            ) from None
    if not runs:
        raise InputError(f"{path}: no rows")
    labels = {label: name for name, label in METHODS.items()}
    return [
        _run(path, f"{METHODS.get(method, method)} ({path.stem})", labels.get(method, method), seed, points)
        for (method, seed), points in runs.items()
    ]


def _run_of_trainer(path: Path, quantity: str) -> Run:
    state = read_json(path)
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise InputError(f"{path}: not a trainer_state.json (no log_history)")
    if quantity != "r":
        raise InputError(f"{path}: a Trainer logs r = beta (log pi - log mu) alone; leave out --quantity {quantity}")
    folder = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    for prefix, note in (("eval_rewards/", ""), ("rewards/", ", training batches")):
        logged = [found for entry in state["log_history"] if (found := _logged(entry, prefix))]
        if logged:
            try:
                points = [tuple(map(float, point)) for point in logged]
                return _run(path, folder.resolve().name + note, "", 0, points, float(state.get("max_steps") or 0))
            except (TypeError, ValueError) as error:
                raise InputError(f"{path}: log_history: {error}; mend or remove the entry") from None
    raise InputError(f"{path}: log_history has no rewards/chosen and rewards/rejected; log them, or give a .csv")


def _logged(entry: dict[str, Any], prefix: str) -> tuple[Any, Any, Any] | None:
    """Step, chosen and rejected of one entry of log_history, if it has them."""
    if {"step", f"{prefix}chosen", f"{prefix}rejected"} <= set(entry):
        return entry["step"], entry[f"{prefix}chosen"], entry[f"{prefix}rejected"]
    worse = [value for key, value in entry.items() if re.fullmatch(rf"{prefix}A[1-9]\d*", key)]
    if "step" in entry and f"{prefix}A0" in entry and worse:
        return entry["step"], entry[f"{prefix}A0"], math.fsum(worse) / len(worse)
    return None


def _run(
    path: Path, label: str, method: str, seed: int, points: list[Any], steps: float = 0.0, settings: str = ""
) -> Run:
    ordered = tuple(sorted({point[0]: point for point in points}.values()))  # a resumed Trainer logs a step again
    if not all(math.isfinite(number) for point in ordered for number in point):
        raise InputError(f"{path}: {label}: a step or value that is not finite; mend or remove it")
    return Run(label, method, seed, ordered, max(steps, ordered[-1][0], 1.0), settings)


def read_paper(path: Path) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """The published curves: (method, side) to [(share of training, r)]."""
    if not path.exists():
        raise InputError(f"{path}: no such file; the published curves are in results/paper/")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    if not rows:
        raise InputError(f"{path}: not the digitised Figure 2 (no rows)")
    try:
        return {
            key: [(float(row["epoch_fraction"]), float(row[column])) for row in rows]
            for key, column in PAPER_COLUMNS.items()
        }
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not the digitised Figure 2 ({error})") from None
