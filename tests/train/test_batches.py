"""Packed batches against a stream worked by hand and a mask built pair by pair; the order of training."""

from collections.abc import Callable
from itertools import chain, islice

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from data_prep.files import InputError
from train.engine.batches import EpochSampler, attention_mask, collate, in_batches
from train.engine.tokens import EncodedRow

LENGTHS = [7, 3, 9, 1, 4, 4, 8, 2, 6, 5, 3]


def test_collate_by_hand() -> None:
    """Prompts end at column P; positions restart for each response; last tokens are targets, never inputs."""
    rows = [
        EncodedRow("a", [11, 12, 13], [[21, 22, 23], [31]], [2.0, -1.0]),
        EncodedRow("b", [14], [[41, 42], [51, 52], [61, 62, 63]], [0.5, 1.5, 3.0]),
    ]
    batch = collate(rows, {"a": [-1.5, -2.5], "b": [-3.5, -4.5, -5.5]})
    expected = {
        "input_ids": [[11, 12, 13, 21, 22, 0, 0], [0, 0, 14, 41, 51, 61, 62]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 0], [0, 0, 0, 1, 1, 1, 2]],
        "segments": [[0, 0, 0, 1, 1, -1, -1], [-1, -1, 0, 1, 2, 3, 3]],
        "targets": [[[21, 22, 23], [31, 0, 0], [0, 0, 0]], [[41, 42, 0], [51, 52, 0], [61, 62, 63]]],
        # Row 0 of the kept logits is the prompt's last column; then one for each column of responses.
        "sources": [[[0, 1, 2], [0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 2, 0], [0, 3, 4]]],
        "target_mask": [[[1, 1, 1], [1, 0, 0], [0, 0, 0]], [[1, 1, 0], [1, 1, 0], [1, 1, 1]]],
        "rewards": [[2.0, -1.0, 0.0], [0.5, 1.5, 3.0]],
        "mask": [[1, 1, 0], [1, 1, 1]],
        "ref_logps": [[-1.5, -2.5, 0.0], [-3.5, -4.5, -5.5]],
    }
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].tolist() == value, name
    assert batch["mask"].dtype == batch["target_mask"].dtype == torch.bool
    assert batch["rewards"].dtype == batch["ref_logps"].dtype == torch.float32


def test_each_target_is_predicted_from_the_token_before_it(encoded_rows: Callable[..., list[EncodedRow]]) -> None:
    """The source of token t of a response is the column of token t - 1: the prompt's last one for the first token."""
    rows = encoded_rows(12, seed=1)
    batch = collate(rows)
    first = max(len(row.prompt_ids) for row in rows) - 1
    for i, row in enumerate(rows):
        for j, response in enumerate(row.response_ids):
            assert batch["targets"][i, j, batch["target_mask"][i, j]].tolist() == response
            columns = first + batch["sources"][i, j, batch["target_mask"][i, j]]
            assert batch["input_ids"][i, columns].tolist() == [row.prompt_ids[-1], *response[:-1]]
            start = len(row.prompt_ids) - 1
            assert batch["position_ids"][i, columns].tolist() == list(range(start, start + len(response)))
            assert batch["segments"][i, columns].tolist() == [0] + [j + 1] * (len(response) - 1)


@pytest.mark.parametrize("window", [None, 1, 3, 6])
def test_attention_mask_pair_by_pair(encoded_rows: Callable[..., list[EncodedRow]], window: int | None) -> None:
    """A token sees what it would see if its response stood alone behind the prompt, and nothing else."""
    rows = encoded_rows(5, seed=2, longest=6)
    batch = collate(rows)
    found = attention_mask(batch["segments"], batch["position_ids"], window)
    width = max(len(row.prompt_ids) for row in rows)
    for i, row in enumerate(rows):
        prompt = [(width - len(row.prompt_ids) + t, t) for t in range(len(row.prompt_ids))]  # column, position
        column, seen = width, {}
        for response in row.response_ids:
            alone = prompt + [(column + t, len(prompt) + t) for t in range(len(response) - 1)]
            column += len(response) - 1
            for query, at in alone:
                seen[query] = {key for key, to in alone if to <= at and (window is None or at - to < window)}
        for query, keys in seen.items():
            assert set(found[i, 0, query].nonzero().flatten().tolist()) == keys
        assert found[i, 0].any(-1).all()  # padding too, or its softmax would be NaN


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
