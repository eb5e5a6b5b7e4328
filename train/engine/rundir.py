"""The run directory: one training run, from its first step to its manifest.

plan.json        what is being run: settings, inputs, code, versions. A run is continued only under the same plan
recipe.yaml      the resolved recipe
log.jsonl        a line for each logged step: loss, gradient norm, learning rate, pace
trend.jsonl      the likelihood trend (runs that align)
checkpoint-N/    the last good checkpoint
policy/          the final policy with its tokenizer
manifest.json    written last: a run without one is unfinished
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.files import InputError, read_json, sha256_tree, write_json, write_text
from data_prep.manifest import up_to_date, write_manifest
from train.engine.models import BASE_FILE
from train.engine.recipe import Recipe

COMPLETE = "complete.json"  # written last into a checkpoint, with the digest of its files


@dataclasses.dataclass(frozen=True)
class RunDirectory:
    """A run's directory and its plan (from `data_prep.manifest.plan`)."""

    path: Path
    plan: dict[str, Any]

    @property
    def is_done(self) -> bool:
        """Whether the run is finished, under this plan, and undamaged."""
        return up_to_date(self.path, self.plan)

    def begin(self, recipe: Recipe, fresh: bool) -> None:
        """Create the directory, or check that what it holds was begun under the same plan: InputError if not.
        `fresh` removes what an earlier run left."""
        if fresh and self.path.exists():
            if any(self.path.iterdir()) and not (self.path / "plan.json").exists():
                raise InputError(f"{self.path}: holds files, but no run; --fresh removes only runs, name another --out")
            shutil.rmtree(self.path)
        if (self.path / "plan.json").exists():
            earlier = read_json(self.path / "plan.json")
            changed = _differences(earlier, self.plan)
            if changed:
                raise InputError(
                    f"{self.path}: holds a run with another {', '.join(changed)}; name another --out, or give "
                    "--fresh to remove it and start again"
                )
        (self.path / "manifest.json").unlink(missing_ok=True)  # finished but damaged: it is finished again
        write_json(self.path / "plan.json", self.plan)  # first: it makes the directory a run's
        write_text(self.path / "recipe.yaml", yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False))

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; unfinished or damaged ones are removed, and said so."""
        whole = None
        for path in sorted(self.path.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])):
            if (path / COMPLETE).exists() and read_json(path / COMPLETE)["sha256"] == _digest(path):
                whole = path
            else:
                print(f"{path}: unfinished or damaged, removed")
                shutil.rmtree(path)
        return whole

    def finish(
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, outputs: list[str], facts: dict[str, Any],
        circumstances: dict[str, Any], weights: dict[str, Any] | None = None, base: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Save the policy and write the manifest. weights: gathered ones of a sharded policy. base: what an adapter
        belongs to."""
        save_policy(self.path / "policy", policy, tokenizer, weights, base)
        write_manifest(
            self.path, self.plan, outputs=["policy", "recipe.yaml", *outputs], facts=facts, circumstances=circumstances
        )


def save_policy(
    path: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Save model (or adapter, with its `base`) and tokenizer into a directory that appears only when it is whole."""
    unfinished = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    policy.save_pretrained(unfinished, state_dict=weights)
    tokenizer.save_pretrained(unfinished)
    if base is not None:
        write_json(unfinished / BASE_FILE, base)
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole."""
    write_json(checkpoint / COMPLETE, {"sha256": _digest(checkpoint)})


def _digest(checkpoint: Path) -> str:
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE]
    return sha256_tree(files, checkpoint)


def _differences(earlier: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for key in sorted(set(earlier) | set(now)):
        old, new = earlier.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            names += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            names.append(prefix + key)
    return names
