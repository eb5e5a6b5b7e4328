"""Recipes: one YAML file with every setting of a run; any of them can be overridden on the command line."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any, Self

import yaml
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

from data_prep.files import InputError

CHOICES = {
    "tuning": ("full", "lora", "qlora"),
    "dtype": ("float32", "bfloat16"),
    "attention": ("auto", "dense", "split", "flex"),
    "long_prompts": ("refuse", "keep_end"),
    "router_aux_loss": ("", "declined", "as_configured"),
}
MAY_BE_ZERO = {
    "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "seed", "alpha", "max_tokens", "kl_prompts",
    "checkpoint_every", "checkpoint_minutes", "gradient_checkpointing",
}  # fmt: skip


def switch(text: str) -> bool:
    """`true` or `false` on a command line; ValueError for anything else."""
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings that every training run has. Lengths in tokens, intervals in optimizer steps."""

    learning_rate: float
    lr_schedule: str  # a name that transformers knows: linear, cosine, constant, ...
    warmup_ratio: float  # share of all steps
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    max_grad_norm: float
    epochs: int
    global_batch: int  # prompts per optimizer step, over all devices
    micro_batch: int  # prompts per forward pass on one device
    max_prompt_tokens: int
    max_response_tokens: int  # with EOS; each response is cut to this by itself, and cut ones are counted
    max_tokens: int = 0  # of the prompt and one response together; 0: no limit beside the two above
    long_prompts: str = "refuse"  # a prompt over its limit: refuse, or keep_end (its last tokens; counted)
    log_every: int
    checkpoint_every: int  # 0: only every `checkpoint_minutes`
    checkpoint_minutes: float = 0.0  # wall time between checkpoints; 0: only every `checkpoint_every` steps
    optimizer: str = "adamw_torch"  # a name that transformers knows
    dtype: str = "float32"  # of the forward pass and the frozen weights; trained weights and sums are float32
    gradient_checkpointing: bool = False
    attention: str = "auto"  # how packed streams attend: dense, split, flex, or auto (see train.engine.attention)
    seed: int

    def __post_init__(self) -> None:
        """Raise InputError for a value that cannot be trained with."""
        for name, value in vars(self).items():
            if isinstance(value, str):
                if name in CHOICES and value not in CHOICES[name]:
                    raise InputError(f"recipe: {name} = {value!r} is unknown; known are {', '.join(CHOICES[name])}")
                continue
            zero = name in MAY_BE_ZERO
            if not (value > 0 or (value == 0 and zero)):
                raise InputError(f"recipe: {name} = {value} must be {'at least' if zero else 'above'} 0")
            if value == math.inf or (name in ("warmup_ratio", "adam_beta1", "adam_beta2") and value >= 1):
                raise InputError(f"recipe: {name} = {value} must be {'finite' if value == math.inf else 'below 1'}")
        if not self.checkpoint_every and not self.checkpoint_minutes:
            raise InputError("recipe: without checkpoints nothing can be resumed; set checkpoint_every or _minutes")
        optimizers = [optimizer.value for optimizer in OptimizerNames]
        if self.optimizer not in optimizers:
            raise InputError(f"recipe: optimizer = {self.optimizer!r} is unknown; known are {', '.join(optimizers)}")
        schedules = [schedule.value for schedule in SchedulerType]
        if self.lr_schedule not in schedules:
            raise InputError(f"recipe: lr_schedule = {self.lr_schedule!r} is unknown; known are {', '.join(schedules)}")

    def accumulation(self, processes: int) -> int:
        """Forward passes per optimizer step, so that the global batch is exact; InputError if it cannot be."""
        together = self.micro_batch * processes
        if self.global_batch % together:
            raise InputError(
                f"recipe: global_batch = {self.global_batch} is not a multiple of micro_batch x processes = "
                f"{self.micro_batch} x {processes}; change micro_batch or the number of processes"
            )
        return self.global_batch // together

    @classmethod
    def load(cls, path: Path | str, overrides: dict[str, Any]) -> Self:
        """Read a YAML recipe; `overrides` replace its values. InputError for unknown, missing or mistyped keys."""
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (FileNotFoundError, IsADirectoryError):
            raise InputError(f"{path}: no such recipe file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: a recipe is a list of `key: value` lines")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(str(key) for key in set(values) - set(fields))
        if unknown:
            raise InputError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(fields)}")
        values = {**values, **{key: value for key, value in overrides.items() if value is not None}}
        needed = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
        if needed - set(values):
            raise InputError(f"{path}: missing key {', '.join(sorted(needed - set(values)))}")
        for key, value in values.items():
            values[key] = _typed(path, key, value, fields[key].type)
        return cls(**values)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add `--recipe` and an override for each of its keys to a parser."""
        parser.add_argument("--recipe", required=True, help="YAML file with the settings of the run")
        group = parser.add_argument_group("overrides of the recipe")
        for field in dataclasses.fields(cls):
            kind = switch if field.type is bool else field.type
            group.add_argument(f"--{field.name.replace('_', '-')}", type=kind, metavar=field.type.__name__)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> Self:
        """The recipe of a parsed command line."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls.load(arguments.recipe, {name: getattr(arguments, name) for name in names})


def _typed(path: Path | str, key: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML reads 1e-4 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and value is None:  # `key:` with nothing behind it
        return ""
    if type(value) is not kind:
        raise InputError(f"{path}: {key} = {value!r} must be a {kind.__name__}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentRecipe(Recipe):
    """The settings of a run that aligns a policy pi, starting from the reference mu.

    model, model_revision, rows, eval_rows are what the command line's options of these names default to.
    """

    model: str = ""
    model_revision: str = ""
    rows: str = ""
    eval_rows: str = ""
    beta: float  # scale of the learned reward r = beta * (log pi - log mu)
    alpha: float  # reward temperature, in units of reward: labels are softmax(reward / alpha)
    evaluate_every: int  # steps between two measurements of the likelihood trend
    kl_prompts: int  # held-out prompts with one sample each for KL(pi || mu) at each of them; 0: no KL
    tuning: str = "full"  # all parameters, lora (adapters on every projection), qlora (lora on an nf4 base)
    lora_rank: int = 16
    lora_alpha: int = 16  # scale of the adapters is lora_alpha / lora_rank; there is no dropout
    router_aux_loss: str = ""  # a mixture's load-balancing loss, to be named for a mixture: declined or as_configured
    quirks: str = ""  # of the released code: names from train.engine.official, separated by commas, or "official"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftRecipe(Recipe):
    """The settings of supervised fine-tuning of a new, small MistralForCausalLM."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    positions: int
