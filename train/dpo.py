"""DPO: direct preference optimization (Rafailov et al., arXiv 2305.18290, eq. 7), the paper's main baseline.

    L(x) = - log sigma(r_w - r_l),     r_i = beta * (log pi(y_i|x) - log mu(y_i|x)),

for the chosen response w and the rejected one l. On rows with K > 2 the best response is set against each of
the others and L is the mean over these pairs: the paper's "DPO x 3" at K = 4.

    python -m train.dpo --recipe train/recipes/tiny/hard.yaml --model MU --rows PAIRS --eval-rows ROWS --out RUN
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from data_prep.files import run_command
from train.engine.run import align
from train.labels import best_and_rest


def dpo_loss(log_ratios: Tensor, rewards: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """The DPO loss of each prompt, [B], in nats; ln 2 at pi = mu, and 0 without gradient where all rewards tie.

    log_ratios: [B, K] log pi(y_i|x) - log mu(y_i|x), summed over the response's tokens, in nats
    rewards:    [B, K] scalar rewards; only their order matters. A response tied with the best is left out
    mask:       [B, K] bool, which of the K responses are real; the others change nothing
    beta:       scale of the learned reward r
    """
    r = (beta * log_ratios).masked_fill(~mask, 0.0)
    best, rest = best_and_rest(rewards, mask)  # [B, 1] index, [B, K] bool
    pairs = -logsigmoid(r.gather(-1, best) - r) * rest
    return pairs.sum(-1) / rest.sum(-1).clamp(min=1)


if __name__ == "__main__":
    run_command(lambda: align("dpo", dpo_loss, uses=("beta",)))
