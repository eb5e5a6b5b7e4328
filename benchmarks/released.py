"""The computation of the released code, re-stated plainly: what one of its training steps makes the machine do.

The prompt is repeated for its K responses, all are padded on the right to the longest, and a plain 2D mask is given;
the reference is the policy with its adapters off, and runs in each step; the logits of all positions become float32,
[K, T, V], and pass through a full log-softmax, of which one value each is gathered.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from train.engine.models import as_reference
from train.engine.tokens import EncodedRow
from train.nca import nca_loss


def padded(row: EncodedRow) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and labels (-100 where nothing is predicted) of one row, each [K, T]."""
    prompt = row.prompt_ids
    k, length = len(row.response_ids), len(prompt) + max(map(len, row.response_ids))
    input_ids = torch.zeros(k, length, dtype=torch.long)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for j, ids in enumerate(row.response_ids):
        end = len(prompt) + len(ids)
        input_ids[j, :end] = torch.tensor(prompt + ids)
        attention_mask[j, :end] = 1
        labels[j, len(prompt) : end] = torch.tensor(ids)
    return input_ids, attention_mask, labels


def released_logps(model: PreTrainedModel, row: EncodedRow) -> Tensor:
    """log pi(y|x) of the K responses of one row, [K], in nats."""
    device = next(model.parameters()).device
    input_ids, attention_mask, labels = (t.to(device) for t in padded(row))
    with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logits, labels = logits.float()[:, :-1], labels[:, 1:]
    predicted = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * predicted).sum(-1)


def released_loss(model: PreTrainedModel, row: EncodedRow, *, alpha: float, beta: float) -> Tensor:
    """The NCA loss of one row, a scalar in nats. model: with adapters."""
    logps = released_logps(model, row)
    with torch.no_grad(), as_reference(model):
        ref_logps = released_logps(model, row)
    rewards = torch.tensor([row.rewards], device=logps.device)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    return nca_loss((logps - ref_logps)[None], rewards, mask, alpha=alpha, beta=beta).mean()
