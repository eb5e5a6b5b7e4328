"""log mu(y|x), computed once and kept on disk, for all methods, strengths, seeds and subsets of K.

    python -m train.engine.reference --recipe RECIPE --model MU --rows ROWS --eval-rows ROWS --cache DIR

The cache is keyed by content: one file for each model (weights, tokenizer and template, dtype), one line for
each (prompt ids, response ids). A run that finds a line missing computes it; one that finds it recomputes a
sample of them before it trusts the file.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from data_prep.files import InputError, read_jsonl, run_command, sha256_text, to_json, write_jsonl
from data_prep.rows import read_rows
from train.engine.logps import logps_of_rows
from train.engine.models import Checkpoint, as_reference, load_policy, nf4_compute
from train.engine.recipe import AlignmentRecipe
from train.engine.tokens import EncodedRow, Encoder

# Nats a response of n tokens, divided by the root of n: what another batch shape moves in the last digits.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
SAMPLE = 16  # responses recomputed when a cache is read
CHUNK = 2048  # rows between two writes of the cache


def tolerance_of(precision: str) -> float:
    """TOLERANCE of a precision such as "float32" or "nf4/bfloat16"."""
    return TOLERANCE[precision.rpartition("/")[2]]


def response_key(prompt_ids: list[int], response_ids: list[int], unattended: int | None = None) -> str:
    """Content key of one response behind its prompt."""
    content = [prompt_ids, response_ids] if unattended is None else [prompt_ids, response_ids, unattended]
    return sha256_text(to_json(content))[:32]


def precision_of(recipe: AlignmentRecipe) -> str:
    """In what arithmetic the reference log-probs of a run are computed: "float32", "bfloat16", "nf4/bfloat16", ..."""
    return f"nf4/{nf4_compute(recipe)}" if recipe.tuning == "qlora" else recipe.dtype


def _keys(rows: list[EncodedRow]) -> dict[str, list[str]]:
    """Row id to the content keys of its responses."""
    return {row.id: [response_key(row.prompt_ids, ids, row.unattended) for ids in row.response_ids] for row in rows}


class ReferenceCache:
    """The log-probs of one reference model, by content of prompt and response."""

    def __init__(self, directory: Path | str, checkpoint: Checkpoint, dtype: str = "float32"):
        """Open (or begin) the cache of `checkpoint` in `directory`; InputError if its file is damaged.
        dtype: `precision_of` the run."""
        self.dtype = dtype
        self.path = Path(directory) / f"{sha256_text(checkpoint.digest + dtype)[:16]}.jsonl"
        self.known: dict[str, float] = {}
        if self.path.exists():
            for number, line in read_jsonl(self.path):
                try:
                    self.known[line["key"]] = float(line["logps"])
                except (KeyError, TypeError, ValueError):
                    raise InputError(
                        f"{self.path}:{number}: not a line of a reference cache; delete the file"
                    ) from None

    def logps(self, model: nn.Module, rows: list[EncodedRow], batch_size: int) -> dict[str, list[float]]:
        """Row id to the log-probs of its K responses under `model`, which must be the cache's checkpoint. What is
        missing is computed by all processes together and written by the first one."""
        keys = _keys(rows)
        self._check(model, [row for row in rows if all(key in self.known for key in keys[row.id])], keys, batch_size)
        missing = self._missing(rows, keys)
        state = PartialState()
        with tqdm(
            total=len(missing), desc="reference log-probs", unit="row",
            disable=not missing or not state.is_main_process,
        ) as bar:  # fmt: skip
            for start in range(0, len(missing), CHUNK):
                chunk = missing[start : start + CHUNK]
                mine = chunk[state.process_index :: state.num_processes]
                values = zip((row.id for row in mine), logps_of_rows(model, mine, batch_size), strict=True)
                for name, found in gather_object(list(values)):
                    self.known.update(zip(keys[name], found, strict=True))
                if state.is_main_process:
                    lines = ({"key": key, "logps": value} for key, value in sorted(self.known.items()))
                    write_jsonl(self.path, lines)
                bar.update(len(chunk))
        return {name: [self.known[key] for key in row_keys] for name, row_keys in keys.items()}

    def lookup(self, rows: list[EncodedRow]) -> dict[str, list[float]]:
        """`logps` of rows that are all known; InputError if not. For models too large for one device."""
        keys = _keys(rows)
        missing = self._missing(rows, keys)
        if missing:
            raise InputError(
                f"{self.path}: holds no reference log-probs of row {missing[0].id!r} and {len(missing) - 1} more, and "
                "a sharded model cannot make them; fill it first with python -m train.engine.reference"
            )
        return {name: [self.known[key] for key in row_keys] for name, row_keys in keys.items()}

    def _missing(self, rows: list[EncodedRow], keys: dict[str, list[str]]) -> list[EncodedRow]:
        return [row for row in rows if any(key not in self.known for key in keys[row.id])]

    def _check(self, model: nn.Module, rows: list[EncodedRow], keys: dict[str, list[str]], batch_size: int) -> None:
        sample = random.Random(0).sample(rows, min(len(rows), SAMPLE))
        tolerance = tolerance_of(self.dtype)
        for row, values in zip(sample, logps_of_rows(model, sample, batch_size), strict=True):
            for key, ids, value in zip(keys[row.id], row.response_ids, values, strict=True):
                if not abs(self.known[key] - value) <= tolerance * math.sqrt(len(ids)):
                    raise InputError(
                        f"{self.path}: holds {self.known[key]:.4f} for a response of row {row.id!r}, the model "
                        f"gives {value:.4f}; delete the file and run again"
                    )


def main() -> None:
    """Fill the cache for some files of rows."""
    parser = argparse.ArgumentParser(prog="python -m train.engine.reference", description=__doc__.split("\n")[0])
    parser.add_argument("--cache", required=True, help="directory")
    parser.add_argument("--spread", action="store_true", help="spread one model over all devices of this machine")
    AlignmentRecipe.add_arguments(parser)
    arguments = parser.parse_args()
    recipe = AlignmentRecipe.from_arguments(arguments)
    checkpoint, state = Checkpoint.of(recipe), PartialState(cpu=not torch.cuda.is_available())
    policy, tokenizer = load_policy(checkpoint, recipe, state.device, spread=arguments.spread)
    cache = ReferenceCache(arguments.cache, checkpoint, precision_of(recipe))
    encoder = Encoder.of(tokenizer, recipe)
    with as_reference(policy):
        for path in (recipe.rows, recipe.eval_rows):
            cache.logps(policy, encoder.rows(read_rows(path)), recipe.micro_batch)
    print(f"{len(cache.known)} reference log-probs in {cache.path}")


if __name__ == "__main__":
    run_command(main)
