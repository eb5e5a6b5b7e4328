"""The sizes that a plan rests on: the geometry of a model, and the lengths of a set of rows.

Counts of parameters are exact (tests compare them with real models). Lengths are counted in the file of rows, at
4 characters a token, or taken from what is published about a set that is not there yet.
"""

import dataclasses
import math
from pathlib import Path
from typing import Self

import numpy as np

from data_prep.files import InputError
from data_prep.rows import read_rows
from train.engine.recipe import AlignmentRecipe

# Lengths of 1,000 real UltraFeedback pairs (a sample of trl-lib/ultrafeedback_binarized): characters / 4 at these
# percentiles, prompts and responses. The template's marks come on top.
PERCENTILES = (0, 5, 10, 25, 50, 75, 90, 95, 99, 100)
ULTRAFEEDBACK = (
    (2, 10, 14, 27, 91, 200, 413, 634, 1090, 1500),
    (1, 6, 16, 62, 217, 487, 716, 819, 1045, 1400),
)
TEMPLATE_TOKENS = 25  # of the Zephyr template with its empty system message; assumed
# UltraInteract has no sample at hand: these are guesses, and the plan says so. Prompts hold earlier turns.
ULTRAINTERACT = (
    (50, 100, 130, 200, 400, 800, 1300, 1700, 2500, 4000),
    (10, 40, 60, 120, 220, 350, 500, 650, 1000, 2000),
)
# What scripts/prepare_data.sh writes: rows and K. Only 61,966 (all_results.json of the authors' preference model) and
# 219,522 (card of openbmb/UltraInteract_pair) are published; the others follow if nothing is dropped for ties.
PUBLISHED = {
    "released-reward": (61_966, 4, ULTRAFEEDBACK),
    "released-preference": (61_966, 2, ULTRAFEEDBACK),
    "ultrafeedback": (61_966, 4, ULTRAFEEDBACK),
    "ultrafeedback-K2": (61_966, 2, ULTRAFEEDBACK),
    "ultrafeedback-K3": (61_966, 3, ULTRAFEEDBACK),
    "pairs-best-vs-random": (61_966, 2, ULTRAFEEDBACK),
    "pairs-released": (61_966, 2, ULTRAFEEDBACK),
    "pairs-best-vs-rest": (3 * 61_966, 2, ULTRAFEEDBACK),
    "pairs-all": (6 * 61_966, 2, ULTRAFEEDBACK),
    "ultrainteract": (219_522, 2, ULTRAINTERACT),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Geometry of a MistralForCausalLM (experts = 0) or MixtralForCausalLM."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    experts: int = 0
    experts_per_token: int = 0
    tied: bool = False  # whether the head is the embedding

    @classmethod
    def of(cls, model: str, revision: str | None = None) -> Self:
        """Of a directory's or a Hub model's config.json; the paper's models are known without the Hub.

        InputError if it cannot be read or is neither Mistral nor Mixtral.
        """
        if not model:
            raise InputError("the recipe names no model; name a directory or a Hub id with --model")
        if model in KNOWN and not Path(model).is_dir():
            return KNOWN[model]
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(model, revision=revision or None, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{model}: no config.json to plan with ({' '.join(str(error).split())[:200]})") from None
        if config.model_type not in ("mistral", "mixtral"):
            raise InputError(f"{model}: is a {config.model_type!r} model; known are mistral and mixtral")
        return cls(
            config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            config.intermediate_size, config.vocab_size, getattr(config, "num_local_experts", 0),
            getattr(config, "num_experts_per_tok", 0), config.tie_word_embeddings,
        )  # fmt: skip

    @property
    def attention_parameters(self) -> int:
        """Of one layer: q, k, v, o."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def feed_forward_parameters(self) -> int:
        """Of one layer (all its experts, without the router): gate, up, down."""
        return 3 * self.hidden * self.feed_forward * max(self.experts, 1)

    @property
    def layer_parameters(self) -> int:
        """Of one layer, with its router and its two norms."""
        return self.attention_parameters + self.feed_forward_parameters + self.hidden * (self.experts + 2)

    @property
    def embedding_parameters(self) -> int:
        """Embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.hidden

    @property
    def active_parameters(self) -> int:
        """Those that one token passes: `experts_per_token` of the experts."""
        one = self.feed_forward_parameters // max(self.experts, 1)
        return self.parameters - self.layers * one * (self.experts - self.experts_per_token)

    def lora_parameters(self, rank: int) -> int:
        """Of adapters on every projection: q, k, v, o, gate, up, down, and the same of each expert."""
        attention = 2 * (self.hidden + self.heads * self.head_dim) + 2 * (self.hidden + self.kv_heads * self.head_dim)
        if not self.experts:
            return rank * self.layers * (attention + 3 * (self.hidden + self.feed_forward))
        # The experts' gate and up are one matrix in transformers, with one adapter for both.
        expert = (self.hidden + 2 * self.feed_forward) + (self.feed_forward + self.hidden)
        return rank * self.layers * (attention + self.experts * expert)

    def nf4_bytes(self) -> float:
        """Frozen weights as bitsandbytes keeps them: 4 bits and a float32 scale for 64 of them in linear layers
        (train.engine.experts makes the experts such); embedding, head, norms and routers in bf16."""
        linear = self.layers * (self.attention_parameters + self.feed_forward_parameters)
        return linear * (0.5 + 4 / 64) + 2 * (self.parameters - linear)


MISTRAL_7B = Architecture(4096, 32, 32, 8, 128, 14336, 32000)
MIXTRAL_8X7B = Architecture(4096, 32, 32, 8, 128, 14336, 32000, experts=8, experts_per_token=2)
KNOWN = {
    "HuggingFaceH4/mistral-7b-sft-beta": MISTRAL_7B,
    "mistralai/Mistral-7B-v0.1": MISTRAL_7B,
    "mistralai/Mixtral-8x7B-v0.1": MIXTRAL_8X7B,
}


@dataclasses.dataclass(frozen=True)
class RowStatistics:
    """Sizes of a set of rows, in tokens after truncation; means are over rows."""

    rows: int
    responses: int
    prompt_tokens: float
    response_tokens: float  # of all K responses together
    attended_pairs: float  # (query, key) pairs of a row's packed stream that attention must work through
    longest: int  # stream of the longest row
    origin: str  # where these numbers come from

    @classmethod
    def of(cls, path: str, recipe: AlignmentRecipe) -> Self:
        """Of a file of rows, at 4 characters a token; of what is published where the file is not there.

        InputError if it is neither there nor one of the sets of scripts/prepare_data.sh.
        """
        if not Path(path).exists():
            return cls.assumed(path, recipe)
        lengths = []
        for row in read_rows(path):
            prompt = sum(len(turn["content"]) for turn in row.prompt) / 4 + TEMPLATE_TOKENS
            lengths.append((prompt, [len(response) / 4 for response in row.responses]))
        return cls._of_lengths(lengths, recipe, f"{path}, characters / 4")

    @classmethod
    def assumed(cls, path: str, recipe: AlignmentRecipe) -> Self:
        """Of a set that scripts/prepare_data.sh would write: its published size, with assumed lengths."""
        name = Path(path).parent.name
        if name not in PUBLISHED:
            raise InputError(f"{path}: no such file, and no size is known for it; name rows that are there")
        rows, k, (prompts, responses) = PUBLISHED[name]
        ranks = np.tile((np.arange(4096) + 0.5) / 4096 * 100, (1 + k, 1))  # percentiles of a prompt and K responses
        ranks = np.random.default_rng(0).permuted(ranks, axis=1)  # independent of one another
        drawn = np.vstack(
            [np.interp(ranks[0], PERCENTILES, prompts) + TEMPLATE_TOKENS, np.interp(ranks[1:], PERCENTILES, responses)]
        )
        lengths = [(column[0], column[1:]) for column in drawn.T.tolist()]
        lengths_from = "guessed" if responses is ULTRAINTERACT[1] else "those of 1,000 UltraFeedback pairs"
        statistics = cls._of_lengths(lengths, recipe, f"{path} is not there: published size, lengths {lengths_from}")
        room = recipe.max_response_tokens
        if recipe.max_tokens:
            room = min(room, recipe.max_tokens - TEMPLATE_TOKENS)
        longest = max(TEMPLATE_TOKENS + k * room, statistics.longest)  # a short prompt with K responses at the limit
        return dataclasses.replace(statistics, rows=rows, responses=rows * k, longest=longest)

    @classmethod
    def _of_lengths(cls, lengths: list[tuple[float, list[float]]], recipe: AlignmentRecipe, origin: str) -> Self:
        prompt_sum = response_sum = pairs = 0.0
        longest, responses = 0.0, 0
        for prompt, answers in lengths:
            p = min(prompt, recipe.max_prompt_tokens)
            room = min(recipe.max_response_tokens, recipe.max_tokens - p if recipe.max_tokens else math.inf)
            cut = [min(answer + 1, room) for answer in answers]  # with EOS
            prompt_sum, response_sum, responses = prompt_sum + p, response_sum + sum(cut), responses + len(cut)
            pairs += p * p / 2 + sum(r * p + r * r / 2 for r in cut)
            longest = max(longest, p + sum(cut))
        n = len(lengths)
        return cls(n, responses, prompt_sum / n, response_sum / n, pairs / n, math.ceil(longest), origin)

    @property
    def k(self) -> float:
        """Mean number of responses."""
        return self.responses / self.rows

    @property
    def stream_tokens(self) -> float:
        """Mean tokens of a row's packed stream: the prompt once, and its responses."""
        return self.prompt_tokens + self.response_tokens
