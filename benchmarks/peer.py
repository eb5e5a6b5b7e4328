"""TRL's own DPOTrainer on the same tokens: loss `nca_pair`, K = 2, with and without its precomputed references.

TRL takes text. Here a token is a word ("t000017"), split at spaces, so that its tokenizer gives back exactly our ids.
Its working options for speed on this machine: no gradient checkpointing (its default is to recompute), no
truncation, its own chunked head (which it always uses); `padding_free` is switched off in this version of TRL.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from datasets import disable_progress_bars as disable_datasets_bars
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.workload import EOS
from train.engine.tokens import EncodedRow


def word(i: int) -> str:
    """The text of token i. All are of one length: none is the beginning of another."""
    return f"t{i:06}"


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose token i is `word(i)`."""
    words = {word(i): i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=word(0), pad_token=word(1), eos_token=word(EOS),
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


class TrlSteps:
    """DPOTrainer with the steps of its training loop, without its optimizer."""

    def __init__(self, model: PeftModel, rows: Sequence[EncodedRow], directory: Path, *, beta: float, cached: bool):
        """model: a base with adapters; the trainer puts its own on the base and takes their values. (A model that came
        with adapters would have them in its reference.) rows: of 2 responses, the chosen one first. cached:
        precompute the references, as the trainer starts."""
        from trl import DPOConfig, DPOTrainer

        values = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
        adapters, base = model.peft_config["default"], model.unload()

        disable_datasets_bars()

        def text(ids: list[int]) -> str:
            return "".join(f"{word(i)} " for i in ids)

        data = Dataset.from_list([
            {"prompt": text(row.prompt_ids), "chosen": text(row.response_ids[0]).rstrip(),
             "rejected": text(row.response_ids[1]).rstrip()}
            for row in rows
        ])  # fmt: skip
        on_cpu = next(base.parameters()).device.type == "cpu"
        config = DPOConfig(
            output_dir=str(directory), loss_type=["nca_pair"], beta=beta, max_length=None, report_to="none",
            per_device_train_batch_size=1, precompute_ref_log_probs=cached, gradient_checkpointing=False,
            bf16=base.dtype == torch.bfloat16, use_cpu=on_cpu, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        self.trainer = DPOTrainer(
            model=base, args=config, train_dataset=data, processing_class=word_tokenizer(base.config.vocab_size),
            peft_config=adapters,
        )  # fmt: skip
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(values.pop(name))
        if values:
            raise AssertionError("TRL was to train the same adapters, and does not")
        encoded = list(self.trainer.train_dataset)
        for row, example in zip(rows, encoded, strict=True):
            ours = (row.prompt_ids, *row.response_ids)
            if ours != (example["prompt_ids"], example["chosen_ids"], example["rejected_ids"]):
                raise AssertionError("TRL was to see the same tokens, and does not")
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
        self.examples = [{name: e[name] for name in names if name in e} for e in encoded]
        self.trainer.current_gradient_accumulation_steps = 1

    def step(self, *rows: int) -> Tensor:
        """Loss and gradients of a batch of rows, by the trainer's own training step; returns the loss."""
        inputs = self.trainer.data_collator([self.examples[i] for i in rows])
        return self.trainer.training_step(self.trainer.model, inputs)
