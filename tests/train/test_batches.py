"""Packed batches against a stream worked by hand and a mask built pair by pair; the order of training."""

import dataclasses
from collections.abc import Callable
from itertools import chain, islice

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.nn.attention.flex_attention import create_mask
from torch.utils.data import BatchSampler

from data_prep.files import InputError
from train.engine.attention import block_mask, dense_mask, may_attend
from train.engine.batches import EpochSampler, collate, in_batches
from train.engine.tokens import EncodedRow

LENGTHS = [7, 3, 9, 1, 4, 4, 8, 2, 6, 5, 3]


def test_collate_by_hand() -> None:
    """One stream without padding; positions restart for each response; last tokens are targets, never inputs."""
    rows = [
        EncodedRow("a", [11, 12, 13], [[21, 22, 23], [31]], [2.0, -1.0]),
        EncodedRow("b", [14], [[41, 42], [51, 52], [61, 14, 63]], [0.5, 1.5, 3.0], unattended=14),
    ]
    batch = collate(rows, {"a": [-1.5, -2.5], "b": [-3.5, -4.5, -5.5]})
    expected = {
        "input_ids": [[11, 12, 13, 21, 22, 14, 41, 51, 61, 14]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 1, 1, 2]],
        "stream_rows": [0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        "segments": [0, 0, 0, 1, 1, 0, 1, 2, 3, 3],
        "attended": [1, 1, 1, 1, 1, 0, 1, 1, 1, 0],
        "prompt_columns": [[0, 1, 2], [5, -1, -1]],
        "response_columns": [[[3, 4], [-1, -1], [-1, -1]], [[6, -1], [7, -1], [8, 9]]],
        "targets": [21, 22, 23, 31, 41, 42, 51, 52, 61, 14, 63],
        "sources": [2, 3, 4, 2, 5, 6, 5, 7, 5, 8, 9],
        "owners": [0, 0, 0, 1, 3, 3, 4, 4, 5, 5, 5],
        "rewards": [[2.0, -1.0, 0.0], [0.5, 1.5, 3.0]],
        "mask": [[1, 1, 0], [1, 1, 1]],
        "ref_logps": [[-1.5, -2.5, 0.0], [-3.5, -4.5, -5.5]],
    }
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].tolist() == value, name
    assert batch["mask"].dtype == batch["attended"].dtype == torch.bool
    assert batch["rewards"].dtype == batch["ref_logps"].dtype == torch.float32


def test_each_target_is_predicted_from_the_token_before_it(encoded_rows: Callable[..., list[EncodedRow]]) -> None:
    """The source of token t of a response is the column of token t - 1: the prompt's last one for the first token."""
    rows = encoded_rows(12, seed=1)
    batch = collate(rows)
    k = batch["mask"].shape[1]
    assert batch["input_ids"].shape[1] == sum(row.stream_length for row in rows)
    for i, row in enumerate(rows):
        for j, response in enumerate(row.response_ids):
            mine = batch["owners"] == i * k + j
            assert batch["targets"][mine].tolist() == response
            columns = batch["sources"][mine]
            assert batch["input_ids"][0, columns].tolist() == [row.prompt_ids[-1], *response[:-1]]
            start = len(row.prompt_ids) - 1
            assert batch["position_ids"][0, columns].tolist() == list(range(start, start + len(response)))
            assert batch["segments"][columns].tolist() == [0] + [j + 1] * (len(response) - 1)
            assert batch["stream_rows"][columns].unique().tolist() == [i]


@pytest.mark.parametrize("unattended", [None, 7])
@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_attention_pair_by_pair(
    encoded_rows: Callable[..., list[EncodedRow]], window: int | None, unattended: int | None
) -> None:
    """A token sees what it would see if its response stood alone behind the prompt, and nothing else: in the dense
    mask and in FlexAttention's."""
    rows = [dataclasses.replace(r, unattended=unattended) for r in encoded_rows(5, seed=2, longest=6, vocabulary=9)]
    batch = collate(rows)
    seen: dict[int, set[int]] = {}
    column = 0
    for row in rows:
        prompt = [(column + t, t, token) for t, token in enumerate(row.prompt_ids)]  # column, position, token
        column += len(prompt)
        for response in row.response_ids:
            alone = prompt + [(column + t, len(prompt) + t, token) for t, token in enumerate(response[:-1])]
            column += len(response) - 1
            for query, at, _ in alone:
                seen[query] = {
                    key for key, to, token in alone
                    if to <= at and (window is None or at - to < window) and (unattended is None or token != unattended)
                }  # fmt: skip
    found = dense_mask(batch, window)[0, 0]
    assert len(seen) == len(found) == column
    assert any(not keys for keys in seen.values()) == (unattended is not None)
    for query, keys in seen.items():
        # A token that sees nothing would make its softmax NaN: it sees itself.
        assert set(found[query].nonzero().flatten().tolist()) == (keys or {query})
    flex = create_mask(lambda b, h, q, k: may_attend(batch, window, q, k), 1, 1, column, column, device="cpu")[0, 0]
    assert torch.equal(flex & ~torch.eye(column, dtype=torch.bool), found & ~torch.eye(column, dtype=torch.bool))
    assert block_mask(batch, window).sparsity() < 100


@pytest.mark.parametrize("size", [1, 4, 100])
def test_in_batches_takes_every_row_once_longest_first(
    encoded_rows: Callable[..., list[EncodedRow]], size: int
) -> None:
    """No row is lost or doubled, no batch is over the size, and lengths never rise."""
    rows = encoded_rows(11, seed=3)
    batches = list(in_batches(rows, size))
    order = list(chain(*batches))
    assert sorted(order) == list(range(11))
    assert all(len(batch) == size for batch in batches[:-1])
    assert 0 < len(batches[-1]) <= size
    lengths = [rows[i].stream_length for i in order]
    assert lengths == sorted(lengths, reverse=True)


def steps(sampler: EpochSampler, size: int = 4) -> list[list[int]]:
    order = list(sampler)
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_an_epoch_visits_each_row_at_most_once_in_whole_batches() -> None:
    """11 rows in batches of 4: two batches an epoch, 8 different rows, each batch sorted by length."""
    sampler = EpochSampler(LENGTHS, global_batch=4, epochs=3, seed=0)
    batches = steps(sampler)
    assert (len(sampler), sampler.steps_per_epoch, len(batches)) == (24, 2, 6)
    for epoch in range(3):
        seen = list(chain(*batches[2 * epoch : 2 * epoch + 2]))
        assert len(set(seen)) == 8
    assert all([LENGTHS[i] for i in batch] == sorted(LENGTHS[i] for i in batch) for batch in batches)


def test_the_order_follows_from_the_seed_alone() -> None:
    """The same seed gives the same order again, whatever was drawn before; epochs and seeds differ."""
    first = steps(EpochSampler(LENGTHS, 4, 3, seed=0))
    torch.manual_seed(123)
    torch.rand(5)
    assert steps(EpochSampler(LENGTHS, 4, 3, seed=0)) == first
    assert steps(EpochSampler(LENGTHS, 4, 3, seed=1)) != first
    assert len({tuple(chain(*first[start : start + 2])) for start in (0, 2, 4)}) == 3
    assert steps(EpochSampler(LENGTHS, 4, 1, seed=0)) == first[:2]  # more epochs only append


def test_every_row_is_drawn_equally_often() -> None:
    """The permutation is not biased by length: over 400 epochs each of 11 rows comes near 8/11 of the time."""
    drawn = torch.bincount(torch.tensor(list(EpochSampler(LENGTHS, 4, 400, seed=5))), minlength=11) / 400
    assert (drawn - 8 / 11).abs().max() < 5 * (8 / 11 * 3 / 11 / 400) ** 0.5  # five standard errors


@pytest.mark.parametrize(("micro", "processes"), [(4, 1), (1, 1), (2, 2), (1, 2), (1, 4)])
def test_a_global_batch_holds_the_same_rows_on_any_number_of_processes(micro: int, processes: int) -> None:
    """Shared out by accelerate, the micro-batches of one optimizer step are together the same global batch."""
    sampler = EpochSampler(LENGTHS, 4, 2, seed=0)
    shares = [
        iter(BatchSamplerShard(BatchSampler(sampler, micro, drop_last=False), processes, index))
        for index in range(processes)
    ]
    for batch in steps(sampler):
        accumulated = [list(chain(*islice(share, 4 // (micro * processes)))) for share in shares]
        assert sorted(chain(*accumulated)) == sorted(batch)
    assert all(next(share, None) is None for share in shares)


def test_fewer_rows_than_a_batch_are_refused() -> None:
    """There is no whole global batch to train on."""
    with pytest.raises((ValueError, InputError), match="11 rows are fewer than one global batch of 12"):
        EpochSampler(LENGTHS, 12, 1, seed=0)
