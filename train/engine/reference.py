"""log mu(y|x), computed once and kept on disk, for all methods, strengths, seeds and subsets of K.

    python -m train.engine.reference --model MU --rows ROWS [ROWS...] --cache DIR --recipe RECIPE

The cache is keyed by content: one file for each model (weights, tokenizer and template, dtype), one line for
each (prompt ids, response ids). A run that finds a line missing computes it; one that finds it recomputes a
sample of them before it trusts the file.
"""

import argparse
import random
from pathlib import Path

from torch import nn
from tqdm import tqdm

from data_prep.files import InputError, read_jsonl, run_command, sha256_text, to_json, write_jsonl
from data_prep.rows import read_rows
from train.engine.logps import logps_of_rows
from train.engine.models import Checkpoint
from train.engine.recipe import AlignmentRecipe
from train.engine.tokens import EncodedRow, Encoder

TOLERANCE = 1e-3  # nats a response, float32: another batch shape moves the last digits
SAMPLE = 16  # responses recomputed when a cache is read
CHUNK = 2048  # rows between two writes of the cache


def response_key(prompt_ids: list[int], response_ids: list[int]) -> str:
    """Content key of one response behind its prompt."""
    return sha256_text(to_json([prompt_ids, response_ids]))[:32]


class ReferenceCache:
    """The log-probs of one reference model, by content of prompt and response."""

    def __init__(self, directory: Path | str, checkpoint: Checkpoint, dtype: str = "float32"):
        """Open (or begin) the cache of `checkpoint` in `directory`; InputError if its file is damaged."""
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
        """Row id to the log-probs of its K responses under `model`, which must be the cache's checkpoint."""
        keys = {row.id: [response_key(row.prompt_ids, ids) for ids in row.response_ids] for row in rows}
        self._check(model, [row for row in rows if all(key in self.known for key in keys[row.id])], keys, batch_size)
        missing = [row for row in rows if any(key not in self.known for key in keys[row.id])]
        with tqdm(total=len(missing), desc="reference log-probs", unit="row", disable=not missing) as bar:
            for start in range(0, len(missing), CHUNK):
                chunk = missing[start : start + CHUNK]
                for row, values in zip(chunk, logps_of_rows(model, chunk, batch_size), strict=True):
                    self.known.update(zip(keys[row.id], values, strict=True))
                write_jsonl(self.path, ({"key": key, "logps": value} for key, value in sorted(self.known.items())))
                bar.update(len(chunk))
        return {name: [self.known[key] for key in row_keys] for name, row_keys in keys.items()}

    def _check(self, model: nn.Module, rows: list[EncodedRow], keys: dict[str, list[str]], batch_size: int) -> None:
        sample = random.Random(0).sample(rows, min(len(rows), SAMPLE))
        for row, values in zip(sample, logps_of_rows(model, sample, batch_size), strict=True):
            for key, value in zip(keys[row.id], values, strict=True):
                if not abs(self.known[key] - value) <= TOLERANCE:
                    raise InputError(
                        f"{self.path}: holds {self.known[key]:.4f} for a response of row {row.id!r}, the model "
                        f"gives {value:.4f}; delete the file and run again"
                    )


def main() -> None:
    """Fill the cache for some files of rows."""
    parser = argparse.ArgumentParser(prog="python -m train.engine.reference", description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="directory of the reference policy mu, or its Hub id")
    parser.add_argument("--model-revision", help="commit, for a model from the Hub")
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--cache", required=True, help="directory")
    AlignmentRecipe.add_arguments(parser)
    arguments = parser.parse_args()
    recipe = AlignmentRecipe.from_arguments(arguments)
    checkpoint = Checkpoint(arguments.model, arguments.model_revision)
    model, tokenizer = checkpoint.load()
    cache = ReferenceCache(arguments.cache, checkpoint)
    encoder = Encoder(tokenizer, recipe.max_prompt_tokens, recipe.max_response_tokens)
    for path in arguments.rows:
        cache.logps(model, encoder.rows(read_rows(path)), recipe.micro_batch)
    print(f"{len(cache.known)} reference log-probs in {cache.path}")


if __name__ == "__main__":
    run_command(main)
