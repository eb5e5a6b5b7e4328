"""Responses drawn from a policy: plain sampling from its distribution, or greedy decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """One response (ids, with EOS if it was reached) to each prompt, as one batch.

    temperature 0 is greedy; above 0 the whole distribution is sampled (no top-k, no top-p). The same batch and
    seed give the same responses, and the caller's random state is left as it was.
    """
    width = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    device = next(model.parameters()).device
    input_ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    choice: dict[str, Any] = {"do_sample": False}
    if temperature:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    was_training = model.training
    model.eval()
    # The checkpoint's own defaults (top-k, penalties, ...) would bend the distribution; they are put back below.
    own, model.generation_config = model.generation_config, GenerationConfig()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, use_cache=True,
            pad_token_id=pad, eos_token_id=tokenizer.eos_token_id, **choice,
        )  # fmt: skip
    model.train(was_training)
    model.generation_config = own
    responses = []
    for ids in output[:, width:].tolist():
        end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        responses.append(ids[:end])
    return responses
