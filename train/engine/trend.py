"""The likelihood trend: what training does to the likelihood of good and of bad responses.

One record for each evaluation step and data set ("heldout", "train"), a line of trend.jsonl:

    step, epoch, split, beta, prompts, excluded
    ranks         one entry for each rank of reward, best first: reward, logps, log_ratio, r and accuracy, n
    chosen        rank 1 of each prompt
    rejected      all responses with a reward strictly below it, averaged within the prompt first
    margin        chosen r - rejected r
    accuracy      share of (chosen, rejected response) pairs with the higher log_ratio on the chosen side; a tie
                  (within TIE) counts one half
    kl            KL(pi || mu) in nats a response: mean of log pi - log mu over one sample from pi for each prompt,
                  with its standard error and the samples' mean length (held-out set only)

logps = log pi(y|x), log_ratio = log pi - log mu, r = beta * log_ratio; summed over tokens and, as *_per_token,
divided by the response's number of tokens. All are means over prompts. Prompts whose rewards are all equal have
no chosen and rejected response; they are left out and counted in `excluded`. A rank in a ragged set is averaged
over the prompts that have it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from data_prep.files import InputError

TIE = 1e-4  # nats: what two float32 forward passes of one model can differ by


@dataclasses.dataclass(frozen=True)
class Measured:
    """One prompt at one step. All lists have length K."""

    rewards: list[float]
    logps: list[float]  # log pi(y_i|x), summed over tokens, nats
    ref_logps: list[float]  # log mu(y_i|x)
    tokens: list[int]  # tokens of each response, EOS included


def summarise(prompts: Sequence[Measured], beta: float) -> dict[str, Any]:
    """The likelihood trend of one set at one step, as described above; InputError if all rewards of all are tied."""
    used = [prompt for prompt in prompts if len(set(prompt.rewards)) > 1]
    if not used:
        raise InputError("every row has all its rewards tied: there is no chosen and no rejected response to compare")
    ranks: list[list[dict[str, float]]] = []
    chosen, rejected, accuracy = [], [], []
    for prompt in used:
        responses = [_response(prompt, i, beta) for i in range(len(prompt.rewards))]
        responses.sort(key=lambda response: -response["reward"])  # stable: ties keep the row's order
        worse = [response for response in responses if response["reward"] < responses[0]["reward"]]
        won = [_win(responses[0]["log_ratio"] - response["log_ratio"]) for response in worse]
        chosen.append(responses[0])
        rejected.append(_mean(worse))
        accuracy.append(math.fsum(won) / len(won))
        for rank, response in enumerate(responses):
            if rank == len(ranks):
                ranks.append([])
            ranks[rank].append(response)
    top, bottom = _mean(chosen), _mean(rejected)
    return {
        "beta": beta,
        "prompts": len(used),
        "excluded": len(prompts) - len(used),
        "chosen": top,
        "rejected": bottom,
        "margin": top["r"] - bottom["r"],
        "accuracy": math.fsum(accuracy) / len(accuracy),
        "ranks": [{"rank": rank, "n": len(found), **_mean(found)} for rank, found in enumerate(ranks, start=1)],
    }


def kl_estimate(log_ratios: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """KL(pi || mu) from samples y ~ pi: the mean of log pi(y|x) - log mu(y|x), nats a response, and its
    standard error over prompts."""
    n = len(log_ratios)
    mean = math.fsum(log_ratios) / n
    variance = math.fsum((value - mean) ** 2 for value in log_ratios) / max(n - 1, 1)
    return {
        "kl": mean,
        "kl_standard_error": math.sqrt(variance / n),
        "kl_per_token": math.fsum(log_ratios) / sum(lengths),
        "sample_tokens": sum(lengths) / n,
    }


def _response(prompt: Measured, i: int, beta: float) -> dict[str, float]:
    log_ratio, tokens = prompt.logps[i] - prompt.ref_logps[i], prompt.tokens[i]
    return {
        "reward": prompt.rewards[i],
        "logps": prompt.logps[i],
        "logps_per_token": prompt.logps[i] / tokens,
        "log_ratio": log_ratio,
        "log_ratio_per_token": log_ratio / tokens,
        "r": beta * log_ratio,
        "r_per_token": beta * log_ratio / tokens,
    }


def _win(difference: float) -> float:
    return 0.5 if abs(difference) < TIE else float(difference > 0)


def _mean(responses: list[dict[str, float]]) -> dict[str, float]:
    return {key: math.fsum(r[key] for r in responses) / len(responses) for key in responses[0]}
