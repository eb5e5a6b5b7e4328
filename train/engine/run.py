"""The command behind every objective: rows and a reference policy in, an aligned policy and its trend out."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from data_prep.files import InputError, sha256_text
from data_prep.manifest import plan
from data_prep.rows import read_rows
from train.engine.batches import EpochSampler
from train.engine.models import Checkpoint, as_reference, load_policy, record_base
from train.engine.planner import plan_run
from train.engine.recipe import AlignmentRecipe, Recipe
from train.engine.reference import ReferenceCache, precision_of, tolerance_of
from train.engine.rundir import RunDirectory
from train.engine.sizes import Architecture, RowStatistics
from train.engine.tokens import Encoder
from train.engine.trainer import Bookkeeping, RowTrainer, TrendTrainer

PLACES = ("model", "rows", "eval_rows")
TRAIN_SUBSET = 128  # training rows on which the trend is measured beside the held-out set


def align(method: str, loss: Any, uses: tuple[str, ...]) -> None:
    """Parse the command line and train. `uses` names the recipe's keys that are handed to `loss`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m train.{method}",
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", help="run directory; needed unless --dry-run")
    parser.add_argument("--reference-cache", help="directory shared between runs; default: inside the run")
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier run left in --out")
    parser.add_argument("--report-to", nargs="+", default=[], metavar="NAME", help="tensorboard, wandb, ...")
    parser.add_argument("--dry-run", action="store_true", help="print the whole plan: memory, disk, steps, hours")
    parser.add_argument(
        "--devices", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="how many, for --dry-run"
    )
    AlignmentRecipe.add_arguments(parser)
    arguments = parser.parse_args()
    recipe = AlignmentRecipe.from_arguments(arguments)
    if arguments.dry_run:
        architecture = Architecture.of(recipe.model, recipe.model_revision or None)
        print(plan_run(recipe, method, architecture, RowStatistics.of(recipe.rows, recipe), arguments.devices).show())
        return
    absent = set(arguments.report_to) - set(get_available_reporting_integrations())
    if absent:
        raise InputError(f"--report-to {' '.join(sorted(absent))}: not installed here; pip install it, or leave it out")
    checkpoint = Checkpoint.of(recipe)
    missing = [name for name in ("rows", "eval_rows") if not getattr(recipe, name)]
    missing += [] if arguments.out else ["out"]
    if missing:
        raise InputError(f"nothing says --{missing[0].replace('_', '-')}, nor does the recipe; give it")
    options = {name: getattr(recipe, name) for name in uses}
    inputs = {"rows": recipe.rows, "eval_rows": recipe.eval_rows}
    settings = {
        "method": method,
        "objective": options,
        "recipe_name": Path(arguments.recipe).stem,
        # Where files lie decides nothing; their content is among the inputs.
        "recipe": {key: value for key, value in dataclasses.asdict(recipe).items() if key not in PLACES},
    }
    planned = plan(f"train.{method}", {**settings, "model": checkpoint.digest}, inputs)
    run = RunDirectory(Path(arguments.out), planned)
    if not arguments.fresh and run.is_done:
        print(f"{run.path}: done already, nothing to do")
        return

    state = PartialState(cpu=not torch.cuda.is_available())
    with state.main_process_first():
        if state.is_main_process:
            run.begin(recipe, arguments.fresh)
    sharded = any(os.environ.get(name) == "true" for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))
    if sharded and recipe.kl_prompts:
        raise InputError("a sharded policy cannot be sampled from while it trains; set kl_prompts to 0")
    arguments_of_trainer = training_arguments(
        run.path, recipe, evaluate_every=recipe.evaluate_every, report_to=arguments.report_to
    )  # before the model is loaded: ZeRO-3 must know
    policy, tokenizer = load_policy(checkpoint, recipe, state.device)
    encoder = Encoder.of(tokenizer, recipe)
    rows = encoder.rows(read_rows(recipe.rows))
    facts = {"rows": encoder.facts()}
    heldout = encoder.rows(read_rows(recipe.eval_rows))
    with state.main_process_first():
        cache = ReferenceCache(
            Path(arguments.reference_cache or run.path / "reference"), checkpoint, precision_of(recipe)
        )
    if sharded:
        ref_logps, heldout_ref_logps = cache.lookup(rows), cache.lookup(heldout)
    else:
        policy.to(state.device)
        with as_reference(policy):  # nothing is trained yet: pi = mu
            ref_logps = cache.logps(policy, rows, recipe.micro_batch)
            heldout_ref_logps = cache.logps(policy, heldout, recipe.micro_batch)
    reference = None
    if recipe.kl_prompts:
        reference = policy if isinstance(policy, PeftModel) else load_policy(checkpoint, recipe, state.device)[0]

    subset = sorted(rows, key=lambda row: sha256_text(row.id))[:TRAIN_SUBSET]
    sampler = EpochSampler([row.stream_length for row in rows], recipe.global_batch, recipe.epochs, recipe.seed)
    trainer = TrendTrainer(
        policy, arguments_of_trainer, rows, ref_logps, partial(loss, **options), sampler,
        heldout=heldout, heldout_ref_logps=heldout_ref_logps, train_subset=subset, reference=reference,
        kl_rows=heldout[: recipe.kl_prompts], tokenizer=tokenizer, beta=recipe.beta,
        max_response_tokens=recipe.max_response_tokens, trend_path=run.path / "trend.jsonl",
        batch_size=recipe.micro_batch, start_tolerance=tolerance_of(precision_of(recipe)),
    )  # fmt: skip
    train(trainer, run, recipe)
    # All processes take part; DeepSpeed gathers through its engine.
    weights = trainer.accelerator.get_state_dict(trainer.deepspeed or trainer.model) if sharded else None
    if not trainer.is_world_process_zero():
        return
    steps = trainer.state.global_step
    facts["work"] = {
        "steps": steps,
        "prompts_seen": steps * recipe.global_batch,
        "responses_seen": sum(len(rows[i].response_ids) for i in sampler),
        "tokens_seen": sum(rows[i].stream_length for i in sampler),  # each in one forward and one backward pass
    }
    facts |= model_facts(policy, trainer)
    base = record_base(checkpoint, recipe) if isinstance(policy, PeftModel) else None
    run.finish(policy, tokenizer, ["trend.jsonl"], facts, {"device": device_name(trainer)}, weights, base)


def training_arguments(
    path: Path, recipe: Recipe, evaluate_every: int | None = None, report_to: Sequence[str] = ()
) -> TrainingArguments:
    """The recipe in the Trainer's words. The sampler runs through all epochs, so the Trainer sees one. Its own mixed
    precision stays off: the forward pass has the recipe's dtype (train.engine.logps)."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    evaluation: dict[str, Any] = {}
    if evaluate_every:
        evaluation = {"eval_strategy": "steps", "eval_steps": evaluate_every, "eval_on_start": True}
    cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(path), num_train_epochs=1, per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.accumulation(processes), learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_schedule, warmup_steps=recipe.warmup_ratio, weight_decay=recipe.weight_decay,
        adam_beta1=recipe.adam_beta1, adam_beta2=recipe.adam_beta2, max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer, logging_steps=recipe.log_every, report_to=list(report_to), run_name=path.name,
        save_strategy="steps" if recipe.checkpoint_every else "no", save_steps=recipe.checkpoint_every or 500,
        gradient_checkpointing=recipe.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=recipe.seed, data_seed=recipe.seed, use_cpu=cpu, dataloader_pin_memory=not cpu,
        remove_unused_columns=False, logging_nan_inf_filter=False, **evaluation,
    )  # fmt: skip


def train(trainer: RowTrainer, run: RunDirectory, recipe: Recipe) -> None:
    """Train to the end, from the last good checkpoint if there is one."""
    with PartialState().main_process_first():
        resume = run.last_checkpoint()
    # Nothing is measured where a run goes on: its trend must be that of a run which was never interrupted.
    trainer.args.eval_on_start = trainer.args.eval_on_start and resume is None
    step = int(resume.name.rpartition("-")[2]) if resume else 0
    if resume:
        print(f"{run.path}: continues after step {step}")
    trainer.continue_from(step)
    trainer.add_callback(Bookkeeping(run.path / "log.jsonl", step, trainer, recipe.checkpoint_minutes))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.evaluate()  # does nothing where the last step was an evaluation step


def model_facts(policy: PreTrainedModel, trainer: RowTrainer) -> dict[str, Any]:
    """What decides the arithmetic of a run, for its manifest."""
    settings = trainer.args
    return {
        "model": {
            "architecture": type(policy).__name__,
            "parameters": sum(map(_size, policy.parameters())),
            "trainable": sum(_size(p) for p in policy.parameters() if p.requires_grad),
            "dtype": str(next(policy.parameters()).dtype).removeprefix("torch."),
            "attention_dropout": getattr(policy.config, "attention_dropout", None),
        },
        "processes": settings.world_size,
        "global_batch": settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size,
    }


def _size(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves each process a part


def device_name(trainer: RowTrainer) -> str:
    """The device of this process, with its name on CUDA."""
    device = trainer.args.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
