"""The baseline of the benchmark computes what the engine computes, so that their times can be compared."""

import math

import pytest
import torch
from torch import nn

from benchmarks.measure import GRADIENTS_WITHIN, LOSS_WITHIN, check_equal, gradients
from benchmarks.ours import our_loss, our_references
from benchmarks.released import padded, released_logps, released_loss
from benchmarks.workload import (
    PADDED_OVER_UNIQUE,
    REGIMES,
    TINY,
    ULTRAFEEDBACK,
    Lengths,
    flops,
    make_rows,
    new_model,
    padded_over_unique,
)
from data_prep.files import InputError
from train.engine.logps import packable
from train.engine.models import as_reference

SHORT = Lengths(20, 15, prompt_spread=0.6, response_spread=0.5)
VOCABULARY = TINY["vocab_size"]


@pytest.fixture(scope="module")
def released() -> nn.Module:
    return new_model(TINY)


@pytest.fixture(scope="module")
def ours() -> nn.Module:
    return packable(new_model(TINY))


@pytest.mark.parametrize("k", [2, 4, 7])
def test_same_loss_and_gradients(released: nn.Module, ours: nn.Module, k: int) -> None:
    """On the same rows both ways give one loss and one gradient of the adapters, away from pi = mu."""
    for row in make_rows(3, SHORT, k=k, vocabulary=VOCABULARY, seed=k):
        theirs = released_loss(released, row, alpha=1.0, beta=0.5)
        theirs.backward()
        loss = our_loss(ours, [row], our_references(ours, [row]), alpha=1.0, beta=0.5)
        loss.backward()
        assert abs(theirs.item() - 2 * math.log(2)) > 10 * LOSS_WITHIN  # not the constant of pi = mu
        pair = (loss.item(), gradients(ours)), (theirs.item(), gradients(released))
        found = check_equal("test", *pair)
        assert found["loss"] <= LOSS_WITHIN == 1e-5
        assert found["gradients"] <= GRADIENTS_WITHIN == 1e-4


def test_released_logps_are_those_of_separate_passes(released: nn.Module) -> None:
    """Padding and prompt labels change nothing: each log-prob is that of one plain forward pass over [x, y]."""
    (row,) = make_rows(1, SHORT, vocabulary=VOCABULARY)
    with torch.no_grad():
        found = released_logps(released, row)
        for ids, value in zip(row.response_ids, found, strict=True):
            logits = released(input_ids=torch.tensor([row.prompt_ids + ids])).logits[0]
            predicted = logits.log_softmax(-1)[len(row.prompt_ids) - 1 : -1]
            expected = predicted.gather(-1, torch.tensor(ids)[:, None]).sum()
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)


def test_released_rows_are_padded_to_the_longest() -> None:
    """[K, prompt + longest response]; a label for each token of a response, and for nothing else."""
    (row,) = make_rows(1, SHORT, vocabulary=VOCABULARY)
    input_ids, attention_mask, labels = padded(row)
    lengths = [len(row.prompt_ids) + len(ids) for ids in row.response_ids]
    assert input_ids.shape == (4, max(lengths))
    assert attention_mask.sum(-1).tolist() == lengths
    assert [line[line != -100].tolist() for line in labels] == row.response_ids


def test_check_refuses_other_gradients(ours: nn.Module) -> None:
    """The comparison can fail: without the adapters in one of the two losses it does."""
    (row,) = make_rows(1, SHORT, vocabulary=VOCABULARY)
    references = our_references(ours, [row])
    found = []
    for beta in (5.0, 5.01):
        loss = our_loss(ours, [row], references, alpha=1.0, beta=beta)
        loss.backward()
        found.append((loss.item(), gradients(ours)))
    with pytest.raises(InputError, match="gradients by"):
        check_equal("test", *found)
    with as_reference(ours), torch.no_grad():
        plain = our_loss(ours, [row], references, alpha=1.0, beta=5.0)
    assert abs(plain.item() - found[0][0]) > 1e-2


def test_rows_have_the_lengths_they_are_named_after() -> None:
    """Many rows of each regime: padded / unique as stated with the targets; median prompt 120, response 230 for
    UltraFeedback's; the long regime has prompts of 512."""
    for regime, ratio in PADDED_OVER_UNIQUE.items():
        rows = make_rows(600, REGIMES[regime], vocabulary=VOCABULARY)
        assert padded_over_unique(rows) == pytest.approx(ratio, abs=0.07)
    rows = make_rows(600, ULTRAFEEDBACK, vocabulary=VOCABULARY)
    assert torch.tensor([float(len(row.prompt_ids)) for row in rows]).median() == pytest.approx(120, rel=0.08)
    assert torch.tensor([float(len(ids)) for row in rows for ids in row.response_ids]).median() == pytest.approx(
        230, rel=0.04
    )
    assert {len(row.prompt_ids) for row in make_rows(2, REGIMES["long prompts (512)"])} == {512}


def test_flops_are_those_torch_counts(ours: nn.Module) -> None:
    """PyTorch's own counter, on a forward and backward pass of one row over the dense attention of one response.

    With K = 1 the stream is a plain causal sequence. The counter sees the full T x T products of attention where
    ours counts the causal half, and does not recompute.
    """
    from torch.utils.flop_counter import FlopCounterMode

    (row,) = make_rows(1, Lengths(40, 60), k=1, vocabulary=VOCABULARY)
    model = packable(new_model(TINY), "dense")
    batch_references = our_references(model, [row])
    with FlopCounterMode(display=False) as counter:
        our_loss(model, [row], batch_references, alpha=1.0, beta=5.0).backward()
    by_operation = counter.get_flop_counts()["Global"]
    products = sum(value for operation, value in by_operation.items() if "attention" not in str(operation))
    config, tokens = model.config, row.stream_length
    pairs = tokens * (tokens + 1) / 2
    attention = 12 * pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert flops(model, [row]) - attention == pytest.approx(products, rel=0.02)
