"""What is measured: a small Mistral with adapters, rows of UltraFeedback's lengths, and their FLOPs."""

import dataclasses
import math
import random
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from train.engine.models import ADAPTED
from train.engine.tokens import EncodedRow

EOS, FIRST_TOKEN = 2, 3  # ids below are special in Mistral's vocabulary
LONGEST = 1024  # tokens of a prompt or a response
# Width 512 and 8 layers; the rest follows Mistral-7B: heads of 128, 4 queries a key, feed-forward 3.5 x as wide.
SHAPE = {
    "vocab_size": 32_000, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 128, "intermediate_size": 1792, "max_position_embeddings": 8192,
    "sliding_window": None, "attn_implementation": "sdpa",
}  # fmt: skip
TINY = {**SHAPE, "vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 224}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Log-normal lengths in tokens."""

    prompt: float
    response: float = 230.0
    prompt_spread: float = 0.0
    response_spread: float = 0.28


# The targets were stated for 1.66 padded tokens for a unique one at UltraFeedback's lengths, 2.50 with long prompts and
# 1.66 with short ones; responses are as long, and spread as much, as gives these. The last has UltraFeedback's.
ULTRAFEEDBACK = Lengths(120, prompt_spread=0.6)
REGIMES = {
    "UltraFeedback-like": ULTRAFEEDBACK,
    "long prompts (512)": Lengths(512, response=157),
    "short prompts (32)": Lengths(32, response_spread=0.51),
    "long prompts (512), UltraFeedback's responses": Lengths(512),
}
PADDED_OVER_UNIQUE = {"UltraFeedback-like": 1.66, "long prompts (512)": 2.5, "short prompts (32)": 1.66}


def make_rows(count: int, lengths: Lengths, *, k: int = 4, vocabulary: int = 32_000, seed: int = 0) -> list[EncodedRow]:
    """Rows of random tokens; responses end with EOS, rewards are k - 1 .. 0, the best first.

    So few rows scatter, so draws are repeated until the padded / unique ratio and the mean stream length of the rows
    are within 3 % (one row: 10 %) of the distribution's.
    """
    rng = random.Random(seed)

    def length(median: float, spread: float) -> int:
        return max(2, min(LONGEST, round(median * math.exp(rng.gauss(0, spread)))))

    def draw(n: int) -> list[tuple[int, list[int]]]:
        return [
            (length(lengths.prompt, lengths.prompt_spread),
             [length(lengths.response, lengths.response_spread) for _ in range(k)])
            for _ in range(n)
        ]  # fmt: skip

    def size(drawn: list[tuple[int, list[int]]]) -> tuple[float, float]:
        unique = sum(p + sum(r) for p, r in drawn)
        return unique / len(drawn), sum(len(r) * (p + max(r)) for p, r in drawn) / unique

    wanted, slack = size(draw(4000)), 0.03 if count > 1 else 0.1
    drawn = draw(count)
    while any(abs(found / want - 1) > slack for found, want in zip(size(drawn), wanted, strict=True)):
        drawn = draw(count)

    def ids(n: int) -> list[int]:
        return [rng.randrange(FIRST_TOKEN, vocabulary) for _ in range(n)]

    rewards = [float(k - 1 - j) for j in range(k)]
    return [EncodedRow(str(i), ids(p), [[*ids(n - 1), EOS] for n in r], rewards) for i, (p, r) in enumerate(drawn)]


def padded_over_unique(rows: Sequence[EncodedRow]) -> float:
    """Tokens that the released computation processes over the tokens that there are."""
    padded = sum(
        len(row.response_ids) * (len(row.prompt_ids) + max(map(len, row.response_ids))) for row in rows
    )  # fmt: skip
    return padded / sum(row.stream_length for row in rows)


def new_model(shape: dict, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A MistralForCausalLM with random weights and LoRA r 16 on all projections, the same at each call.

    The zero half of the adapters is made random as well: with pi = mu every loss would be the same constant, right
    or wrong.
    """
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**shape)).to(dtype)
    return adapted(model, ADAPTED["mistral"])


def adapted(model: PreTrainedModel, targets: dict) -> PreTrainedModel:
    """Put random adapters of rank 16 on a model."""
    config = LoraConfig(r=16, lora_alpha=16, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", **targets)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def flops(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> float:
    """FLOPs of a training step (forward and backward pass, references known) on the unique tokens of the rows.

    A frozen linear layer: 2 per parameter and token forward, 2 backward (no gradient of weights). Adapters: 2 + 4.
    The head: 4, at the N predicted tokens only. Attention: 4 per pair of tokens that see each other and head
    dimension forward, twice that backward. Of the first layer's q, k and v no gradient to the input is needed. Each
    token of a mixture meets `num_experts_per_tok` experts. Recomputation does not count.
    """
    base = model.get_base_model()
    config = base.config
    hidden, width = config.hidden_size, config.head_dim or config.hidden_size // config.num_attention_heads
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * width
    experts = getattr(config, "num_experts_per_tok", 1)
    layer = hidden * (heads + config.num_attention_heads * width) + 3 * experts * hidden * config.intermediate_size
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters *= experts / getattr(config, "num_local_experts", 1)
    total = 0.0
    for row in rows:
        tokens, p = row.stream_length, len(row.prompt_ids)
        lengths = [len(ids) - 1 for ids in row.response_ids]
        pairs = p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in lengths)
        total += tokens * (4 * layer * config.num_hidden_layers - 2 * hidden * heads + 6 * adapters)
        total += 12 * pairs * config.num_attention_heads * width * config.num_hidden_layers
        total += 4 * sum(map(len, row.response_ids)) * hidden * config.vocab_size
    return total
