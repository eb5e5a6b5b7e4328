"""What is in a file of rows, as text and as one figure.

    python -m data_prep.describe ROWS --out DIR [--tokenizer NAME_OR_DIRECTORY] [--alphas A ...]

DIR gets description.txt, description.png and manifest.json, whose facts hold the same numbers.

Entropy is that of the labels softmax(reward / alpha), in nats, mean over rows; at alpha = 0 the best responses
share the label. "with tie-break" adds 0.01 to the first best response, as the released code does before it
divides by its temperature (reward_trainer.py of thu-ml/Noise-Contrastive-Alignment). A model card by the authors
(ChenDRAG/zephyr-infoNCA-reward) prints a mean label entropy of 0.2326 on their test split: whichever alpha gives
that value on those rows is the one the model was trained with.

Lengths are tokens as training sees them: the prompt by the tokenizer's chat template up to where the answer
begins (without a template: its texts alone), a response by itself and one EOS. Defaults of the limits: the
released configuration, 512 of 1024 tokens for the prompt. The released code judges a whole row by its longest
response; that count stands beside those of single prompts and responses.
"""

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.files import InputError, atomic_path, run_command, write_text
from data_prep.manifest import plan, up_to_date, write_manifest
from data_prep.rows import Row, read_rows
from data_prep.sources import summarize

TIE_BREAK = 0.01
ALPHAS = (0.0001, 0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)
BATCH = 1000  # texts for the tokenizer at a time


def label_entropy(rewards: Sequence[float], alpha: float, tie_break: float = 0.0) -> float:
    """Entropy in nats of softmax(reward / alpha), alpha >= 0, after adding `tie_break` to the first best."""
    rewards = list(rewards)
    rewards[rewards.index(max(rewards))] += tie_break
    best = max(rewards)
    if alpha == 0:
        return math.log(rewards.count(best))
    logits = [(reward - best) / alpha for reward in rewards]
    weights = [math.exp(logit) for logit in logits]
    total = sum(weights)
    # -sum p log p with log p = logit - log total; a weight that underflows to 0 contributes nothing.
    return math.log(total) - sum(w * logit for w, logit in zip(weights, logits, strict=True) if w) / total


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, minimum, quartiles, 95th percentile and maximum (nearest rank)."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return {
        "mean": round(math.fsum(values) / len(values), 4),
        **{"min": ordered[0], "25%": at(0.25), "50%": at(0.5), "75%": at(0.75), "95%": at(0.95)},
        "max": ordered[-1],
    }


def token_lengths(rows: Sequence[Row], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Tokens of each row's prompt and of each of its responses with EOS."""

    def lengths(texts: list[str]) -> list[int]:
        found = []
        for start in range(0, len(texts), BATCH):
            ids = tokenizer(texts[start : start + BATCH], add_special_tokens=False).input_ids
            found += [len(one) for one in ids]
        return found

    if tokenizer.chat_template:
        prompts = [
            tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True) for row in rows
        ]
    else:
        prompts = ["\n".join(message["content"] for message in row.prompt) for row in rows]
    responses = iter(lengths([text for row in rows for text in row.responses]))
    return lengths(prompts), [[next(responses) + 1 for _ in row.responses] for row in rows]


def truncation(
    prompts: Sequence[int], responses: Sequence[Sequence[int]], max_prompt: int, max_response: int
) -> dict[str, int]:
    """How many prompts and responses are longer than their limits in tokens, and how many rows by both rules."""
    pairs = list(zip(prompts, responses, strict=True))
    return {
        "prompts_too_long": sum(prompt > max_prompt for prompt in prompts),
        "responses_too_long": sum(length > max_response for row in responses for length in row),
        "rows_with_any_too_long": sum(p > max_prompt or max(r) > max_response for p, r in pairs),
        "rows_too_long_by_released_rule": sum(p + max(r) > max_prompt + max_response for p, r in pairs),
    }


def describe(rows: Sequence[Row], alphas: Sequence[float]) -> dict[str, Any]:
    """Counts, rewards and label entropies of rows."""
    rewards = [reward for row in rows for reward in row.rewards]
    counts = Counter(rewards)
    return {
        **summarize(rows),
        "share_tied_best": round(sum(row.rewards.count(max(row.rewards)) > 1 for row in rows) / len(rows), 4),
        "rows_by_source": dict(sorted(Counter(row.source for row in rows).items())),
        "reward": quantiles(rewards),
        "responses_by_reward": {str(r): counts[r] for r in sorted(counts)} if len(counts) <= 100 else None,
        "label_entropy": {
            str(alpha): {
                name: round(math.fsum(label_entropy(row.rewards, alpha, bonus) for row in rows) / len(rows), 4)
                for name, bonus in (("plain", 0.0), ("with_tie_break", TIE_BREAK))
            }
            for alpha in alphas
        },
    }


def render(facts: dict[str, Any]) -> str:
    """The facts as text."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines.append(f"{name}:")
            lines += [f"    {key:32} {_cell(entry)}" for key, entry in value.items()]
        else:
            lines.append(f"{name:36} {_cell(value)}")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return "   ".join(f"{key} {entry:g}" for key, entry in value.items())
    return "more than 100 values" if value is None else f"{value:,}"


def draw(path: Path, rows: Sequence[Row], facts: dict[str, Any], lengths: tuple[list[int], list[list[int]]] | None):
    """One figure: K, rewards, label entropy by alpha, and lengths where they are known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((k_axes, reward_axes), (entropy_axes, length_axes)) = pyplot.subplots(2, 2, figsize=(9, 6))
    sizes = {int(size): count for size, count in facts["rows_by_K"].items()}
    k_axes.bar(list(sizes), list(sizes.values()))
    k_axes.set(xlabel="K, responses of a prompt", ylabel="rows", xticks=list(sizes))
    reward_axes.hist([reward for row in rows for reward in row.rewards], bins=40)
    reward_axes.set(xlabel="reward", ylabel="responses")
    entropies = {float(alpha): values for alpha, values in facts["label_entropy"].items() if float(alpha) > 0}
    for name, label in (("plain", "rewards as they are"), ("with_tie_break", "0.01 added to the best")):
        heights = [entropies[alpha][name] for alpha in sorted(entropies)]
        entropy_axes.plot(sorted(entropies), heights, marker="o", label=label)
    entropy_axes.set(xlabel="alpha", ylabel="mean label entropy (nats)", xscale="log")
    entropy_axes.legend()
    if lengths:
        prompts, responses = lengths
        for name, values in (("prompts", prompts), ("responses", [n for row in responses for n in row])):
            length_axes.hist(values, bins=60, histtype="step", density=True, label=name)
        length_axes.set(xlabel="tokens", ylabel="density")
        length_axes.legend()
    else:
        length_axes.text(0.5, 0.5, "no --tokenizer given", ha="center")
        length_axes.set_axis_off()
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def load_tokenizer(name: str) -> Any:
    """A tokenizer from a directory or the Hub; InputError in one line if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name}: no tokenizer can be loaded ({reason})") from None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.describe", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("rows", type=Path, metavar="ROWS", help="rows, .jsonl or .parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tokenizer", metavar="NAME_OR_DIRECTORY", help="without it lengths are left out")
    parser.add_argument("--max-prompt-tokens", type=int, default=512)
    parser.add_argument("--max-response-tokens", type=int, default=512)
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS, metavar="A")
    options = parser.parse_args()
    if min(options.alphas) < 0:
        raise InputError(f"--alphas {min(options.alphas)}: a temperature is at least 0")

    inputs = {"rows": options.rows}
    if options.tokenizer and Path(options.tokenizer).is_dir():
        inputs["tokenizer"] = Path(options.tokenizer)
    settings = {
        "tokenizer": options.tokenizer,
        "max_prompt_tokens": options.max_prompt_tokens,
        "max_response_tokens": options.max_response_tokens,
        "alphas": list(options.alphas),
    }
    planned = plan("data_prep.describe", settings, inputs)
    if up_to_date(options.out, planned):
        print((options.out / "description.txt").read_text(encoding="utf-8"), end="")
        print(f"{options.out}: up to date")
        return
    rows = read_rows(options.rows)
    facts, lengths = describe(rows, options.alphas), None
    if options.tokenizer:
        prompts, responses = lengths = token_lengths(rows, load_tokenizer(options.tokenizer))
        facts["prompt_tokens"] = quantiles(prompts)
        facts["response_tokens"] = quantiles([length for row in responses for length in row])
        limits = options.max_prompt_tokens, options.max_response_tokens
        facts["truncation"] = {
            "max_prompt_tokens": limits[0],
            "max_response_tokens": limits[1],
            **truncation(prompts, responses, *limits),
        }
    write_text(options.out / "description.txt", render(facts))
    draw(options.out / "description.png", rows, facts, lengths)
    write_manifest(options.out, planned, outputs=["description.txt", "description.png"], facts=facts)
    print(render(facts), end="")


if __name__ == "__main__":
    run_command(main)
