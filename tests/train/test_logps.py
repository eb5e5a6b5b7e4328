"""log pi(y|x) of packed streams against one plain forward pass for each response."""

import dataclasses
import math
import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from train.engine.batches import collate
from train.engine.logps import logps_of_rows, packable, response_logps
from train.engine.tokens import EncodedRow

VOCABULARY = 61
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.25,
    "attn_implementation": "sdpa",
}  # fmt: skip
Plain = Callable[[nn.Module, list[int], list[int]], Tensor]
Rows = Callable[..., list[EncodedRow]]


def build(name: str) -> nn.Module:
    """A small random model; large weights, so that a wrong mask or position moves the log-probs by nats."""
    torch.manual_seed(0)
    window = 4 if name.endswith("window") else None
    how = "dense" if "dense" in name else "split"
    if name.startswith("mistral"):
        return packable(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window)).eval(), how)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return packable(MixtralForCausalLM(MixtralConfig(**SHAPE, **experts, sliding_window=window)).eval(), how)


@pytest.fixture(
    scope="module", params=["mistral", "mistral dense", "mistral window", "mixtral", "mixtral dense", "mixtral window"]
)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Grouped-query attention in all of them; a window of 4 is shorter than most streams."""
    return build(request.param)


@pytest.fixture(scope="module")
def mistral() -> nn.Module:
    return build("mistral")


def separately(model: nn.Module, row: EncodedRow, plain_logps: Plain) -> Tensor:
    return torch.stack([plain_logps(model, row.prompt_ids, ids) for ids in row.response_ids])


def test_packed_equals_separate_forward_passes(model: nn.Module, encoded_rows: Rows, plain_logps: Plain) -> None:
    """[B, K] of a ragged batch equals K plain forward passes for each row; absent responses are 0."""
    rows = encoded_rows(8, seed=0)
    assert any(len(ids) == 1 for row in rows for ids in row.response_ids)
    with torch.no_grad():
        batch = collate(rows)
        found = response_logps(model, batch)
        assert found.shape == batch["mask"].shape
        assert found.dtype == torch.float32
        for i, row in enumerate(rows):
            expected = separately(model, row, plain_logps)
            torch.testing.assert_close(found[i, : len(expected)], expected, rtol=1e-5, atol=1e-5)
        assert (found[~batch["mask"]] == 0).all()


def test_gradients_equal_those_of_separate_forward_passes(
    model: nn.Module, encoded_rows: Rows, plain_logps: Plain
) -> None:
    """Any function of the log-probs has the same gradient in every parameter, packed or not."""
    rows = encoded_rows(4, seed=1)
    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))

    def gradients(losses: list[Tensor]) -> list[Tensor]:
        loss = sum(losses, start=torch.zeros(()))
        return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))

    packed = response_logps(model, collate(rows))
    found = gradients([(weights[:, : packed.shape[1]] * torch.tanh(packed / 20)).sum()])
    expected = gradients([
        weights[i, j] * torch.tanh(value / 20)
        for i, row in enumerate(rows)
        for j, value in enumerate(separately(model, row, plain_logps))
    ])  # fmt: skip
    for (name, _), ours, theirs in zip(model.named_parameters(), found, expected, strict=True):
        assert torch.linalg.norm(ours - theirs) <= 1e-4 * torch.linalg.norm(theirs), name


def test_the_window_matters_here(encoded_rows: Rows) -> None:
    """The windowed models of this file differ from the full ones, or the tests above would prove nothing."""
    rows = encoded_rows(8, seed=0)
    windowed, full = (logps_of_rows(build(name), rows, 8) for name in ("mistral window", "mistral"))
    assert (
        max(abs(a - b) for ours, theirs in zip(windowed, full, strict=True) for a, b in zip(ours, theirs, strict=True))
        > 0.1
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention compiles its kernel, and there is no g++ here")
def test_flex_attention_gives_the_same_numbers(encoded_rows: Rows) -> None:
    """The block mask against the dense one, sliding window included (forward only: on a CPU it has no backward)."""
    rows = encoded_rows(3, seed=0)
    model = build("mistral window")
    dense, flex = (logps_of_rows(packable(model, how), rows, 3) for how in ("dense", "flex"))
    for ours, theirs in zip(flex, dense, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


def test_batch_shape_and_padding_change_nothing(model: nn.Module, encoded_rows: Rows) -> None:
    """One row at a time, in batches of any size, beside much longer rows, in any order: the same log-probs."""
    rows = encoded_rows(9, seed=2)
    alone = logps_of_rows(model, rows, 1)
    assert [len(values) for values in alone] == [len(row.response_ids) for row in rows]
    long = EncodedRow("long", [1] * 25, [[2] * 25, [3] * 6], [0.0, 1.0])
    others = {
        "batches of 4": logps_of_rows(model, rows, 4),
        "one batch": logps_of_rows(model, rows, 99),
        "reversed": logps_of_rows(model, rows[::-1], 4)[::-1],
        "beside a long row": logps_of_rows(model, [long, *rows], 99)[1:],
    }
    for how, found in others.items():
        for ours, theirs in zip(found, alone, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5), how


def test_responses_do_not_see_each_other(model: nn.Module, encoded_rows: Rows) -> None:
    """In another order, without its neighbours or doubled, a response keeps its log-prob."""
    (row,) = [row for row in encoded_rows(20, seed=4) if len(row.response_ids) == 5][:1]
    (values,) = logps_of_rows(model, [row], 1)
    for order in ([4, 2, 0, 1, 3], [3], [1, 1, 4], [0, 2]):
        picked = dataclasses.replace(
            row, response_ids=[row.response_ids[i] for i in order], rewards=[row.rewards[i] for i in order]
        )
        (found,) = logps_of_rows(model, [picked], 1)
        assert found == pytest.approx([values[i] for i in order], rel=1e-5, abs=1e-5)


def test_one_token_responses_only(model: nn.Module, plain_logps: Plain) -> None:
    """A stream may hold no response input at all: the last token of the prompt predicts everything."""
    row = EncodedRow("a", [5, 6, 7], [[8], [9]], [0.0, 1.0])
    with torch.no_grad():
        expected = separately(model, row, plain_logps).tolist()
    assert logps_of_rows(model, [row], 1)[0] == pytest.approx(expected, rel=1e-5)


def test_a_sum_over_all_tokens_by_hand(mistral: nn.Module, encoded_rows: Rows) -> None:
    """A model without preferences gives each token 1/V: a response of n tokens, EOS included, has -n ln V."""
    uniform = build("mistral")
    nn.init.zeros_(uniform.get_output_embeddings().weight)
    row = EncodedRow("a", [5, 6], [[7, 8, 9, 2], [2], [7, 2]], [0.0, 1.0, 2.0])  # 2 stands for EOS
    assert logps_of_rows(uniform, [row], 1)[0] == pytest.approx([-n * math.log(VOCABULARY) for n in (4, 1, 2)])
    # And EOS itself counts: with another last token, the log-prob of a sharp model is another.
    other = dataclasses.replace(row, response_ids=[[7, 8, 9, 3], [3], [7, 3]])
    (first,), (second,) = logps_of_rows(mistral, [row], 1), logps_of_rows(mistral, [other], 1)
    assert all(abs(a - b) > 1e-2 for a, b in zip(first, second, strict=True))


def test_extreme_logits_stay_finite(encoded_rows: Rows, plain_logps: Plain) -> None:
    """Logits of some 1e4 give finite log-probs, equal to those of float64 arithmetic, and finite gradients."""
    model = build("mistral")
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1e4
    rows = encoded_rows(3, seed=5)
    found = response_logps(model, collate(rows))
    (-found.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    exact = build("mistral").double()
    with torch.no_grad():
        exact.get_output_embeddings().weight *= 1e4
        for i, row in enumerate(rows):
            for j, ids in enumerate(row.response_ids):
                logits = exact(input_ids=torch.tensor([row.prompt_ids + ids]), use_cache=False).logits[0]
                token_logps = logits.log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
                expected = token_logps.gather(-1, torch.tensor(ids)[:, None]).sum().item()
                assert expected < -1e3
                assert found[i, j].item() == pytest.approx(expected, rel=1e-4)
