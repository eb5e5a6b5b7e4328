"""From scalar rewards to targets: soft labels, and the best response of a prompt."""

import torch
from torch import Tensor


def soft_labels(rewards: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """p = softmax(reward / alpha) over the real responses: [B, K] to [B, K], 0 where masked.

    alpha = 0 is the limit alpha -> 0: all weight on the best response, shared equally by exact ties.
    Only differences of rewards within a prompt matter. ValueError if alpha < 0.
    """
    if alpha < 0:
        raise ValueError(f"alpha = {alpha}: a temperature is >= 0")
    below_best = rewards.masked_fill(~mask, -torch.inf)
    below_best = below_best - below_best.amax(-1, keepdim=True)  # <= 0, so exp cannot overflow for any alpha
    weights = (below_best == 0).to(rewards.dtype) if alpha == 0 else (below_best / alpha).exp()
    return weights / weights.sum(-1, keepdim=True)


def best_and_rest(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The winner of each prompt and whom it beats: index [B, 1] of the best response (the first among equals)
    and bool [B, K], the real responses with a strictly lower reward. All False where all rewards are tied."""
    best = rewards.masked_fill(~mask, -torch.inf).argmax(-1, keepdim=True)
    return best, mask & (rewards < rewards.gather(-1, best))
