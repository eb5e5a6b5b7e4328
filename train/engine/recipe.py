"""Recipes: one YAML file with every setting of a run; any of them can be overridden on the command line."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any, Self

import yaml
from transformers import SchedulerType

from data_prep.files import InputError


@dataclasses.dataclass(frozen=True)
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
    max_prompt_tokens: int  # a longer prompt is refused
    max_response_tokens: int  # with EOS; each response is cut to this by itself, and cut ones are counted
    log_every: int
    checkpoint_every: int
    seed: int

    def __post_init__(self) -> None:
        """Raise InputError for a value that cannot be trained with."""
        may_be_zero = {"warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "seed", "alpha"}
        for name, value in vars(self).items():
            if not isinstance(value, str) and not (value > 0 or (value == 0 and name in may_be_zero)):
                raise InputError(f"recipe: {name} = {value} must be {'at least' if name in may_be_zero else 'above'} 0")
            if value == math.inf or (name in ("warmup_ratio", "adam_beta1", "adam_beta2") and value >= 1):
                raise InputError(f"recipe: {name} = {value} must be {'finite' if value == math.inf else 'below 1'}")
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
            group.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, metavar=field.type.__name__)

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
    if type(value) is not kind:
        raise InputError(f"{path}: {key} = {value!r} must be a {kind.__name__}")
    return value


@dataclasses.dataclass(frozen=True)
class AlignmentRecipe(Recipe):
    """The settings of a run that aligns a policy pi, starting from the reference mu."""

    beta: float  # scale of the learned reward r = beta * (log pi - log mu)
    alpha: float  # reward temperature, in units of reward: labels are softmax(reward / alpha)
    evaluate_every: int  # steps between two measurements of the likelihood trend


@dataclasses.dataclass(frozen=True)
class SftRecipe(Recipe):
    """The settings of supervised fine-tuning of a new, small MistralForCausalLM."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    positions: int
