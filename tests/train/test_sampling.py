"""Sampling against the model's own distribution, and greedy decoding against a loop of argmax."""

import copy
import random

import numpy
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from train.engine.sampling import sample


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> MistralForCausalLM:
    """Its next-token distribution is spread over all 300 tokens, with logits of standard deviation ~ 0.8."""
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, initializer_range=0.15,
            attn_implementation="sdpa",
        )
    ).eval()  # fmt: skip


PROMPTS = [[9, 30, 40], [7], [50, 51, 52, 53, 54, 55, 56], [80, 12, 80, 12], [200, 100]]


def argmax_loop(model: MistralForCausalLM, prompt: list[int], eos: int, most: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < most and eos not in ids:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[0, -1].argmax()))
    return ids


def distance(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float) -> float:
    """Standard deviations by which Pearson's chi-square of 16,384 drawn first tokens exceeds its mean."""
    prompt, count = [9, 30, 40], 4096
    drawn = torch.cat([
        torch.tensor(sample(model, tokenizer, [prompt] * count, max_new_tokens=1, temperature=temperature, seed=seed))
        for seed in range(4)
    ])  # fmt: skip
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    expected = 4 * count * p
    seen = torch.bincount(drawn.flatten(), minlength=len(p))
    freedom = len(p) - 1
    return float((((seen - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def test_temperature_1_is_the_models_full_distribution(
    model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every token comes as often as softmax(logits) says: no top-k (50 is the library's default), no top-p."""
    assert abs(distance(model, tokenizer, 1.0)) < 5


def test_temperature_divides_the_logits(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """At temperature 2 the draws follow softmax(logits / 2)."""
    assert abs(distance(model, tokenizer, 2.0)) < 5


def test_greedy_is_a_loop_of_argmax(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """With cache and left padding, greedy decoding gives what argmax gives without; it ends with EOS or the limit."""
    free = [argmax_loop(model, prompt, -1, 12) for prompt in PROMPTS]
    ending = copy.deepcopy(tokenizer)
    ending.eos_token = ending.convert_ids_to_tokens(free[0][3])  # a token that does come, as EOS
    expected = [argmax_loop(model, prompt, ending.eos_token_id, 12) for prompt in PROMPTS]
    assert expected[0][-1] == ending.eos_token_id
    assert len({len(ids) for ids in expected}) > 1
    found = sample(model, ending, PROMPTS, max_new_tokens=12, temperature=0.0, seed=0)
    assert found == expected
    for prompt, ids in zip(PROMPTS, expected, strict=True):  # alone, without padding
        assert sample(model, ending, [prompt], max_new_tokens=12, temperature=0.0, seed=1) == [ids]


def test_padding_with_eos_is_not_part_of_a_response(
    model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A tokenizer without a pad token pads with EOS: still one EOS at most, and the prompts' padding is unseen."""
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.eos_token = bare.convert_ids_to_tokens(argmax_loop(model, PROMPTS[0], -1, 4)[3])
    found = sample(model, bare, PROMPTS, max_new_tokens=12, temperature=0.0, seed=0)
    assert found == [argmax_loop(model, prompt, bare.eos_token_id, 12) for prompt in PROMPTS]


def test_a_checkpoints_generation_settings_do_not_bend_the_distribution(
    model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """generation_config.json of a checkpoint may ask for penalties or cuts; what is sampled is pi all the same."""
    expected = sample(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0, seed=0)
    drawn = sample(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.0, seed=0)
    settings = {
        "repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "suppress_tokens": list(range(100, 200)), "min_p": 0.3,
        "typical_p": 0.5, "top_k": 5, "top_p": 0.5, "temperature": 0.3, "do_sample": True, "eos_token_id": 0,
        "min_new_tokens": 5, "num_beams": 1,
    }  # fmt: skip
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert sample(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=0.0, seed=0) == expected
    assert sample(model, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.0, seed=0) == drawn


def test_a_seed_gives_the_same_responses_and_leaves_the_callers_random_state(
    model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The same batch and seed repeat, another seed differs, and no generator of the caller moves."""

    def draw(seed: int) -> list[list[int]]:
        return sample(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1.0, seed=seed)

    torch.manual_seed(11)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    first = draw(3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == states[1:]
    torch.rand(7)
    assert draw(3) == first
    assert draw(4) != first


def test_sampling_leaves_the_models_mode(model: MistralForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that was training goes on training, one that was not does not."""
    for training in (True, False):
        model.train(training)
        sample(model, tokenizer, PROMPTS, max_new_tokens=1, temperature=1.0, seed=0)
        assert model.training is training
