"""Encoded rows to tensors: for each prompt one packed stream, [prompt, r_1, ..., r_K].

The prompt is encoded once for its K responses. Positions restart at the prompt's length for each response, and
a response attends to the prompt and to itself only, so every log-prob is that of the response alone behind its
prompt. The last token of a response is a target, never an input.

Prompts are right-aligned: all responses of a batch begin at the same column P, and the language-model head is
needed from column P - 1 on.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from data_prep.files import InputError
from train.engine.tokens import EncodedRow

PADDING, PROMPT = -1, 0  # segment numbers; response i (from 0) is segment i + 1


def collate(rows: Sequence[EncodedRow], ref_logps: Mapping[str, list[float]] | None = None) -> dict[str, Tensor]:
    """Pack B rows of up to K responses; T columns, of which R = T - P hold responses, N targets a response.

    input_ids, position_ids, segments   [B, T]      segments as above
    targets, sources, target_mask       [B, K, N]   token to predict; the kept logit row (0 is column P - 1) that
                                                    predicts it; whether it is real
    rewards, mask                       [B, K]      float32, bool
    ref_logps                           [B, K]      float32, log mu(y|x) by row id; only if given
    """
    b, k = len(rows), max(len(row.response_ids) for row in rows)
    p = max(len(row.prompt_ids) for row in rows)
    r = max(row.stream_length - len(row.prompt_ids) for row in rows)
    n = max(len(ids) for row in rows for ids in row.response_ids)
    batch = {
        "input_ids": torch.zeros(b, p + r, dtype=torch.long),
        "position_ids": torch.zeros(b, p + r, dtype=torch.long),
        "segments": torch.full((b, p + r), PADDING),
        "targets": torch.zeros(b, k, n, dtype=torch.long),
        "sources": torch.zeros(b, k, n, dtype=torch.long),
        "target_mask": torch.zeros(b, k, n, dtype=torch.bool),
        "rewards": torch.zeros(b, k),
        "mask": torch.zeros(b, k, dtype=torch.bool),
    }
    for i, row in enumerate(rows):
        length = len(row.prompt_ids)
        batch["input_ids"][i, p - length : p] = torch.tensor(row.prompt_ids)
        batch["position_ids"][i, p - length : p] = torch.arange(length)
        batch["segments"][i, p - length : p] = PROMPT
        offset = 0  # columns of this row's responses so far
        for j, ids in enumerate(row.response_ids):
            inputs = len(ids) - 1
            columns = slice(p + offset, p + offset + inputs)
            batch["input_ids"][i, columns] = torch.tensor(ids[:-1], dtype=torch.long)
            batch["position_ids"][i, columns] = length + torch.arange(inputs)
            batch["segments"][i, columns] = j + 1
            batch["targets"][i, j, : len(ids)] = torch.tensor(ids)
            batch["sources"][i, j, 1 : len(ids)] = offset + 1 + torch.arange(inputs)
            batch["target_mask"][i, j, : len(ids)] = True
            offset += inputs
        batch["rewards"][i, : len(row.rewards)] = torch.tensor(row.rewards)
        batch["mask"][i, : len(row.rewards)] = True
    if ref_logps is not None:
        batch["ref_logps"] = torch.zeros(b, k)
        for i, row in enumerate(rows):
            batch["ref_logps"][i, : len(row.rewards)] = torch.tensor(ref_logps[row.id])
    return batch


def attention_mask(segments: Tensor, position_ids: Tensor, window: int | None) -> Tensor:
    """Who may attend to whom, bool [B, 1, T, T] (query, key): earlier columns of the prompt and of one's own
    response, at most `window` - 1 positions back if the model has a sliding window."""
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    columns = segments.shape[1]
    causal = torch.ones(columns, columns, dtype=torch.bool, device=segments.device).tril()
    allowed = causal & ((key == PROMPT) | (key == query)) & (key != PADDING)
    if window is not None:  # in positions: columns of other responses lie between, but are not there
        allowed &= position_ids.unsqueeze(2) - position_ids.unsqueeze(1) < window
    # A padding query sees itself, so that its softmax is defined; nobody reads the result.
    allowed |= torch.eye(columns, dtype=torch.bool, device=segments.device)
    return allowed.unsqueeze(1)


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
