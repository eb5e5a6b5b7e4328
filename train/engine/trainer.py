"""The training loop: transformers.Trainer with the loss taken as a mean over prompts, and the likelihood trend
measured instead of an evaluation loss."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from data_prep.files import InputError, read_jsonl, write_jsonl
from data_prep.manifest import cost
from train.engine.batches import EpochSampler, collate, in_batches
from train.engine.logps import causal_lm, logps_of_rows, response_logps_and_aux_loss
from train.engine.models import as_reference
from train.engine.rundir import seal
from train.engine.sampling import sample
from train.engine.tokens import EncodedRow
from train.engine.trend import Measured, kl_estimate, summarise

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]  # log_ratios, rewards, mask, all [B, K], to losses [B]
KL_SEED = 20_240_208  # the KL's samples are drawn with the same random numbers in every run and at every step


class RowTrainer(Trainer):
    """Trains a policy on encoded rows with any objective on [B, K] log-ratios."""

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        rows: list[EncodedRow],
        ref_logps: dict[str, list[float]],
        objective: Objective,
        sampler: EpochSampler,
        **options: Any,
    ):
        """ref_logps: log mu of each row's responses, by row id. `options` go to transformers.Trainer."""
        self._ids = {row.id: index for index, row in enumerate(rows)}
        self._objective, self._sampler, self._ref_logps = objective, sampler, ref_logps
        self._aux_coefficient = getattr(causal_lm(model), "router_aux_loss_coef", 0.0)
        self.seen = {"prompts": 0, "tokens": 0}  # by this process, since it started
        super().__init__(model, arguments, train_dataset=rows, data_collator=self._collate, **options)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the prompts of the whole global batch

    def continue_from(self, step: int) -> None:
        """Called before training, which begins after `step`: 0, or that of a checkpoint."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Nothing is measured here."""
        return {}

    def _collate(self, rows: list[EncodedRow]) -> dict[str, Tensor]:
        return {**collate(rows, self._ref_logps), "row": torch.tensor([self._ids[row.id] for row in rows])}

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._sampler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, and how many prompts they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = torch.tensor(sum(len(batch["rewards"]) for batch in batches), device=device)
        return batches, self.accelerator.gather(prompts).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This micro-batch's share of the mean loss over the prompts of the global batch."""
        logps, aux_loss = response_logps_and_aux_loss(model, inputs)
        losses = self._objective(logps - inputs["ref_logps"], inputs["rewards"], inputs["mask"])
        if aux_loss is not None:
            losses = losses + self._aux_coefficient * aux_loss
        if not torch.isfinite(losses).all():
            bad = inputs["row"][~torch.isfinite(losses)].tolist()
            names = ", ".join(repr(self.train_dataset[i].id) for i in bad)
            raise InputError(
                f"step {self.state.global_step + 1}: the loss of row {names} is not finite; look at the row"
            )
        self.seen["prompts"] += len(losses)
        self.seen["tokens"] += inputs["input_ids"].numel()
        # Processes average their gradients, so each multiplies its sum by their number.
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch


class TrendTrainer(RowTrainer):
    """RowTrainer that writes the likelihood trend of a held-out and a training set at every evaluation step."""

    def __init__(self, model: PreTrainedModel, arguments: TrainingArguments, rows: list[EncodedRow],
                 ref_logps: dict[str, list[float]], objective: Objective, sampler: EpochSampler, *,
                 heldout: list[EncodedRow], heldout_ref_logps: dict[str, list[float]],
                 train_subset: list[EncodedRow], reference: PreTrainedModel | None, kl_rows: list[EncodedRow],
                 tokenizer: Any, beta: float, max_response_tokens: int, trend_path: Path, batch_size: int,
                 start_tolerance: float):  # fmt: skip
        """heldout, train_subset: the two fixed sets. reference: mu, for the samples of the KL to the prompts of
        kl_rows; the policy itself, if it is an adapter. start_tolerance: see `check_start`."""
        super().__init__(model, arguments, rows, ref_logps, objective, sampler, eval_dataset=heldout)
        self._sets = {"heldout": (heldout, heldout_ref_logps), "train": (train_subset, ref_logps)}
        self._reference, self._kl_rows, self._tokenizer, self._beta = reference, kl_rows, tokenizer, beta
        if reference is not None and reference is not model:
            reference.requires_grad_(False).to(self.args.device)
        self._start_tolerance = start_tolerance
        self._max_response_tokens, self._trend_path = max_response_tokens, trend_path
        self._batch_size = batch_size
        self.records: list[dict[str, Any]] = []

    def continue_from(self, step: int) -> None:
        """Take over the records up to `step` of an interrupted run; later ones are measured again."""
        if self._trend_path.exists():
            self.records = [record for _, record in read_jsonl(self._trend_path) if record["step"] <= step]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the trend now and append it to trend.jsonl; the held-out numbers go to the logs as well."""
        step = self.state.global_step
        if any(record["step"] == step for record in self.records):
            return {}  # resumed at a checkpoint that was measured already
        for split, (rows, ref_logps) in self._sets.items():
            record = {"step": step, "epoch": round(step / self._sampler.steps_per_epoch, 4), "split": split}
            measured = self._measure(rows, ref_logps)
            if step == 0:
                check_start(rows, measured, self._start_tolerance)
            record.update(summarise(measured, self._beta))
            if split == "heldout" and self._kl_rows:
                record.update(self._kl(self._kl_rows))
            self.records.append(record)
        if self.is_world_process_zero():
            write_jsonl(self._trend_path, self.records)
        last = next(record for record in reversed(self.records) if record["split"] == "heldout")
        metrics = {
            "heldout_chosen": last["chosen"]["r"], "heldout_rejected": last["rejected"]["r"],
            "heldout_margin": last["margin"], "heldout_accuracy": last["accuracy"],
            **({"heldout_kl": last["kl"]} if "kl" in last else {}),
        }  # fmt: skip
        self.log(metrics)
        return metrics

    def _measure(self, rows: list[EncodedRow], ref_logps: dict[str, list[float]]) -> list[Measured]:
        model = self.accelerator.unwrap_model(self.model)
        # A sharded model needs all processes in each forward pass: batches are cut first, and where they run out
        # a process repeats one.
        batches = list(in_batches(rows, self._batch_size))
        found: dict[int, list[float]] = {}
        for start in range(0, len(batches), self.accelerator.num_processes):
            mine = batches[(start + self.accelerator.process_index) % len(batches)]
            logps = logps_of_rows(model, [rows[i] for i in mine], len(mine))
            found |= zip(mine, logps, strict=True)
        found = dict(gather_object(list(found.items())))
        model.train()
        for i, values in found.items():
            if not all(map(math.isfinite, values)):
                raise InputError(f"step {self.state.global_step}: a log-prob of row {rows[i].id!r} is not finite")
        return [
            Measured(row.rewards, found[i], ref_logps[row.id], [len(ids) for ids in row.response_ids])
            for i, row in enumerate(rows)
        ]

    def _kl(self, rows: list[EncodedRow]) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        pairs = []
        # Batches are cut before they are shared out, so that the samples do not depend on the number of processes.
        batches = list(in_batches(rows, 4 * self._batch_size))
        for number in self._share(len(batches)):
            prompts = [rows[i].prompt_ids for i in batches[number]]
            responses = sample(
                model, self._tokenizer, prompts, max_new_tokens=self._max_response_tokens, temperature=1.0,
                seed=KL_SEED + number,
            )  # fmt: skip
            drawn = [
                EncodedRow(rows[i].id, prompt, [ids], [0.0], rows[i].unattended)
                for i, prompt, ids in zip(batches[number], prompts, responses, strict=True)
            ]
            policy = logps_of_rows(model, drawn, self._batch_size)
            with as_reference(self._reference):
                reference = logps_of_rows(self._reference, drawn, self._batch_size)
            pairs += [
                (i, p[0] - q[0], len(ids))
                for i, p, q, ids in zip(batches[number], policy, reference, responses, strict=True)
            ]
        pairs = sorted(gather_object(pairs))
        model.train()
        return kl_estimate([ratio for _, ratio, _ in pairs], [length for _, _, length in pairs])

    def _share(self, count: int) -> list[int]:
        """The indices that this process works on."""
        return list(range(self.accelerator.process_index, count, self.accelerator.num_processes))


def check_start(rows: list[EncodedRow], measured: list[Measured], tolerance: float) -> None:
    """Refuse to train unless pi = mu at step 0, in every response: InputError with the row if not.

    tolerance: nats, for a response of n tokens times the root of n: what batch shapes change in the last digits.
    """
    for row, prompt in zip(rows, measured, strict=True):
        for own, ref, n in zip(prompt.logps, prompt.ref_logps, prompt.tokens, strict=True):
            if not abs(own - ref) <= tolerance * math.sqrt(n):
                raise InputError(
                    f"at step 0 the policy is not the reference: |log pi - log mu| is {abs(own - ref):.4f} nats in row "
                    f"{row.id!r}; the reference log-probs belong to another model or template, delete their cache"
                )


class Bookkeeping(TrainerCallback):
    """Writes log.jsonl (a line for each logged step), asks for a checkpoint every so many minutes, and seals
    checkpoints, keeping the last good one."""

    def __init__(self, path: Path, resumed_at: int, trainer: RowTrainer, checkpoint_minutes: float):
        """path: log.jsonl; its lines after step `resumed_at` are dropped, they will be written again.
        checkpoint_minutes: wall time between two checkpoints; 0 for none by time."""
        self.path = path
        self.lines = [line for _, line in read_jsonl(path) if line["step"] <= resumed_at] if path.exists() else []
        self.trainer, self.at_start = trainer, resumed_at
        self.seconds, self.started = 60 * checkpoint_minutes, time.monotonic()
        self.saved = self.started

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.seconds:
            due = broadcast_object_list([time.monotonic() - self.saved >= self.seconds])[0]  # one clock for all
            control.should_save = control.should_save or due

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            wild = [key for key, value in numbers.items() if not math.isfinite(value)]
            if wild:
                raise InputError(f"step {state.global_step}: {', '.join(wild)} not finite; train gentler")
            self.lines.append({"step": state.global_step, **numbers, **self._pace(state.global_step)})
            write_jsonl(self.path, self.lines)

    def _pace(self, step: int) -> dict[str, float]:
        """How fast it goes, over all processes, and the peak memory of this one."""
        elapsed = time.monotonic() - self.started
        pace = {"steps_per_s": (step - self.at_start) / elapsed}
        pace |= {
            f"{name}_per_s": count * self.trainer.args.world_size / elapsed
            for name, count in self.trainer.seen.items()
        }  # fmt: skip
        device = self.trainer.args.device
        peak = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else cost()["peak_mb"]
        return {**{name: round(value, 3) for name, value in pace.items()}, "peak_mb": round(peak, 1)}

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.saved = time.monotonic()
        PartialState().wait_for_everyone()  # every process has written its part
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            for path in Path(args.output_dir).glob("checkpoint-*"):
                if path.name != f"checkpoint-{state.global_step}":
                    shutil.rmtree(path)
