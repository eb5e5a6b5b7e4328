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
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from data_prep.files import InputError, read_jsonl, write_jsonl
from train.engine.batches import EpochSampler, collate, in_batches
from train.engine.logps import logps_of_rows, response_logps, sliding_window
from train.engine.rundir import seal
from train.engine.sampling import sample
from train.engine.tokens import EncodedRow
from train.engine.trend import Measured, kl_estimate, summarise

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]  # log_ratios, rewards, mask, all [B, K], to losses [B]
START_TOLERANCE = 1e-2  # nats a response: what batch shapes change in float32, with room
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
        self._objective, self._sampler, self._window = objective, sampler, sliding_window(model)
        self._ref_logps = ref_logps
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
        logps = response_logps(model, inputs, self._window)
        losses = self._objective(logps - inputs["ref_logps"], inputs["rewards"], inputs["mask"])
        if not torch.isfinite(losses).all():
            bad = inputs["row"][~torch.isfinite(losses)].tolist()
            names = ", ".join(repr(self.train_dataset[i].id) for i in bad)
            raise InputError(
                f"step {self.state.global_step + 1}: the loss of row {names} is not finite; look at the row"
            )
        # Processes average their gradients, so each multiplies its sum by their number.
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch


class TrendTrainer(RowTrainer):
    """RowTrainer that writes the likelihood trend of a held-out and a training set at every evaluation step."""

    def __init__(self, model: PreTrainedModel, arguments: TrainingArguments, rows: list[EncodedRow],
                 ref_logps: dict[str, list[float]], objective: Objective, sampler: EpochSampler, *,
                 heldout: list[EncodedRow], heldout_ref_logps: dict[str, list[float]],
                 train_subset: list[EncodedRow], reference: PreTrainedModel, tokenizer: Any, beta: float,
                 max_response_tokens: int, trend_path: Path, batch_size: int):  # fmt: skip
        """heldout, train_subset: the two fixed sets. reference: mu, for the samples of the KL."""
        super().__init__(model, arguments, rows, ref_logps, objective, sampler, eval_dataset=heldout)
        self._sets = {"heldout": (heldout, heldout_ref_logps), "train": (train_subset, ref_logps)}
        self._reference, self._tokenizer, self._beta = reference.to(self.args.device), tokenizer, beta
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
                check_start(rows, measured)
            record.update(summarise(measured, self._beta))
            if split == "heldout":
                record.update(self._kl(rows))
            self.records.append(record)
        if self.is_world_process_zero():
            write_jsonl(self._trend_path, self.records)
        last = next(record for record in reversed(self.records) if record["split"] == "heldout")
        metrics = {
            "heldout_chosen": last["chosen"]["r"], "heldout_rejected": last["rejected"]["r"],
            "heldout_margin": last["margin"], "heldout_accuracy": last["accuracy"], "heldout_kl": last["kl"],
        }  # fmt: skip
        self.log(metrics)
        return metrics

    def _measure(self, rows: list[EncodedRow], ref_logps: dict[str, list[float]]) -> list[Measured]:
        model = self.accelerator.unwrap_model(self.model)
        mine = self._share(len(rows))
        logps = logps_of_rows(model, [rows[i] for i in mine], self._batch_size)
        found = dict(gather_object(list(zip(mine, logps, strict=True))))
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
                EncodedRow(rows[i].id, prompt, [ids], [0.0])
                for i, prompt, ids in zip(batches[number], prompts, responses, strict=True)
            ]
            policy = logps_of_rows(model, drawn, self._batch_size)
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


def check_start(rows: list[EncodedRow], measured: list[Measured]) -> None:
    """Refuse to train unless pi = mu at step 0, in every response: InputError with the row if not."""
    for row, prompt in zip(rows, measured, strict=True):
        worst = max(abs(own - ref) for own, ref in zip(prompt.logps, prompt.ref_logps, strict=True))
        if not worst <= START_TOLERANCE:
            raise InputError(
                f"at step 0 the policy is not the reference: |log pi - log mu| is {worst:.4f} nats in row {row.id!r}; "
                "the reference log-probs belong to another model or template, delete their cache"
            )


class Bookkeeping(TrainerCallback):
    """Writes log.jsonl (a line for each logged step) and seals checkpoints, keeping the last good one."""

    def __init__(self, path: Path, resumed_at: int):
        """path: log.jsonl; its lines after step `resumed_at` are dropped, they will be written again."""
        self.path = path
        self.lines = [line for _, line in read_jsonl(path) if line["step"] <= resumed_at] if path.exists() else []
        self.started, self.at_start = time.monotonic(), resumed_at

    def on_log(self, args: TrainingArguments, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and logs:
            done = state.global_step - self.at_start
            pace = {"steps_per_s": round(done / (time.monotonic() - self.started), 3)} if done else {}
            numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
            wild = [key for key, value in numbers.items() if not math.isfinite(value)]
            if wild:
                raise InputError(f"step {state.global_step}: {', '.join(wild)} not finite; train gentler")
            self.lines.append({"step": state.global_step, **numbers, **pace})
            write_jsonl(self.path, self.lines)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()  # every process has written its part
        if state.is_world_process_zero:
            seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            for path in Path(args.output_dir).glob("checkpoint-*"):
                if path.name != f"checkpoint-{state.global_step}":
                    shutil.rmtree(path)
