"""The experts of a mixture as single layers, for nf4.

Current transformers keep the experts of a layer in two three-dimensional parameters. bitsandbytes quantizes linear
layers only, so for QLoRA each expert becomes two of them, which compute the same; adapters then belong to experts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

EXPERT_LAYERS = ["gate_up", "down"]


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x))."""

    def __init__(self, gate_up: nn.Module, down: nn.Module, act: nn.Module):
        super().__init__()
        self.gate_up, self.down, self.act = gate_up, down, act

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, H] to [n, H]."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class SingleExperts(nn.ModuleList):
    """In place of MixtralExperts: the same weights, expert by expert."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [n, H]; top_k_index and top_k_weights [n, k], the experts of each token and their shares."""
        out = torch.zeros_like(hidden)
        chosen = one_hot(top_k_index, num_classes=len(self)).permute(2, 1, 0)  # [experts, k, n]
        for number, expert in enumerate(self):
            place, token = torch.where(chosen[number])
            if len(token):
                share = top_k_weights[token, place, None]
                out.index_add_(0, token, (expert(hidden[token]) * share).to(out.dtype))
        return out


def _blocks(model: nn.Module, kind: type[nn.Module]) -> Iterator[MixtralSparseMoeBlock]:
    for module in model.modules():
        if isinstance(module, MixtralSparseMoeBlock) and isinstance(module.experts, kind):
            yield module


def separate_experts(model: PreTrainedModel, quantized: torch.dtype | None) -> None:
    """Turn fused experts into single ones, in nf4 that computes in `quantized`, or as they are. On CUDA they are
    quantized there, one layer at a time. A model without experts stays as it is."""
    device = torch.device("cuda" if quantized and torch.cuda.is_available() else "cpu")
    for block in _blocks(model, MixtralExperts):
        fused = block.experts
        block.experts = SingleExperts(
            Expert(_linear(gate_up, quantized, device), _linear(down, quantized, device), fused.act_fn)
            for gate_up, down in zip(fused.gate_up_proj.data, fused.down_proj.data, strict=True)
        )


def fuse_experts(model: PreTrainedModel) -> None:
    """The inverse of `separate_experts`, for experts that are not quantized."""
    for block in _blocks(model, SingleExperts):
        single, fused = block.experts, MixtralExperts(model.config)
        fused.gate_up_proj = nn.Parameter(torch.stack([expert.gate_up.weight.data for expert in single]))
        fused.down_proj = nn.Parameter(torch.stack([expert.down.weight.data for expert in single]))
        block.experts = fused


def _linear(weight: Tensor, quantized: torch.dtype | None, device: torch.device) -> nn.Module:
    rows, columns = weight.shape
    if quantized is None:
        layer: nn.Module = nn.Linear(columns, rows, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        return layer
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(columns, rows, bias=False, compute_dtype=quantized, quant_type="nf4", device="meta")
    layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", module=layer)
    return layer.to(device)  # this quantizes
