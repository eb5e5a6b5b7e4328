"""Encoded rows to tensors: B prompts, each with its K responses, in one stream without padding.

    [prompt, r_1, ..., r_K] of row 1, then of row 2, ...

A prompt is encoded once for its K responses. Positions restart at the prompt's length for each response, and a
response attends to its prompt and to itself only, so every log-prob is that of the response alone behind its
prompt. The last token of a response is a target, never an input.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from data_prep.files import InputError
from train.engine.tokens import EncodedRow


def collate(rows: Sequence[EncodedRow], ref_logps: Mapping[str, list[float]] | None = None) -> dict[str, Tensor]:
    """Pack B rows of up to K responses into a stream of T tokens, N of which are predicted.

    input_ids, position_ids [1, T]      the stream
    stream_rows             [T]         the row of each token, from 0
    segments                [T]         0 in a prompt, i + 1 in response i
    attended                [T]         False for a token that none attends to (EncodedRow.unattended)
    prompt_columns          [B, P]      where in the stream each prompt lies; -1 behind its end
    response_columns        [B, K, R]   the same for each response (without its last token)
    targets, sources        [N]         the token to predict, and the column of the token before it
    owners                  [N]         b * K + k: the response that a target belongs to
    rewards, mask           [B, K]      float32, bool
    ref_logps               [B, K]      float32, log mu(y|x) by row id; only if given
    """
    b, k = len(rows), max(len(row.response_ids) for row in rows)
    p = max(len(row.prompt_ids) for row in rows)
    r = max(len(ids) - 1 for row in rows for ids in row.response_ids)
    stream: dict[str, list[int]] = {name: [] for name in ("input_ids", "position_ids", "stream_rows", "segments")}
    predicted: dict[str, list[int]] = {name: [] for name in ("targets", "sources", "owners")}
    attended: list[bool] = []
    prompt_columns = torch.full((b, p), -1)
    response_columns = torch.full((b, k, r), -1)
    rewards, mask = torch.zeros(b, k), torch.zeros(b, k, dtype=torch.bool)

    def append(i: int, segment: int, ids: list[int], first_position: int) -> Tensor:
        start = len(attended)
        stream["input_ids"] += ids
        stream["position_ids"] += range(first_position, first_position + len(ids))
        stream["stream_rows"] += [i] * len(ids)
        stream["segments"] += [segment] * len(ids)
        attended.extend(token != rows[i].unattended for token in ids)
        return torch.arange(start, start + len(ids))

    for i, row in enumerate(rows):
        length = len(row.prompt_ids)
        prompt_columns[i, :length] = append(i, 0, row.prompt_ids, 0)
        before = len(attended) - 1  # the prompt's last token predicts the first one of all its responses
        for j, ids in enumerate(row.response_ids):
            columns = append(i, j + 1, ids[:-1], length)
            response_columns[i, j, : len(columns)] = columns
            predicted["targets"] += ids
            predicted["sources"] += [before, *columns.tolist()]
            predicted["owners"] += [i * k + j] * len(ids)
        rewards[i, : len(row.rewards)] = torch.tensor(row.rewards)
        mask[i, : len(row.rewards)] = True
    batch = {name: torch.tensor(values) for name, values in (stream | predicted).items()}
    batch |= {name: batch[name][None] for name in ("input_ids", "position_ids")}
    batch |= {"attended": torch.tensor(attended), "prompt_columns": prompt_columns, "rewards": rewards, "mask": mask}
    batch["response_columns"] = response_columns
    if ref_logps is not None:
        batch["ref_logps"] = torch.zeros(b, k)
        for i, row in enumerate(rows):
            batch["ref_logps"][i, : len(row.rewards)] = torch.tensor(ref_logps[row.id])
    return batch


def in_batches(rows: Sequence[EncodedRow], size: int) -> Iterator[list[int]]:
    """Indices of rows in batches of like length, longest first (so that memory runs out early or never)."""
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].stream_length, i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


class EpochSampler(Sampler[int]):
    """The training order: for each epoch a seeded permutation, cut to whole global batches, each batch sorted by
    length so that micro-batches waste little padding. All epochs follow one another in one pass, so that a
    resumed run only has to skip; the order does not depend on micro-batch, accumulation or processes."""

    def __init__(self, lengths: Sequence[int], global_batch: int, epochs: int, seed: int):
        """lengths: tokens of each row; InputError if there are fewer rows than one global batch."""
        super().__init__()
        if len(lengths) < global_batch:
            raise InputError(
                f"{len(lengths)} rows are fewer than one global batch of {global_batch}; lower global_batch"
            )
        self.lengths, self.global_batch, self.epochs, self.seed = lengths, global_batch, epochs, seed
        self.steps_per_epoch = len(lengths) // global_batch

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch * self.global_batch

    def __iter__(self) -> Iterator[int]:
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
            for start in range(0, self.steps_per_epoch * self.global_batch, self.global_batch):
                batch = order[start : start + self.global_batch]
                yield from sorted(batch, key=lambda i: (self.lengths[i], i))
