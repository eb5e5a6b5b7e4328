"""Loading and saving models and tokenizers; making the small ones that are trained from scratch."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from data_prep.files import InputError, sha256_text
from data_prep.manifest import file_digest

BOS, EOS, PAD, USER, ASSISTANT, SYSTEM = "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"
# Turns as in the Zephyr template, without its newlines: each marker is one token, so that no merge can cross
# the boundary between prompt and response.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
transformers_logging.disable_progress_bar()  # weights load in a blink here; the bars that matter are ours


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a model comes from: a local directory, or a Hub id with its pinned revision (a commit)."""

    name: str
    revision: str | None = None

    def __post_init__(self) -> None:
        """InputError for a Hub id without a revision: its weights could change between two runs."""
        if not self.is_local and not self.revision:
            raise InputError(
                f"{self.name}: no such directory; for a model from the Hub name its commit with --model-revision"
            )

    @property
    def is_local(self) -> bool:
        """Whether the name is a directory."""
        return Path(self.name).is_dir()

    @property
    def digest(self) -> str:
        """Content of a local directory, or the name and commit on the Hub."""
        return file_digest(self.name) if self.is_local else sha256_text(f"{self.name}@{self.revision}")

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, in float32 without dropout, and its tokenizer; InputError if they cannot be read.

        Only safetensors are read and no code of the checkpoint is run.
        """
        options: dict[str, Any] = {"revision": self.revision, "trust_remote_code": False}
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.name, **options)
            model = AutoModelForCausalLM.from_pretrained(
                self.name, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa", **options
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{self.name}: cannot be loaded ({' '.join(str(error).split())[:300]})") from None
        disable_dropout(model)
        return model, tokenizer


def disable_dropout(model: PreTrainedModel) -> None:
    """Turn off all dropout, in modules and in the configuration (attention reads it there)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    for name in vars(model.config):
        if name.endswith(("dropout", "_pdrop")):
            setattr(model.config, name, 0.0)


def new_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`; every string can be encoded, and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD, USER, ASSISTANT, SYSTEM],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM], chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def new_mistral(
    tokenizer: PreTrainedTokenizerBase, *, hidden: int, layers: int, heads: int, kv_heads: int, feed_forward: int,
    positions: int, seed: int,
) -> MistralForCausalLM:  # fmt: skip
    """A MistralForCausalLM with random weights: the architecture of Mistral-7B, with tied embeddings."""
    torch.manual_seed(seed)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=feed_forward, max_position_embeddings=positions,
        sliding_window=None, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, attn_implementation="sdpa",
    )  # fmt: skip
    return MistralForCausalLM(config)
