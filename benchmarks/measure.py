"""The benchmark: the engine against the released code's computation and against TRL, on the same rows.

    python -m benchmarks.measure --out results/benchmark [--quick] [--device cpu|cuda] [--tiny]

Steps of the different ways alternate in one process (A B C, A B C, ..), ratios are of summed CPU time and of summed
wall time; peaks of memory are those of fresh processes. A step is forward and backward pass of one micro-batch with
collation, without the optimizer's update, which is the same for all. Before anything is timed, losses and gradients
are compared. Each finished part is kept in measures.json, so an interrupted benchmark continues.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from tqdm import tqdm

from benchmarks import gpu, report
from benchmarks.ours import our_loss, our_references
from benchmarks.peer import TrlSteps
from benchmarks.released import released_loss
from benchmarks.workload import (
    REGIMES,
    SHAPE,
    TINY,
    ULTRAFEEDBACK,
    Lengths,
    flops,
    make_rows,
    new_model,
    padded_over_unique,
)  # fmt: skip
from data_prep.files import InputError, read_json, run_command, sha256_tree, write_json
from data_prep.manifest import ROOT, plan, up_to_date, write_manifest
from train.engine.logps import packable
from train.engine.tokens import EncodedRow
from train.nca_pair import nca_pair_loss

ALPHA, BETA = 1.0, 0.01
LOSS_WITHIN, GRADIENTS_WITHIN = 1e-5, 1e-4
OUTPUTS = ["measures.json", "benchmark.md", "benchmark.csv", "scaling.png", "scaling.svg"]


class Clock:
    """Sums of CPU and wall seconds by name, and each single measurement."""

    def __init__(self) -> None:
        self.cpu: dict[str, list[float]] = {}
        self.wall: dict[str, list[float]] = {}

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        """Run and time `step`."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = step()
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)
        self.wall.setdefault(name, []).append(time.perf_counter() - wall)
        return result

    def measures(self) -> dict[str, dict[str, list[float]]]:
        """All of them, for measures.json."""
        return {"cpu_s": self.cpu, "wall_s": self.wall}


def gemm_rate(shape: dict, tokens: int, dtype: torch.dtype) -> float:
    """FLOP/s of CPU time of the best matrix product among the shapes of the model, of a few tries."""
    hidden, wide, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    best = 0.0
    for rows, inner, outer in ((tokens, hidden, wide), (tokens, wide, hidden), (512, hidden, vocabulary)):
        x, weight = torch.randn(rows, inner, dtype=dtype), torch.randn(outer, inner, dtype=dtype)
        linear(x, weight)
        for _ in range(5):
            start = time.process_time()
            linear(x, weight)
            best = max(best, 2 * rows * inner * outer / (time.process_time() - start))
    return best


def gradients(model: nn.Module) -> torch.Tensor:
    """All gradients of the adapters as one vector; they are cleared."""
    found = torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


def check_equal(name: str, first: tuple[float, torch.Tensor], second: tuple[float, torch.Tensor]) -> dict[str, float]:
    """Difference of two losses and relative difference of two gradients, float32; InputError beyond the bounds."""
    loss = abs(first[0] - second[0])
    gradient = float((first[1] - second[1]).norm() / second[1].norm())
    if loss > LOSS_WITHIN or gradient > GRADIENTS_WITHIN:
        raise InputError(f"{name}: losses differ by {loss:.1e}, gradients by {gradient:.1e}: nothing to compare")
    return {"loss": loss, "gradients": gradient}


def worst(differences: list[dict[str, float]]) -> dict[str, float] | None:
    """The greatest differences; None where nothing was compared."""
    return {name: max(d[name] for d in differences) for name in differences[0]} if differences else None


def against_released(
    shape: dict, regime: str, dtype: torch.dtype, count: int, rounds: int, bar: tqdm
) -> dict[str, Any]:
    """Steps of the released computation, of the reference pass and of the training pass, in turn."""
    released, ours = new_model(shape, dtype), packable(new_model(shape, dtype), "auto", dtype)
    rows = make_rows(count, REGIMES[regime], vocabulary=shape["vocab_size"])
    clock, rate, differences, references = Clock(), 0.0, [], {}

    def released_step(row: EncodedRow) -> float:
        loss = released_loss(released, row, alpha=ALPHA, beta=BETA)
        loss.backward()
        return loss.item()

    def our_step(row: EncodedRow) -> float:
        loss = our_loss(ours, [row], references, alpha=ALPHA, beta=BETA)
        loss.backward()
        return loss.item()

    def turn(row: EncodedRow, clock: Clock) -> None:
        theirs = clock("released", lambda: released_step(row))
        references.update(clock("reference", lambda: our_references(ours, [row])))
        found = clock("training", lambda: our_step(row))
        pair = (found, gradients(ours)), (theirs, gradients(released))
        if dtype == torch.float32:
            differences.append(check_equal(f"{regime}, released computation", *pair))

    turn(make_rows(1, Lengths(8, 8), vocabulary=shape["vocab_size"])[0], Clock())  # a first step is slower
    for _ in range(rounds):
        for row in rows:
            rate = max(rate, gemm_rate(shape, row.stream_length, dtype))
            turn(row, clock)
            bar.update()
    return {
        **clock.measures(), "differences": worst(differences), "gemm_flops": rate,
        "flops": rounds * flops(ours, rows), "prompts": rounds * count,
        "tokens": rounds * sum(row.stream_length for row in rows), "padded_over_unique": padded_over_unique(rows),
    }  # fmt: skip


def against_trl(shape: dict, count: int, rounds: int, bar: tqdm) -> dict[str, Any]:
    """Training steps of TRL's trainer on pairs, one at a time and all together, and ours one at a time."""
    rows = make_rows(count, ULTRAFEEDBACK, k=2, vocabulary=shape["vocab_size"])
    ours = packable(new_model(shape))
    everyone = range(count)
    clock, differences, references = Clock(), [], {}
    with tempfile.TemporaryDirectory() as scratch:
        trainers = {
            name: TrlSteps(new_model(shape), rows, Path(scratch), beta=BETA, cached=name == "TRL with its cache")
            for name in ("TRL", "TRL with its cache")
        }

        def our_step(i: int) -> float:
            loss = our_loss(ours, rows[i : i + 1], references, nca_pair_loss, beta=BETA)
            loss.backward()
            return loss.item()

        for _ in range(rounds):
            for i in everyone:
                references.update(clock("reference", lambda i=i: our_references(ours, rows[i : i + 1])))
                found = clock("training", lambda i=i: our_step(i))
                our_gradients = gradients(ours)
                for name, steps in trainers.items():
                    loss = clock(f"{name}, 1 pair", lambda steps=steps, i=i: steps.step(i)).item()
                    pair = (found, our_gradients), (loss, gradients(steps.trainer.model))
                    differences.append(check_equal(name, *pair))
                bar.update()
            for name, steps in trainers.items():
                clock(f"{name}, {count} pairs", lambda steps=steps: steps.step(*everyone))
                steps.trainer.model.zero_grad(set_to_none=True)
    return {
        **clock.measures(), "differences": worst(differences), "prompts": rounds * count,
        "padded_over_unique": padded_over_unique(rows),
    }  # fmt: skip


def fresh_process(kind: str, tiny: bool, **options: float) -> dict[str, float]:
    """`python -m benchmarks.memory`: time and peak memory of one step."""
    words = [sys.executable, "-m", "benchmarks.memory", kind, *(["--tiny"] if tiny else [])]
    words += [word for name, value in options.items() for word in (f"--{name}", f"{value:g}")]
    # Freed blocks go back to the system at once, so that the peak is of what is in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{' '.join(words[1:])}: {done.stderr.strip().splitlines()[-1]}")
    return {**options, "kind": kind, **json.loads(done.stdout.splitlines()[-1])}


def scaling(tiny: bool, points: list[dict[str, float]], bar: tqdm) -> list[dict[str, float]]:
    """One step of both computations at each point, each in a process of its own."""
    found = []
    for point in points:
        for kind in ("released", "ours"):
            found.append(fresh_process(kind, tiny, **point))
            bar.update()
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark"), help="default: results/benchmark")
    parser.add_argument("--quick", action="store_true", help="fewer rows and points: ratios are rough")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda adds the 7B and 8x7B geometry")
    parser.add_argument("--tiny", action="store_true", help="tiny models: tries the benchmark out, measures nothing")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device here; leave it out for the part that runs on the CPU")
    settings = {
        "quick": options.quick, "tiny": options.tiny, "device": options.device, "threads": torch.get_num_threads(),
        "cpu": report.cpu_model(), "trl": metadata.version("trl"),
    }  # fmt: skip
    # `plan` follows the imports of stages; the benchmark is none, so its own files count by themselves.
    settings["benchmark_code"] = sha256_tree(Path(__file__).parent.glob("*.py"), ROOT)
    planned = plan("train.nca", settings, {}) | {"module": "benchmarks.measure"}
    if up_to_date(options.out, planned):
        print(f"{options.out}: up to date")
        return
    kept = options.out / "measures.json"
    measures: dict[str, Any] = read_json(kept) if kept.exists() else {}
    if measures.get("plan") != planned:
        measures = {"plan": planned, "parts": {}}

    shape, quick = TINY if options.tiny else SHAPE, options.quick
    regimes = list(REGIMES)[: 2 if quick else 4]
    count, rounds = (2, 1) if quick else (3, 2)
    ks, lengths = ((2, 4), (96, 192)) if quick or options.tiny else ((2, 4, 8, 16), (96, 192, 384, 768))
    vocabularies = (400, 800) if options.tiny else (8_000, 32_000, 128_000)
    vocabulary = shape["vocab_size"]
    by_k = [{"k": k, "prompt": 120, "response": 230, "vocabulary": vocabulary} for k in ks]
    by_length = [{"k": 4, "prompt": n / 3, "response": 2 * n / 3, "vocabulary": vocabulary} for n in lengths]
    by_vocabulary = [{"k": 4, "prompt": 120, "response": 230, "vocabulary": v} for v in vocabularies]

    parts: dict[str, tuple[int, Callable[[tqdm], Any]]] = {}
    for regime in regimes:
        parts[f"released / {regime} / float32"] = (
            count * rounds,
            lambda bar, regime=regime: against_released(shape, regime, torch.float32, count, rounds, bar),
        )
    parts[f"released / {regimes[0]} / bfloat16"] = (
        count,
        lambda bar: against_released(shape, regimes[0], torch.bfloat16, count, 1, bar),
    )
    pairs = 2 if quick else 4
    parts["trl"] = (pairs, lambda bar: against_trl(shape, pairs, 1, bar))
    for name, points in (("vocabulary", by_vocabulary), ("k", by_k), ("length", by_length)):
        parts[name] = (2 * len(points), lambda bar, points=points: scaling(options.tiny, points, bar))
    parts["gpu"] = (1, lambda bar: gpu.measure(options.device, options.tiny))

    with tqdm(total=sum(size for size, _ in parts.values()), unit="step") as bar:
        for name, (size, run) in parts.items():
            bar.set_description(name)
            if name in measures["parts"]:
                bar.update(size)
                continue
            measures["parts"][name] = run(bar)
            write_json(kept, measures)
    report.write(options.out, measures["parts"], settings)
    write_manifest(options.out, planned, outputs=OUTPUTS)
    print(f"{options.out / 'benchmark.md'}: written")


if __name__ == "__main__":
    run_command(main)
