"""KTO: Kahneman-Tversky optimization (Ethayarajh et al., arXiv 2402.01306, eq. 8), a baseline of the paper.

    L(x) = 1 - sigma(r_w - z0)  +  1 - sigma(z0 - r_l),     r_i = beta * (log pi(y_i|x) - log mu(y_i|x)),

for the chosen (desirable) response w and the rejected (undesirable) one l, both with weight 1. On rows with
K > 2 the best response is desirable and the second term is the mean over the responses that it beats.

Deviation: the reference point z0 = max(0, mean_i r_i), without gradient, is taken from the prompt's own
responses. KTO estimates it from mismatched prompt-response pairs of the micro-batch, so that its loss depends
on how prompts are batched; here every loss is a mean over prompts, whatever the batch.

    python -m train.kto --recipe train/recipes/tiny/hard.yaml --model MU --rows PAIRS --eval-rows ROWS --out RUN
"""

from torch import Tensor

from data_prep.files import run_command
from train.engine.run import align
from train.labels import best_and_rest


def kto_loss(log_ratios: Tensor, rewards: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """The KTO loss of each prompt, [B]; 1 at pi = mu, 0 where all rewards tie.

    log_ratios: [B, K] log pi(y_i|x) - log mu(y_i|x), summed over the response's tokens, in nats
    rewards:    [B, K] scalar rewards; only their order matters. A response tied with the best is left out
    mask:       [B, K] bool, which of the K responses are real; the others change nothing
    beta:       scale of the learned reward r
    """
    r = (beta * log_ratios).masked_fill(~mask, 0.0)
    z0 = (r.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)).clamp(min=0).detach()
    best, rest = best_and_rest(rewards, mask)  # [B, 1] index, [B, K] bool
    desirable = (1 - (r.gather(-1, best) - z0).sigmoid()).squeeze(-1)
    undesirable = ((1 - (z0 - r).sigmoid()) * rest).sum(-1) / rest.sum(-1).clamp(min=1)
    return (desirable + undesirable) * rest.any(-1)


if __name__ == "__main__":
    run_command(lambda: align("kto", kto_loss, uses=("beta",)))
