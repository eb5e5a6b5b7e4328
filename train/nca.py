"""NCA: noise contrastive alignment (arXiv 2402.05369), for any K >= 2 responses with scalar rewards.

    L(x) = - sum_i [ p_i log sigma(r_i) + (1/K) log sigma(-r_i) ],
    r_i = beta * (log pi(y_i|x) - log mu(y_i|x)),     p = softmax(reward / alpha).

Each response is told apart from mu by itself: p_i draws r_i up, 1/K draws it down, and the two balance at
r_i = log(K p_i). So L fixes the absolute likelihood ratio, and a policy cannot lower it by letting the
likelihood of all responses fall.

    python -m train.nca --recipe train/recipes/tiny/hard.yaml --model MU --rows ROWS --eval-rows ROWS --out RUN
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from data_prep.files import run_command
from train.engine.run import align
from train.labels import soft_labels


def nca_loss(log_ratios: Tensor, rewards: Tensor, mask: Tensor, *, alpha: float, beta: float) -> Tensor:
    """The NCA loss of each prompt, [B], in nats; 2 ln 2 at pi = mu.

    log_ratios: [B, K] log pi(y_i|x) - log mu(y_i|x), summed over the response's tokens, in nats
    rewards:    [B, K] scalar rewards, higher is better
    mask:       [B, K] bool, which of the K responses are real; the others change nothing
    alpha:      reward temperature, in units of reward; 0 puts all weight on the best response (ties share)
    beta:       scale of the learned reward r
    """
    r = (beta * log_ratios).masked_fill(~mask, 0.0)
    p = soft_labels(rewards, mask, alpha)  # [B, K], sums to 1, 0 where masked
    noise = mask.to(r.dtype) / mask.sum(-1, keepdim=True)  # [B, K], 1/K for each real response
    return -(p * logsigmoid(r) + noise * logsigmoid(-r)).sum(-1)


if __name__ == "__main__":
    run_command(lambda: align("nca", nca_loss, uses=("alpha", "beta")))
