"""log pi(y|x) of every response of a packed batch."""

import torch
from torch import Tensor, nn

from train.engine.batches import attention_mask, collate, in_batches
from train.engine.tokens import EncodedRow


def response_logps(model: nn.Module, batch: dict[str, Tensor], window: int | None) -> Tensor:
    """Log-probs of the responses, [B, K] in nats, summed over their tokens (EOS included), in float32.

    batch: from `collate`. window: the model's sliding window in positions, or None. Absent responses get 0.
    """
    prompt_columns = batch["input_ids"].shape[1] - (batch["segments"] > 0).any(0).sum()
    logits = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=attention_mask(batch["segments"], batch["position_ids"], window),
        use_cache=False,
        logits_to_keep=int(batch["input_ids"].shape[1] - prompt_columns + 1),
    ).logits.float()  # [B, R + 1, V], from column P - 1 on
    row = torch.arange(len(logits), device=logits.device)[:, None, None]
    log_normalizer = logits.logsumexp(-1)  # [B, R + 1]
    token_logps = logits[row, batch["sources"], batch["targets"]] - log_normalizer[row, batch["sources"]]
    return token_logps.masked_fill(~batch["target_mask"], 0.0).sum(-1)


def sliding_window(model: nn.Module) -> int | None:
    """The sliding attention window of a model, in positions; None if it attends to everything."""
    return getattr(model.config, "sliding_window", None)


@torch.no_grad()
def logps_of_rows(model: nn.Module, rows: list[EncodedRow], batch_size: int) -> list[list[float]]:
    """Log-probs of each row's responses, in the order of `rows`, without gradients."""
    device, window = next(model.parameters()).device, sliding_window(model)
    model.eval()
    found: list[list[float]] = [[] for _ in rows]
    for indices in in_batches(rows, batch_size):
        batch = {name: t.to(device) for name, t in collate([rows[i] for i in indices]).items()}
        for i, values in zip(indices, response_logps(model, batch, window).tolist(), strict=True):
            found[i] = values[: len(rows[i].rewards)]
    return found
