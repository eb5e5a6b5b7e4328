"""InfoNCA (arXiv 2402.05369), for any K >= 2 responses with scalar rewards.

    L(x) = - sum_i p_i log softmax(r)_i,
    r_i = beta * (log pi(y_i|x) - log mu(y_i|x)),     p = softmax(reward / alpha).

A classification: which of the K responses came from the optimal policy? With K = 2 and alpha -> 0 it is
exactly DPO. A shift of all r_i of a prompt leaves L unchanged: only relative likelihoods are fixed, and the
likelihood of every response, the best one included, is free to fall.

    python -m train.infonca --recipe train/recipes/tiny/hard.yaml --model MU --rows ROWS --eval-rows ROWS --out RUN
"""

import torch
from torch import Tensor

from data_prep.files import run_command
from train.engine.run import align
from train.labels import soft_labels


def infonca_loss(log_ratios: Tensor, rewards: Tensor, mask: Tensor, *, alpha: float, beta: float) -> Tensor:
    """The InfoNCA loss of each prompt, [B], in nats; ln K at pi = mu.

    log_ratios: [B, K] log pi(y_i|x) - log mu(y_i|x), summed over the response's tokens, in nats
    rewards:    [B, K] scalar rewards, higher is better
    mask:       [B, K] bool, which of the K responses are real; the others change nothing
    alpha:      reward temperature, in units of reward; 0 puts all weight on the best response (ties share)
    beta:       scale of the learned reward r
    """
    r = (beta * log_ratios).masked_fill(~mask, -torch.inf)  # softmax over the real responses only
    p = soft_labels(rewards, mask, alpha)  # [B, K], sums to 1, 0 where masked
    log_softmax = r.log_softmax(-1).masked_fill(~mask, 0.0)  # 0 * -inf would be NaN
    return -(p * log_softmax).sum(-1)


if __name__ == "__main__":
    run_command(lambda: align("infonca", infonca_loss, uses=("alpha", "beta")))
