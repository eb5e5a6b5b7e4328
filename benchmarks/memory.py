"""Time and peak memory of one training step in a process of its own; prints one line of JSON.

    python -m benchmarks.memory ours --prompt 120 --response 230 --k 4 --vocabulary 32000 [--tiny]

The peak is that of the resident memory (Linux) over what the process holds with weights, libraries and a first small
step in place. `released` computes its reference in the step, `ours` finds it in the cache.
"""

import argparse
import json
import time
from pathlib import Path

import psutil

from benchmarks.ours import our_loss, our_references
from benchmarks.released import released_loss
from benchmarks.workload import SHAPE, TINY, Lengths, make_rows, new_model
from data_prep.files import InputError, run_command
from train.engine.logps import packable

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes() -> int:
    """Peak resident memory since the last `forget_peak`."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let the peak start from what is resident now; InputError where the system cannot."""
    try:
        CLEAR.write_text("5")
    except OSError:
        raise InputError("peak memory is read from /proc, which is not there or not writable: run on Linux") from None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("released", "ours"))
    parser.add_argument("--prompt", type=float, default=120, help="tokens (median)")
    parser.add_argument("--response", type=float, default=230, help="tokens (median)")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--tiny", action="store_true", help="a model for trying out")
    options = parser.parse_args()
    shape = {**(TINY if options.tiny else SHAPE), "vocab_size": options.vocabulary}
    model = new_model(shape)
    if options.kind == "ours":
        packable(model)

    def step(lengths: Lengths) -> tuple[float, float, int]:
        (row,) = make_rows(1, lengths, k=options.k, vocabulary=options.vocabulary)
        references = our_references(model, [row]) if options.kind == "ours" else {}
        forget_peak()
        before, cpu, wall = psutil.Process().memory_info().rss, time.process_time(), time.perf_counter()
        if options.kind == "ours":
            our_loss(model, [row], references, alpha=1.0, beta=0.01).backward()
        else:
            released_loss(model, row, alpha=1.0, beta=0.01).backward()
        return time.process_time() - cpu, time.perf_counter() - wall, peak_bytes() - before

    step(Lengths(8, 8))
    cpu, wall, peak = step(Lengths(options.prompt, options.response))
    print(json.dumps({"cpu_s": cpu, "wall_s": wall, "peak_mb": peak / 2**20}))


if __name__ == "__main__":
    run_command(main)
