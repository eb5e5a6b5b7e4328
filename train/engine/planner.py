"""What a run would take, by arithmetic: parameters, GPU memory, disk, steps, tokens, FLOPs and hours (`--dry-run`).

Nothing is loaded or downloaded. Counts are exact (tests compare them with real models); memory and hours are
estimates, and the plan prints what they assume. Memory is for the longest micro-batch the recipe allows.
"""

import dataclasses
import math

from data_prep.files import InputError
from train.engine.recipe import AlignmentRecipe
from train.engine.sizes import Architecture, RowStatistics

GIB, GB = 2**30, 10**9
DEVICES = (1, 2, 4, 8, 16)
LAUNCHES = ("single", "ddp", "fsdp", "zero3")  # python -m; the other three are files in train/launch


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A card. peak: dense bf16 FLOP/s of its datasheet. memory: GiB that its driver reports, about."""

    peak: float
    memory: float


GPUS = {
    "A40": Gpu(149.7e12, 44), "A100-80": Gpu(312e12, 79), "H100": Gpu(989e12, 79), "H200": Gpu(989e12, 139),
}  # fmt: skip
# Share of the peak that a step reaches. qlora: the authors' own run implies 0.26 if its two GPUs were A40s (55,809 s
# for 61,966 pairs, all_results.json of ChenDRAG/zephyr-NCA-preference; tests/train/test_planner.py does the sum).
# lora and full: assumed. Mixtures of experts reach less (assumed): their matrices are smaller.
UTILISATION = {"qlora": 0.25, "lora": 0.35, "full": 0.35}
MIXTURE_UTILISATION = 0.6
DECODE_SECONDS = 0.05  # a token of a batch when sampling for KL; assumed
LOGITS_AT_ONCE = 2**24  # CHUNK_LOGITS of train.engine.logps
SLACK = 1.5 * GIB  # CUDA context, kernels' workspaces, fragmentation; assumed
TRAIN_SUBSET = 128  # training rows measured at each evaluation, as in train.engine.run
CACHE_LINE = 75  # bytes of one response in the reference cache


def memory(
    recipe: AlignmentRecipe, architecture: Architecture, rows: RowStatistics, devices: int, launch: str
) -> dict[str, float] | None:
    """Bytes on one device, by part; None where the launch kind does not apply.

    Trained weights, their gradients and sums are float32, frozen weights bf16 or nf4. fsdp and zero3 keep a share of
    all of them on each device and gather layers as they are needed.
    """
    if (launch == "single") != (devices == 1) or (recipe.tuning == "qlora" and launch in ("fsdp", "zero3")):
        return None  # an nf4 base is small enough to stand on each device
    a = architecture
    sharded = devices if launch in ("fsdp", "zero3") else 1
    trained = trainable_parameters(recipe, a)
    tokens = recipe.micro_batch * rows.longest
    frozen_width = 2 if recipe.dtype == "bfloat16" else 4
    parts = {"weights": 4.0 * a.parameters, "working copies of weights": 0.0, "adapters": 0.0}
    if recipe.tuning == "full":
        if recipe.dtype == "bfloat16" and sharded == 1:
            parts["working copies of weights"] = 2.0 * a.parameters  # autocast keeps them through the forward pass
    else:
        parts["weights"] = a.nf4_bytes() if recipe.tuning == "qlora" else float(frozen_width * a.parameters)
        parts["adapters"] = 4.0 * trained
        if recipe.tuning == "qlora":  # the largest matrix, dequantized, twice
            parts["working copies of weights"] = 2 * 2.0 * a.hidden * a.feed_forward
        elif a.experts:  # peft adds the adapters' product to all experts of a layer before it multiplies
            parts["working copies of weights"] = float(frozen_width * a.feed_forward_parameters)
    parts["gradients"] = 4.0 * trained
    parts["optimizer states"] = float(moment_bytes(recipe) * trained)
    parts = {name: value / sharded for name, value in parts.items()}
    if launch == "ddp":
        parts["gradients"] *= 2  # and the buckets in which they are summed
    gathered = 4 if recipe.tuning == "full" else frozen_width  # as they are stored; autocast does the rest
    if launch == "fsdp":  # the layer at work, the next one, and the root: embedding and head
        parts["working copies of weights"] += gathered * (2.0 * a.layer_parameters + a.embedding_parameters)
        if recipe.tuning == "full":  # a layer's, whole, before they are shared out
            parts["gradients"] += 4.0 * a.layer_parameters
    if launch == "zero3":  # stage3_max_live_parameters of train/launch/deepspeed_zero3.json
        parts["working copies of weights"] += gathered * min(1e9, a.parameters)
    parts["activations"] = activation_bytes(recipe, a, tokens, recipe.gradient_checkpointing)
    parts["attention mask"] = 3.0 * tokens**2  # bool, and bf16 inside the kernel
    parts["logits chunk"] = LOGITS_AT_ONCE * (2 + 4 + 4.0)  # bf16, float32, gradient
    parts["context and slack"] = SLACK
    return parts


def activation_bytes(recipe: AlignmentRecipe, architecture: Architecture, tokens: int, checkpointing: bool) -> float:
    """What the backward pass of `tokens` tokens needs of the forward pass.

    Bytes a token and layer under bf16 autocast, as counted by saved-tensor hooks on small models (a test repeats
    it). With checkpointing each layer keeps its input alone, and one layer at a time is computed again.
    """
    a, full = architecture, recipe.tuning == "full"
    heads, kv_heads = a.heads * a.head_dim, a.kv_heads * a.head_dim
    layer = (26 * a.hidden + 4 * heads if full else 18 * a.hidden + 6 * heads) + 4 * kv_heads
    if a.experts:
        expert = 7 * a.hidden + 16 * a.feed_forward if full else 2 * a.hidden + 8 * a.feed_forward
        layer += a.experts_per_token * expert
    else:
        layer += 8 * a.feed_forward
    if recipe.dtype == "float32":
        layer *= 2
    kept = (4 if full or recipe.dtype == "float32" else 2) * a.hidden
    return float(tokens * (a.layers * kept + layer if checkpointing else a.layers * layer))


def moment_bytes(recipe: AlignmentRecipe) -> int:
    """Adam's two moments of one parameter: float32, or one byte each."""
    return 2 if "8bit" in recipe.optimizer else 8


def trainable_parameters(recipe: AlignmentRecipe, architecture: Architecture) -> int:
    """All, or those of the adapters."""
    return architecture.parameters if recipe.tuning == "full" else architecture.lora_parameters(recipe.lora_rank)


def forward_flops(architecture: Architecture, rows: RowStatistics) -> float:
    """Of one row's packed stream: two a multiplied weight and token, head at response positions only, attention."""
    a = architecture
    head = a.vocabulary * a.hidden
    layers = a.active_parameters - a.embedding_parameters
    attention = 4 * a.heads * a.head_dim * rows.attended_pairs * a.layers
    return 2 * (layers * rows.stream_tokens + head * rows.response_tokens) + attention


def passes(recipe: AlignmentRecipe) -> int:
    """Forward passes that a training step is worth: forward, backward (frozen weights need no gradient), and the
    forward pass again under gradient checkpointing."""
    return 1 + (2 if recipe.tuning == "full" else 1) + recipe.gradient_checkpointing


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What `plan_run` found. FLOPs and tokens are of the whole run, over all devices."""

    recipe: AlignmentRecipe
    method: str
    architecture: Architecture
    rows: RowStatistics
    devices: int
    accumulation: int
    steps: int
    evaluations: int
    flops: dict[str, float]  # training, reference, evaluation
    sampling_seconds: float  # for KL, not sped up by more devices
    disk: dict[str, float]  # bytes

    @property
    def tokens(self) -> float:
        """Unique tokens of the training steps."""
        return self.steps * self.recipe.global_batch * self.rows.stream_tokens

    def utilisation(self) -> float:
        """Assumed share of a card's peak."""
        return UTILISATION[self.recipe.tuning] * (MIXTURE_UTILISATION if self.architecture.experts else 1)

    def hours(self, gpu: str) -> float:
        """Wall time on `devices` cards of a kind, with perfect scaling."""
        rate = GPUS[gpu].peak * self.utilisation() * self.devices
        return (sum(self.flops.values()) / rate + self.sampling_seconds) / 3600

    def memory(self, launch: str, devices: int | None = None) -> dict[str, float] | None:
        """Bytes on one device, by part; None where the launch kind does not apply."""
        return memory(self.recipe, self.architecture, self.rows, devices or self.devices, launch)

    def total_memory(self, launch: str, devices: int | None = None) -> float | None:
        """GiB on one device; None where the launch kind does not apply."""
        parts = self.memory(launch, devices)
        return None if parts is None else sum(parts.values()) / GIB

    def cost(self, launch: str) -> str:
        """The cost line of a recipe's header: GPU-hours on the cards that hold the run."""
        need = self.total_memory(launch)
        cards = [gpu for gpu in ("A40", "A100-80", "H100") if need <= GPUS[gpu].memory]
        hours = ", ".join(f"{self.hours(gpu) * self.devices:.3g} {gpu}-hours" for gpu in cards)
        disk = sum(self.disk.values()) / GB
        return f"{hours}; {need:.0f} GiB a GPU ({self.devices} x {launch}); {disk:,.0f} GB of disk"

    def show(self) -> str:
        """The plan as text."""
        return "\n".join([*self._work(), *self._memory(), *self._time(), *self._disk()])

    def _work(self) -> list[str]:
        r, a, rows = self.recipe, self.architecture, self.rows
        trained = trainable_parameters(r, a)
        mixture = f", {a.experts} experts, {a.experts_per_token} a token" if a.experts else ""
        return [
            f"plan: {self.method}, {r.tuning}, {r.dtype}, {r.optimizer}; nothing is loaded, downloaded or written",
            f"model       {r.model or '(not named in the recipe)'} {r.model_revision or '(no revision)'}",
            f"parameters  {a.parameters / 1e9:.2f} B, active {a.active_parameters / 1e9:.2f} B, "
            f"trained {trained / 1e6:,.1f} M ({a.layers} x {a.hidden}{mixture})",
            f"rows        {rows.rows:,} with K = {rows.k:.3g}: prompt {rows.prompt_tokens:.0f} tokens, "
            f"responses {rows.response_tokens:.0f} together ({rows.origin})",
            f"steps       {self.steps:,} of {r.global_batch} prompts ({r.micro_batch} x {self.accumulation} accumulated"
            f" x {self.devices} devices); {self.evaluations} evaluations",
            f"tokens      {self.tokens / max(self.steps, 1):,.0f} a step (prompt once, K responses), "
            f"{self.tokens / 1e6:,.0f} M in all",
            "FLOPs       " + ", ".join(f"{name} {value:.3g}" for name, value in self.flops.items())
            + (" (the reference is cached)" if not self.flops["reference"] else ""),
        ]  # fmt: skip

    def _memory(self) -> list[str]:
        r = self.recipe
        longest = r.micro_batch * self.rows.longest
        lines = ["", f"GPU memory, GiB a device, for the longest micro-batch ({longest:,} tokens)"]
        kinds = [kind for kind in LAUNCHES if self.memory(kind)]
        lines.append(f"  {self.devices} device{'s' * (self.devices > 1)}".ljust(30) + "".join(f"{k:>9}" for k in kinds))
        for part in self.memory(kinds[0]) or {}:
            values = [(self.memory(kind) or {})[part] / GIB for kind in kinds]
            if any(values):
                lines.append(f"  {part:28}" + "".join(f"{value:9.2f}" for value in values))
        lines.append(f"  {'total':28}" + "".join(f"{self.total_memory(kind):9.2f}" for kind in kinds))
        with_, without = (
            activation_bytes(r, self.architecture, longest, checkpointing) / GIB for checkpointing in (True, False)
        )
        lines.append(f"  activations are {with_:.1f} with gradient checkpointing, {without:.1f} without")
        lines += ["", "  total".ljust(30) + "".join(f"{n:>9}" for n in DEVICES) + "  devices"]
        for kind in LAUNCHES:
            cells = ""
            for n in DEVICES:
                total = self.total_memory(kind, n)
                divides = r.global_batch % (r.micro_batch * n) == 0
                cells += f"{'-' if total is None else f'{total:.1f}' if divides else 'refused':>9}"
            lines.append(f"  {kind:28}{cells}")
        lines.append("  refused: micro_batch x devices does not divide the global batch")
        reading = min(self.devices, 8) * (4 if r.tuning == "full" else 2) * self.architecture.parameters / GIB
        lines.append(f"  host memory: up to {reading:,.0f} GiB a node of 8 while each process reads the model")
        return lines

    def _time(self) -> list[str]:
        title = f"hours on {self.devices} device(s): FLOPs / (bf16 peak x {self.utilisation():.2f} assumed utilisation)"
        lines = ["", title]
        for name, gpu in GPUS.items():
            fits = [kind for kind in LAUNCHES if (t := self.total_memory(kind)) is not None and t <= gpu.memory]
            lines.append(
                f"  {name:8} {self.hours(name):8.1f} h {self.hours(name) * self.devices:9.1f} GPU-hours  "
                f"({gpu.peak / 1e12:.0f} TFLOP/s, {gpu.memory:.0f} GiB: "
                f"{'fits with ' + ', '.join(fits) if fits else 'does not fit'})"
            )
        if self.sampling_seconds:
            hours = self.sampling_seconds / 3600
            lines.append(f"  of it {hours:.1f} h of sampling for KL, at {DECODE_SECONDS} s a token (assumed)")
        return lines

    def _disk(self) -> list[str]:
        total = sum(self.disk.values()) / GB
        lines = ["", f"disk, GB: {total:.1f}, beside the rows (scripts/prepare_data.sh --dry-run)"]
        return lines + [f"  {name:28}{value / GB:9.2f}" for name, value in self.disk.items()]


def plan_run(
    recipe: AlignmentRecipe, method: str, architecture: Architecture, rows: RowStatistics, devices: int,
    *, heldout_rows: int = 2000, cached: bool = False,
) -> RunPlan:  # fmt: skip
    """The plan of a run; pure arithmetic.

    heldout_rows: rows behind eval_rows, taken to be as long as the training rows; 2,000 is the paper's test split
    cached:       whether the reference log-probs are there already, from another run on the same rows
    InputError if the global batch cannot be made of micro-batches on so many devices, or there are too few rows.
    """
    accumulation = recipe.accumulation(devices)
    steps = recipe.epochs * (rows.rows // recipe.global_batch)
    if not steps:
        raise InputError(f"{rows.rows} rows are fewer than one global batch of {recipe.global_batch}")
    evaluations = 1 + math.ceil(steps / recipe.evaluate_every)  # at the start, and after the last step
    forward = forward_flops(architecture, rows)
    flops = {
        "training": forward * passes(recipe) * steps * recipe.global_batch,
        "reference": 0.0 if cached else forward * (rows.rows + heldout_rows),
        "evaluation": forward * (heldout_rows + min(TRAIN_SUBSET, rows.rows)) * evaluations,
    }
    trained = trainable_parameters(recipe, architecture)
    disk = {
        "weights, bf16 (download)": 2.0 * architecture.parameters,
        "checkpoints (two at a time)": 2.0 * trained * (4 + moment_bytes(recipe)),
        "trained policy": 4.0 * trained,
        "reference cache": float(CACHE_LINE * (rows.responses + heldout_rows * rows.k)),
    }
    batches = math.ceil(recipe.kl_prompts / recipe.micro_batch)
    sampling = evaluations * batches * recipe.max_response_tokens * DECODE_SECONDS
    return RunPlan(recipe, method, architecture, rows, devices, accumulation, steps, evaluations, flops, sampling, disk)
