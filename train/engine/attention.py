"""Attention over packed streams: every token sees its prompt and its own response, and nothing else.

Three ways to the same numbers, chosen by the recipe's `attention`:

dense   scaled_dot_product_attention with a T x T mask: the plain form, everywhere, for every kind of stream.
split   no mask and no empty blocks: prompts attend causally to themselves, responses to themselves, and responses to
        their prompts; the two parts of a response are merged exactly by their log-sum-exp. On CPU; streams with
        unattended tokens or beyond the sliding window fall back to dense.
flex    FlexAttention with a block mask. On CUDA.
auto    split on CPU, dense elsewhere.

Transformers models call `packed` through their attention interface; it is told how by the `layout` that
`train.engine.logps` hands to the model. Without one (generation, plain forward passes) it is SDPA as usual.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

NAME = "packed"
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one stream attends: exactly one of the three is set."""

    mask: Tensor | None = None  # dense, bool [1, 1, T, T]
    blocks: BlockMask | None = None  # flex
    columns: "Columns | None" = None  # split

    @classmethod
    def of(cls, batch: Mapping[str, Tensor], window: int | None, attention: str) -> "Layout":
        """The layout of a batch from `collate`. window: the model's sliding window in positions, or None."""
        if attention == "auto":
            attention = "split" if batch["input_ids"].device.type == "cpu" else "dense"
        if attention == "flex":
            return cls(blocks=block_mask(batch, window))
        within = window is None or int(batch["position_ids"].max()) < window
        if attention == "split" and within and bool(batch["attended"].all()):
            return cls(columns=Columns.of(batch))
        return cls(mask=dense_mask(batch, window))


def may_attend(batch: Mapping[str, Tensor], window: int | None, query: Any, key: Any) -> Tensor:
    """Whether the token in column `query` attends to the one in column `key`, for indices that broadcast."""
    rows, segments, positions = batch["stream_rows"], batch["segments"], batch["position_ids"][0]
    allowed = (rows[query] == rows[key]) & (query >= key) & batch["attended"][key]
    allowed = allowed & ((segments[key] == 0) | (segments[key] == segments[query]))
    if window is not None:  # in positions: columns of other responses lie between, but are not there
        allowed = allowed & (positions[query] - positions[key] < window)
    return allowed


def dense_mask(batch: Mapping[str, Tensor], window: int | None) -> Tensor:
    """`may_attend` for all pairs, bool [1, 1, T, T] (query, key). A token that may see nothing sees itself, so that
    its softmax is defined; nobody reads the result."""
    columns = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    allowed = may_attend(batch, window, columns[:, None], columns[None, :])
    alone = torch.diag(~allowed.any(-1))
    return (allowed | alone)[None, None]


def block_mask(batch: Mapping[str, Tensor], window: int | None) -> BlockMask:
    """`may_attend` as FlexAttention's block mask."""
    length = batch["input_ids"].shape[1]
    return create_block_mask(
        lambda b, h, query, key: may_attend(batch, window, query, key), None, None, length, length,
        device=batch["input_ids"].device,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where prompts and responses lie in the stream, as index tensors (padded slots hold 0 and are never read)."""

    prompts: Tensor  # [B, P]
    is_prompt: Tensor  # [B, P]
    responses: Tensor  # [B, K * R]
    is_response: Tensor  # [B, K * R]
    k: int
    key_mask: Tensor | None  # additive [B, 1, 1, P]; None where no prompt is padded

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> "Columns":
        prompts, responses = batch["prompt_columns"], batch["response_columns"].flatten(1)
        is_prompt = prompts >= 0
        key_mask = None
        if not bool(is_prompt.all()):
            key_mask = torch.zeros(is_prompt.shape).masked_fill(~is_prompt, -torch.inf)[:, None, None, :]
        return cls(
            prompts.clamp(min=0), is_prompt, responses.clamp(min=0), responses >= 0,
            batch["response_columns"].shape[1], key_mask,
        )  # fmt: skip


class SplitAttention(torch.autograd.Function):
    """Exact attention of a packed stream from three dense parts.

    With S = q k' / sqrt(d), softmax over prompt and own response together has the normalizer
    L = logaddexp(L_prompt, L_own) and the output exp(L_prompt - L) o_prompt + exp(L_own - L) o_own. The backward
    pass of each part needs only the joint output and the joint L.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, columns: Columns) -> Tensor:
        """query [H, T, D], key and value [H', T, D], H a multiple of H'; returns [H, T, D]."""
        prompts = tuple(_rows(x, columns.prompts) for x in (query, key, value))  # [B, H, P, D]
        responses = tuple(_rows(x, columns.responses) for x in (query, key, value))  # [B, H, K R, D]
        out = torch.empty_like(query)
        prompt_out, prompt_lse = _flash(*prompts, 0.0, True, scale=scale)
        _put(out, columns.prompts, columns.is_prompt, prompt_out)
        joint, lse = prompt_out, prompt_lse
        if columns.responses.shape[1]:
            own, own_lse = _flash(*(_apart(x, columns.k) for x in responses), 0.0, True, scale=scale)
            own, own_lse = _together(own, columns.k), _together(own_lse[..., None], columns.k)[..., 0]
            mask = _like(columns.key_mask, query)
            back, back_lse = _flash(responses[0], *prompts[1:], 0.0, False, attn_mask=mask, scale=scale)
            lse = torch.logaddexp(own_lse, back_lse)
            joint = own * (own_lse - lse).exp()[..., None] + back * (back_lse - lse).exp()[..., None]
            joint = joint.to(query.dtype)
            _put(out, columns.responses, columns.is_response, joint)
        ctx.save_for_backward(query, key, value, prompt_out, prompt_lse, joint, lse)
        ctx.scale, ctx.columns = scale, columns
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        query, key, value, prompt_out, prompt_lse, joint, lse = ctx.saved_tensors
        columns, scale = ctx.columns, ctx.scale
        grads = tuple(torch.zeros_like(x) for x in (query, key, value))
        prompts = tuple(_rows(x, columns.prompts) for x in (query, key, value))
        grad_prompt = _rows(grad, columns.prompts) * columns.is_prompt[:, None, :, None]
        parts = _flash_backward(grad_prompt, *prompts, prompt_out, prompt_lse, 0.0, True, scale=scale)
        for total, part in zip(grads, parts, strict=True):
            _add(total, columns.prompts, columns.is_prompt, part)
        if columns.responses.shape[1]:
            responses = tuple(_rows(x, columns.responses) for x in (query, key, value))
            grad_response = _rows(grad, columns.responses) * columns.is_response[:, None, :, None]
            mask = _like(columns.key_mask, query)
            back = _flash_backward(
                grad_response, responses[0], *prompts[1:], joint, lse, 0.0, False, attn_mask=mask, scale=scale
            )
            own = _flash_backward(
                *(_apart(x, columns.k) for x in (grad_response, *responses, joint)),
                _apart(lse[..., None], columns.k)[..., 0], 0.0, True, scale=scale,
            )  # fmt: skip
            _add(grads[0], columns.responses, columns.is_response, back[0])
            for total, part in zip(grads[1:], back[1:], strict=True):
                _add(total, columns.prompts, columns.is_prompt, part)
            for total, part in zip(grads, own, strict=True):
                _add(total, columns.responses, columns.is_response, _together(part, columns.k))
        return (*grads, None, None)


def _rows(x: Tensor, columns: Tensor) -> Tensor:
    """[H, T, D] to [B, H, n, D]: the columns of each row."""
    return x[:, columns].transpose(0, 1)


def _put(out: Tensor, columns: Tensor, real: Tensor, values: Tensor) -> None:
    """Write values [B, H, n, D] into their columns of `out` [H, T, D]."""
    out[:, columns[real]] = values.transpose(0, 1)[:, real]


def _add(out: Tensor, columns: Tensor, real: Tensor, values: Tensor) -> None:
    out.index_add_(1, columns[real], values.transpose(0, 1)[:, real].to(out.dtype))


def _apart(x: Tensor, k: int) -> Tensor:
    """[B, H, K R, D] to [B K, H, R, D]: each response by itself."""
    b, h, n, d = x.shape
    return x.reshape(b, h, k, n // k, d).transpose(1, 2).reshape(b * k, h, n // k, d)


def _together(x: Tensor, k: int) -> Tensor:
    """The inverse of `_apart`."""
    bk, h, r, d = x.shape
    return x.reshape(bk // k, k, h, r, d).transpose(1, 2).reshape(bk // k, h, k * r, d)


def _like(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(query.dtype)


def packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    layout: Layout | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of a transformers model; query [1, H, T, D], key and value [1, H', T, D], output [1, T, H, D]."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in float32
    if layout.columns is not None:
        if options.get("dropout"):
            raise ValueError("packed attention has no dropout; Checkpoint.load turns it off")
        out = SplitAttention.apply(query[0], key[0], value[0], options["scaling"], layout.columns)
        return out.transpose(0, 1)[None], None
    if layout.blocks is not None:
        return flex_attention_forward(module, query, key, value, layout.blocks, **options)[0], None
    return sdpa_attention_forward(module, query, key, value, layout.mask, **options)


AttentionInterface.register(NAME, packed)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
