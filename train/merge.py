"""Merge: an adapter and its base become one model, and how far that moves the log-probs is measured.

    python -m train.merge --policy RUN/policy --rows ROWS --out DIR

Weights that were quantized while the adapter was trained (QLoRA) are merged unquantized, which makes another model:
evaluate the one that you publish. The log-probs of both are compared on responses of ROWS, and the differences
stand in DIR/manifest.json.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import torch
from peft import PeftModel

from data_prep.files import InputError, run_command
from data_prep.manifest import plan, up_to_date, write_manifest
from data_prep.rows import read_rows
from train.engine.experts import fuse_experts
from train.engine.logps import logps_of_rows
from train.engine.models import Checkpoint
from train.engine.rundir import save_policy
from train.engine.tokens import EncodedRow, Encoder


@dataclasses.dataclass(frozen=True)
class Parity:
    """Merged against unmerged: differences of log pi(y|x) in nats a response, over n responses."""

    responses: int
    mean_difference: float
    mean_absolute_difference: float
    largest_difference: float
    mean_logps: float

    @classmethod
    def of(cls, merged: list[list[float]], unmerged: list[list[float]]) -> "Parity":
        """Compare the log-probs of the same rows."""
        pairs = [
            (a, b) for ours, theirs in zip(merged, unmerged, strict=True) for a, b in zip(ours, theirs, strict=True)
        ]
        differences = [a - b for a, b in pairs]
        return cls(
            len(pairs), math.fsum(differences) / len(pairs), math.fsum(map(abs, differences)) / len(pairs),
            max(map(abs, differences)), math.fsum(b for _, b in pairs) / len(pairs),
        )  # fmt: skip


def merge(adapter: Checkpoint, rows: list[EncodedRow], out: Path, dtype: torch.dtype, batch_size: int) -> Parity:
    """Write the merged model to `out`/policy, read it again, and compare. InputError if there is no adapter."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = adapter.load(dtype=dtype)
    if not isinstance(model, PeftModel):
        raise InputError(f"{adapter.name}: holds no adapter, there is nothing to merge")
    unmerged = logps_of_rows(model.to(device), rows, batch_size)
    del model
    model, _ = adapter.load(dtype=dtype, dequantized=True)
    model = model.merge_and_unload(safe_merge=True)
    fuse_experts(model)
    save_policy(out / "policy", model, tokenizer)
    del model
    merged, _ = Checkpoint(str(out / "policy")).load(dtype=dtype)
    return Parity.of(logps_of_rows(merged.to(device), rows, batch_size), unmerged)


def main() -> None:
    """Merge one adapter."""
    parser = argparse.ArgumentParser(prog="python -m train.merge", description=__doc__.split("\n")[0])
    parser.add_argument("--policy", required=True, help="directory of the adapter")
    parser.add_argument("--rows", required=True, help="rows on whose responses both are compared")
    parser.add_argument("--limit", type=int, default=64, help="rows to compare on (default 64)")
    parser.add_argument("--out", required=True, help="directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--max-response-tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2, help="rows in one forward pass")
    arguments = parser.parse_args()
    adapter, out = Checkpoint(arguments.policy), Path(arguments.out)
    settings = {"policy": adapter.digest, "dtype": arguments.dtype, "limit": arguments.limit}
    planned = plan("train.merge", settings, {"rows": arguments.rows})
    if up_to_date(out, planned):
        print(f"{out}: done already, nothing to do")
        return
    encoder = Encoder(adapter.tokenizer(), arguments.max_prompt_tokens, arguments.max_response_tokens)
    rows = encoder.rows(read_rows(arguments.rows)[: arguments.limit])
    parity = merge(adapter, rows, out, getattr(torch, arguments.dtype), arguments.batch)
    write_manifest(out, planned, outputs=["policy"], facts={"parity": dataclasses.asdict(parity)})
    print(
        f"{out / 'policy'}: merged. Log-probs of {parity.responses} responses, merged less unmerged: mean "
        f"{parity.mean_difference:+.4f}, mean |.| {parity.mean_absolute_difference:.4f}, largest "
        f"{parity.largest_difference:.4f} nats, at a mean of {parity.mean_logps:.2f}"
    )


if __name__ == "__main__":
    run_command(main)
