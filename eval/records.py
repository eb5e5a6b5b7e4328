"""Reading and pooling records: what tables, figures and claims have in common."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from data_prep.files import InputError, read_jsonl

REGIMES = ("gentle", "hard")
# In the order of the paper's Table 2, with what each method learns from.
METHODS = {
    "sft_best": "SFT on best of 4",
    "kto": "KTO",
    "ipo": "IPO",
    "dpo": "DPO",
    "dpo_x3": "DPO x 3",
    "nca_pair": "NCA, pairs",
    "infonca": "InfoNCA",
    "nca": "NCA",
}
RESPONSES = {"sft_best": 4, "kto": 2, "ipo": 2, "dpo": 2, "dpo_x3": 4, "nca_pair": 2, "infonca": 4, "nca": 4}


@dataclasses.dataclass(frozen=True)
class Score:
    """One measurement, a line of scores.jsonl: the contract between judging and tables.

    value, low, high: the mean over n prompts and its 95 % interval over prompts. judge: who judged, with its exact
    version. manifest: hash of the manifest of the answers that were judged.
    """

    scale: str
    seed: int
    policy: str  # "mu", or METHOD-REGIME
    decoding: str  # greedy, sampled, or prescribed (by each prompt)
    benchmark: str
    metric: str
    judge: str
    n: int
    value: float
    low: float
    high: float
    manifest: str

    def __post_init__(self) -> None:
        """InputError, naming the field, unless every field has its type and the numbers make sense."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise InputError(f"score: {field.name} = {value!r} must be a {field.type.__name__}")
        if not all(math.isfinite(number) for number in (self.value, self.low, self.high)):
            raise InputError(f"score: value {self.value} [{self.low}, {self.high}] must be finite")
        if self.n < 1 or not self.low <= self.high:
            raise InputError(f"score: n = {self.n} must be above 0 and low {self.low} not above high {self.high}")


def read_scores(path: Path | str) -> list[Score]:
    """Read and validate scores.jsonl; InputError with file, line and reason."""
    names = {field.name for field in dataclasses.fields(Score)}
    scores = []
    for number, record in read_jsonl(path):
        if set(record) != names:
            raise InputError(
                f"{path}:{number}: fields {sorted(set(record) ^ names)} are missing or unknown; judge again"
            )
        try:
            scores.append(Score(**record))
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
    return scores


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval. seeds: the values it is the mean of."""

    value: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def show(self, digits: int) -> str:
        """The value with its interval, if it has one."""
        value = f"{self.value:.{digits}f}"
        return value if math.isnan(self.low) else f"{value} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def pool(values: Sequence[float], within: tuple[float, float] | None = None) -> Estimate:
    """The mean over seeds. With at least two seeds the interval is Student's t over the seeds' means (each seed has
    its own world, prompts and mu, so this covers both prompts and seeds); with one seed it is `within`, that seed's
    interval over prompts, or none (NaN)."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        low, high = within or (math.nan, math.nan)
        return Estimate(mean, low, high, tuple(values))
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, tuple(values))


@dataclasses.dataclass(frozen=True)
class Results:
    """The records of one results folder, indexed for look-up."""

    scores: dict[tuple[str, str, str, str], dict[int, Score]]  # policy, decoding, benchmark, metric, then seed
    ends: dict[str, dict[int, dict[str, Any]]]  # policy to seed to its last held-out trend record
    work: dict[str, dict[str, Any]]  # policy to the work of its first seed: steps, responses and tokens seen
    seeds: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path | str) -> "Results":
        """Read scores.jsonl, trend.jsonl and manifests.jsonl."""
        folder = Path(folder)
        scores: dict[tuple[str, str, str, str], dict[int, Score]] = {}
        for found in read_scores(folder / "scores.jsonl"):
            key = (found.policy, found.decoding, found.benchmark, found.metric)
            scores.setdefault(key, {})[found.seed] = found
        ends: dict[str, dict[int, dict[str, Any]]] = {}
        for _, record in read_jsonl(folder / "trend.jsonl"):
            if record["split"] == "heldout":
                ends.setdefault(record["policy"], {})[record["seed"]] = record  # steps come in order
        work = {}
        for _, record in read_jsonl(folder / "manifests.jsonl"):
            if "work" in record["identity"]["facts"]:
                work.setdefault(record["policy"], record["identity"]["facts"]["work"])
        seeds = tuple(sorted({seed for found in scores.values() for seed in found}))
        if not seeds:
            raise InputError(f"{folder}: no scores; run scripts/reproduce.sh")
        return cls(scores, ends, work, seeds)

    def score(self, policy: str, decoding: str, benchmark: str, metric: str) -> Estimate | None:
        """A score over all seeds; None if it was not measured."""
        found = self.scores.get((policy, decoding, benchmark, metric))
        if found is None:
            return None
        first = found[min(found)]
        return pool([found[seed].value for seed in sorted(found)], (first.low, first.high))

    def end(self, policy: str, *path: str) -> Estimate | None:
        """A number of the last held-out trend record, such as ("chosen", "log_ratio"), over all seeds."""
        if policy not in self.ends:
            return None
        values = []
        for seed in sorted(self.ends[policy]):
            value: Any = self.ends[policy][seed]
            for key in path:
                value = value[key]
            values.append(value)
        return pool(values)

    def difference(self, policy: str, other: str, decoding: str, benchmark: str, metric: str) -> Estimate | None:
        """A score of `policy` less that of `other`, paired by seed."""
        ours = self.scores.get((policy, decoding, benchmark, metric))
        theirs = self.scores.get((other, decoding, benchmark, metric))
        if not ours or not theirs:
            return None
        if set(ours) != set(theirs):
            raise InputError(f"{policy} and {other} were measured on other seeds; run scripts/reproduce.sh")
        return pool([ours[seed].value - theirs[seed].value for seed in sorted(ours)])

    def end_difference(self, policy: str, other: str, *path: str) -> Estimate | None:
        """A trend number of `policy` less that of `other`, paired by seed."""
        ours, theirs = self.end(policy, *path), self.end(other, *path)
        if ours is None or theirs is None:
            return None
        if set(self.ends[policy]) != set(self.ends[other]):
            raise InputError(f"{policy} and {other} were trained on other seeds; run scripts/reproduce.sh")
        return pool([a - b for a, b in zip(ours.seeds, theirs.seeds, strict=True)])
