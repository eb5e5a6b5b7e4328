"""SFT on the best response: the simplest use of rewards, and a serious baseline.

    L(x) = - sum_i p_i log( pi(y_i|x) / mu(y_i|x) ),     p = softmax(reward / alpha) at alpha -> 0:

log mu is a constant, so the gradient is that of the negative log-likelihood of the best response (tied ones
share it), and the loss is 0 at pi = mu. There is no beta. With p at alpha > 0 and responses drawn from mu its
optimum is the same as that of NCA at beta = 1.

    python -m train.sft_best --recipe train/recipes/tiny/hard.yaml --model MU --rows ROWS --eval-rows ROWS --out RUN
"""

from functools import partial

from torch import Tensor

from data_prep.files import run_command
from train.engine.run import align
from train.labels import soft_labels


def weighted_sft_loss(log_ratios: Tensor, rewards: Tensor, mask: Tensor, *, alpha: float) -> Tensor:
    """The reward-weighted SFT loss of each prompt, [B], in nats; 0 at pi = mu.

    log_ratios: [B, K] log pi(y_i|x) - log mu(y_i|x), summed over the response's tokens, in nats
    rewards:    [B, K] scalar rewards, higher is better
    mask:       [B, K] bool, which of the K responses are real; the others change nothing
    alpha:      reward temperature, in units of reward; 0 is SFT on the best response (ties share)
    """
    return -(soft_labels(rewards, mask, alpha) * log_ratios.masked_fill(~mask, 0.0)).sum(-1)


if __name__ == "__main__":
    run_command(lambda: align("sft_best", partial(weighted_sft_loss, alpha=0.0), uses=()))
