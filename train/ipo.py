"""IPO: identity preference optimization (Azar et al., arXiv 2310.12036, eq. 17), a baseline of the paper.

    L(x) = ( (log pi(y_w|x) - log mu(y_w|x)) - (log pi(y_l|x) - log mu(y_l|x)) - 1 / (2 beta) )^2,

for the chosen response w and the rejected one l; beta is the tau of that paper and log-ratios are summed over
tokens, as there (some libraries average them). On rows with K > 2: the mean over the pairs best against rest.

    python -m train.ipo --recipe train/recipes/tiny/hard.yaml --model MU --rows PAIRS --eval-rows ROWS --out RUN
"""

from torch import Tensor

from data_prep.files import run_command
from train.engine.run import align
from train.labels import best_and_rest


def ipo_loss(log_ratios: Tensor, rewards: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """The IPO loss of each prompt, [B], in nats squared; 1 / (4 beta^2) at pi = mu, 0 where all rewards tie.

    log_ratios: [B, K] log pi(y_i|x) - log mu(y_i|x), summed over the response's tokens, in nats
    rewards:    [B, K] scalar rewards; only their order matters. A response tied with the best is left out
    mask:       [B, K] bool, which of the K responses are real; the others change nothing
    beta:       strength of the pull towards mu: the margin is drawn to 1 / (2 beta)
    """
    log_ratios = log_ratios.masked_fill(~mask, 0.0)
    best, rest = best_and_rest(rewards, mask)  # [B, 1] index, [B, K] bool
    pairs = (log_ratios.gather(-1, best) - log_ratios - 1 / (2 * beta)) ** 2 * rest
    return pairs.sum(-1) / rest.sum(-1).clamp(min=1)


if __name__ == "__main__":
    run_command(lambda: align("ipo", ipo_loss, uses=("beta",)))
