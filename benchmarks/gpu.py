"""The paper's models by their geometry (random weights) on one CUDA device: steps at K = 4, and TRL's DPO step.

Mistral-7B with LoRA in bfloat16 and on nf4 weights (QLoRA), Mixtral-8x7B with LoRA in bfloat16; attention with a dense
mask and by FlexAttention. A case that the device cannot hold, or that cannot run on it, says so instead of a number.
On the CPU only `tiny` models run, which shows that the code works and measures nothing.
"""

import contextlib
import functools
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from benchmarks.ours import our_loss, our_references
from benchmarks.peer import TrlSteps
from benchmarks.workload import TINY, ULTRAFEEDBACK, adapted, flops, make_rows
from train.engine.logps import packable
from train.engine.models import ADAPTED
from train.nca_pair import nca_pair_loss

MISTRAL_7B = {"vocab_size": 32_000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14_336,
              "max_position_embeddings": 32_768, "sliding_window": 4096, "attn_implementation": "sdpa"}  # fmt: skip
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
# name, kind of model, nf4 weights, bytes of weights at full size
CASES = [
    ("Mistral-7B, LoRA, bf16", "mistral", False, 14.5e9),
    ("Mistral-7B, QLoRA", "mistral", True, 14.5e9),  # made in bf16, then quantized
    ("Mixtral-8x7B, LoRA, bf16", "mixtral", False, 93.4e9),
]
ROWS, BETA = 8, 0.01


def build(kind: str, quantized: bool, device: str, tiny: bool) -> PreTrainedModel:
    """The geometry with random bfloat16 weights and adapters, made on the device."""
    shape = TINY if tiny else MISTRAL_7B
    torch.manual_seed(0)
    with torch.device(device), _default_dtype(torch.bfloat16):
        if kind == "mistral":
            model: PreTrainedModel = MistralForCausalLM(MistralConfig(**shape))
        else:
            model = MixtralForCausalLM(MixtralConfig(**{**shape, **EXPERTS}))
    if quantized:
        quantize(model.model, device)
    return adapted(model, ADAPTED[kind]).to(device)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def quantize(model: nn.Module, device: str) -> None:
    """nf4 in place of every linear layer's weights, as transformers does when it loads a checkpoint for QLoRA."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in list(model.modules()):
        for name, layer in module.named_children():
            if type(layer) is nn.Linear:
                new = Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                    quant_type="nf4", device="meta",
                )  # fmt: skip
                weight = layer.weight.data.cpu()
                new.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=new)
                if hasattr(new, "support_avx512bf16_for_cpu"):  # see Checkpoint.load
                    new.support_avx512bf16_for_cpu = False
                setattr(module, name, new.to(device))


def timed(steps: list[Callable[[], Any]], device: str) -> tuple[float, float]:
    """Seconds of all steps after one that warms up, and the peak memory over what was held before, in GB."""
    steps[0]()
    peak = before = 0
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for step in steps:
        step()
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    return time.perf_counter() - start, (peak - before) / 1e9


def gemm_rate(device: str, tiny: bool) -> float:
    """FLOP/s of the best of the model's matrix products in bfloat16, on 1024 tokens."""
    shape, best = TINY if tiny else MISTRAL_7B, 0.0
    for inner, outer in ((shape["hidden_size"], shape["intermediate_size"]),
                         (shape["intermediate_size"], shape["hidden_size"])):  # fmt: skip
        x = torch.randn(1024, inner, dtype=torch.bfloat16, device=device)
        weight = torch.randn(outer, inner, dtype=torch.bfloat16, device=device)
        seconds, _ = timed([lambda x=x, weight=weight: nn.functional.linear(x, weight)] * 20, device)
        best = max(best, 20 * 2 * 1024 * inner * outer / seconds)
    return best


def measure(device: str, tiny: bool) -> list[dict[str, Any]]:
    """One record for each case and way: samples/s (prompts with all their responses), utilisation, peak memory; or
    why it did not run. Empty on a CPU, except `tiny`."""
    if device == "cpu" and not tiny:
        return []
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (tiny models: shows that it runs)"
    rate, found = gemm_rate(device, tiny), []
    for case, kind, quantized, weights in CASES:
        ways = ["dense", "flex", *(["TRL"] if kind == "mistral" else [])]
        if device == "cuda" and weights * 1.1 > torch.cuda.mem_get_info()[1]:
            why = f"needs {weights * 1.1 / 1e9:.0f} GB, the device has {torch.cuda.mem_get_info()[1] / 1e9:.0f}"
            found.append({"case": case, "device": name, "not_run": why})
            continue
        for way in ways:
            record = {"case": case, "way": way, "device": name}
            try:
                found += [record | part for part in _steps(kind, quantized, way, device, tiny, rate)]
            except (RuntimeError, NotImplementedError, ImportError) as error:  # out of memory, no such kernel
                found.append(record | {"not_run": " ".join(str(error).split())[:200]})
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return found


def _steps(kind: str, quantized: bool, way: str, device: str, tiny: bool, rate: float) -> list[dict[str, Any]]:
    """Records of our steps at K = 4 and K = 2, or of TRL's at K = 2."""
    model, found = build(kind, quantized, device, tiny), []
    vocabulary = model.config.vocab_size
    if way != "TRL":
        packable(model, way, torch.bfloat16)
    for k in (2,) if way == "TRL" else (4, 2):
        rows = make_rows(2 if tiny else ROWS, ULTRAFEEDBACK, k=k, vocabulary=vocabulary)
        work = flops(model, rows)
        if way == "TRL":
            with tempfile.TemporaryDirectory() as scratch:
                trl = TrlSteps(model, rows, Path(scratch), beta=BETA, cached=False)
                run = [functools.partial(trl.step, i) for i in range(len(rows))]
                found.append(_record(k, "one run", run, rows, work, rate, device))
            continue
        references = {}
        for row in rows:
            references |= our_references(model, [row])

        def train(row) -> None:
            our_loss(model, [row], references, nca_pair_loss, beta=BETA).backward()  # noqa: B023

        def both(row) -> None:
            our_references(model, [row])
            train(row)

        for phase, step in (("one run", both), ("references cached", train)):
            run = [lambda row=row, step=step: step(row) for row in rows]
            found.append(_record(k, phase, run, rows, work, rate, device))
    return found


def _record(k: int, phase: str, run: list, rows: list, work: float, rate: float, device: str) -> dict[str, Any]:
    seconds, peak = timed(run, device)
    return {"k": k, "phase": phase, "samples_per_s": len(rows) / seconds, "mfu": work / seconds / rate, "peak_gb": peak}
