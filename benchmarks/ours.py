"""The same steps by the engine of this project."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from train.engine.batches import collate
from train.engine.logps import response_logps
from train.engine.models import as_reference
from train.engine.tokens import EncodedRow
from train.nca import nca_loss


def our_references(model: PreTrainedModel, rows: Sequence[EncodedRow]) -> dict[str, list[float]]:
    """The reference's log-probs of one batch of rows, by row id, as the cache keeps them."""
    with torch.no_grad(), as_reference(model):
        found = response_logps(model, on_device(collate(rows), model)).tolist()
    return {row.id: values[: len(row.rewards)] for row, values in zip(rows, found, strict=True)}


def our_loss(
    model: PreTrainedModel, rows: Sequence[EncodedRow], references: dict[str, list[float]],
    loss: Callable[..., Tensor] = nca_loss, **options: float,
) -> Tensor:  # fmt: skip
    """The mean loss of one batch of rows, a scalar in nats. model: `packable`. options: of the loss."""
    batch = on_device(collate(rows, references), model)
    log_ratios = response_logps(model, batch) - batch["ref_logps"]
    return loss(log_ratios, batch["rewards"], batch["mask"], **options).mean()


def on_device(batch: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}
