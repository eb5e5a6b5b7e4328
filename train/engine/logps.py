"""log pi(y|x) of every response of a packed batch.

The model's forward pass is taught one more way to be called: with a packed stream it returns the log-probs of the
stream's targets instead of logits. So the head runs inside the model's own forward pass, where DDP, FSDP and
ZeRO-3 expect it, only at the columns that predict a response token, and in chunks: no [T, V] matrix exists.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.utils import ModelOutput

from train.engine import attention
from train.engine.attention import Layout
from train.engine.batches import collate, in_batches
from train.engine.tokens import EncodedRow

CHUNK_LOGITS = 2**24  # logits that exist at once: 64 MiB in float32
STREAM = ("input_ids", "position_ids", "stream_rows", "segments", "attended", "prompt_columns", "response_columns",
          "targets", "sources")  # fmt: skip


@dataclasses.dataclass
class TargetLogps(ModelOutput):
    """What a packed forward pass returns."""

    logps: Tensor | None = None  # [N], log pi of each target, in nats, float32
    aux_loss: Tensor | None = None  # the router's load-balancing loss, if asked for


def packable(
    model: PreTrainedModel, how: str = "auto", dtype: torch.dtype = torch.float32, router_aux_loss: bool = False
) -> PreTrainedModel:
    """Teach a MistralForCausalLM or MixtralForCausalLM (also below adapters) to take packed streams; returns it.

    how: the recipe's `attention`. dtype: of the forward pass; bfloat16 runs it under autocast. router_aux_loss:
    whether a mixture's load-balancing loss is returned. Any other call of the model stays as it was.
    """
    inner = causal_lm(model)
    inner.config._attn_implementation = attention.NAME
    inner.forward = types.MethodType(
        functools.partial(_forward, how=how, dtype=dtype, router_aux_loss=router_aux_loss), inner
    )
    return model


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The model with the head, below adapters and wrappers."""
    for wrapper in ("module", "_orig_mod"):
        model = getattr(model, wrapper, model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def response_logps(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probs of the responses, [B, K] in nats, summed over their tokens (EOS included), in float32.

    model: `packable`, wrapped or not. batch: from `collate`. Absent responses get 0.
    """
    return response_logps_and_aux_loss(model, batch)[0]


def response_logps_and_aux_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """`response_logps`, and the router's load-balancing loss of the stream where the model returns one."""
    output, mask = model(**{name: batch[name] for name in STREAM}), batch["mask"]
    logps = output.logps.new_zeros(mask.numel()).index_add(0, batch["owners"], output.logps).view(mask.shape)
    return logps, output.aux_loss


def sliding_window(model: nn.Module) -> int | None:
    """The sliding attention window of a model, in positions; None if it attends to everything."""
    return getattr(model.config, "sliding_window", None)


def _forward(
    model: PreTrainedModel, input_ids: Tensor | None = None, *, how: str, dtype: torch.dtype, router_aux_loss: bool,
    **inputs: Any,
) -> Any:  # fmt: skip
    if "targets" not in inputs:
        return type(model).forward(model, input_ids=input_ids, **inputs)
    stream = {"input_ids": input_ids, **inputs}
    layout = Layout.of(stream, sliding_window(model), how)
    wanted = {"output_router_logits": True} if router_aux_loss else {}
    # Without its cache, which would keep a bfloat16 copy of all trained weights on every device of a sharded run.
    with torch.autocast(
        input_ids.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False
    ):  # fmt: skip
        output = model.model(
            input_ids=input_ids, position_ids=inputs["position_ids"], use_cache=False, layout=layout,
            # Any 4-dimensional mask is handed on as it is; the layout takes its place in `attention.packed`.
            attention_mask=input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool), **wanted,
        )  # fmt: skip
        hidden = output.last_hidden_state[0, inputs["sources"]]
        logps = target_logps(hidden, model.lm_head, inputs["targets"])
    aux_loss = None
    if router_aux_loss:
        aux_loss = load_balancing_loss_func(output.router_logits, model.num_experts, model.num_experts_per_tok)
    return TargetLogps(logps=logps, aux_loss=aux_loss)


def target_logps(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """log softmax(head(hidden))[target], [N] float32, of hidden [N, H] and targets [N], in chunks.

    A frozen head (adapters elsewhere) yields the gradient to `hidden` on the way; that of a trained head is
    computed again in the backward pass.
    """
    rows = max(CHUNK_LOGITS // head.weight.shape[0], 16)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_logps(head(h), t) for h, t in chunks])
    if head.weight.requires_grad:
        return torch.cat([checkpoint(lambda h, t: _logps(head(h), t), h, t, use_reentrant=False) for h, t in chunks])
    return torch.cat([_FrozenHead.apply(h, t, head) for h, t in chunks])


def _logps(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(-1, targets[:, None])[:, 0] - logits.logsumexp(-1)


class _FrozenHead(torch.autograd.Function):
    """d log p(t) / d hidden = W[t] - sum_v p(v) W[v], kept instead of the logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module) -> Tensor:
        logits, weight = head(hidden), head.weight
        dtype, logits = logits.dtype, logits.float()
        logits -= logits.amax(-1, keepdim=True)
        logps = logits.gather(-1, targets[:, None])
        shares = logits.exp_()  # p up to its normalizer: no second pass over [chunk, V]
        normalizer = shares.sum(-1, keepdim=True)
        logps = (logps - normalizer.log())[:, 0]
        slope = weight[targets].float() - (shares.to(dtype) @ weight.to(dtype)).float() / normalizer
        ctx.save_for_backward(slope.to(hidden.dtype))
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None


@torch.no_grad()
def logps_of_rows(model: PreTrainedModel, rows: list[EncodedRow], batch_size: int) -> list[list[float]]:
    """Log-probs of each row's responses, in the order of `rows`, without gradients. model: `packable`."""
    device = next(model.parameters()).device
    model.eval()
    found: list[list[float]] = [[] for _ in rows]
    for indices in in_batches(rows, batch_size):
        batch = {name: t.to(device) for name, t in collate([rows[i] for i in indices]).items()}
        for i, values in zip(indices, response_logps(model, batch).tolist(), strict=True):
            found[i] = values[: len(rows[i].rewards)]
    return found
