"""Pairwise NCA (arXiv 2402.05369), the preference form of NCA: its K = 2, alpha -> 0 case, written out.

    L(x) = - log sigma(r_w) - 1/2 log sigma(-r_w) - 1/2 log sigma(-r_l),
    r_i = beta * (log pi(y_i|x) - log mu(y_i|x)),

for the chosen response w and the rejected one l. The chosen one is drawn to r_w = ln 2, the rejected one down.
On rows with K > 2 the last term is the mean over the responses that the best one beats.

    python -m train.nca_pair --recipe train/recipes/tiny/hard.yaml --model MU --rows PAIRS --eval-rows ROWS --out RUN
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from data_prep.files import run_command
from train.engine.run import align
from train.labels import best_and_rest


def nca_pair_loss(log_ratios: Tensor, rewards: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """The pairwise NCA loss of each prompt, [B], in nats; 2 ln 2 at pi = mu, 0 where all rewards tie.

    log_ratios: [B, K] log pi(y_i|x) - log mu(y_i|x), summed over the response's tokens, in nats
    rewards:    [B, K] scalar rewards; only their order matters. A response tied with the best is left out
    mask:       [B, K] bool, which of the K responses are real; the others change nothing
    beta:       scale of the learned reward r
    """
    r = (beta * log_ratios).masked_fill(~mask, 0.0)
    best, rest = best_and_rest(rewards, mask)  # [B, 1] index, [B, K] bool
    chosen = r.gather(-1, best).squeeze(-1)
    rejected_term = (logsigmoid(-r) * rest).sum(-1) / rest.sum(-1).clamp(min=1)
    loss = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * rejected_term
    return loss * rest.any(-1)


if __name__ == "__main__":
    run_command(lambda: align("nca_pair", nca_pair_loss, uses=("beta",)))
