"""Does this repository compute what the authors' code computed? Their model cards' figures beside ours.

    python -m train.parity --expected preference --rows data/released-preference/test.jsonl --model-revision COMMIT
    python -m train.parity --expected reward --rows data/released-reward/test.jsonl --model-revision COMMIT \
        --policy runs/released-nca/policy --method nca

Three checks, each with what is at hand; what is missing is named, and stated as `not run`:

labels     needs the rows. Mean entropy of softmax(score / alpha), with and without the tie-break, and the alpha at
           which it is the 0.2326 of one card: the alpha which that model was trained with.
reference  needs the rows and the model. Mean log mu(y|x) on the released test set: no training, yet it takes
           template, EOS, truncation, masks and quantization together. For pairs the cards imply -275.16 and -233.17.
policy     needs also a trained --policy (a model, or an adapter of --model): the final metrics of its card.

All means stand beside those over each device's share: the released code reports its first process's, and the share
decides several nats. --out gets report.md, parity.json and the log-probs, so that a stopped command continues.
Figures of the cards: results/paper/model_cards.csv.
"""

import argparse
import csv
import gc
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from scipy.optimize import brentq
from transformers import AutoConfig

from data_prep.describe import label_entropy
from data_prep.files import InputError, read_json, run_command, write_json, write_text
from data_prep.manifest import ROOT, plan, up_to_date, write_manifest
from data_prep.rows import Row, read_rows
from train.dpo import dpo_loss
from train.engine.models import BASE_FILE, Checkpoint
from train.engine.official import TIE_BREAK, alpha_of, parse_quirks, rank_share
from train.engine.reference import ReferenceCache
from train.engine.tokens import EncodedRow, Encoder
from train.infonca import infonca_loss
from train.nca import nca_loss
from train.nca_pair import nca_pair_loss

CARDS = ROOT / "results" / "paper" / "model_cards.csv"
MODEL = "HuggingFaceH4/mistral-7b-sft-beta"
MAX_TOKENS, MAX_PROMPT_TOKENS, BETA, ALPHA = 1024, 512, 0.01, 1e-4  # of the released recipes
K = {"preference": 2, "reward": 4}
TEST_PROMPTS = 2000
ENTROPY = 0.2326  # mean label entropy on the card ChenDRAG/zephyr-infoNCA-reward
ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
PRECISIONS = ("nf4/float16", "nf4/bfloat16", "bfloat16", "float32")
SLICE = 256  # rows between two writes of the log-probs


def read_cards(expected: str, method: str) -> tuple[str, int, dict[str, float]]:
    """Name of a card, the devices it was evaluated on, and its figures by metric."""
    with open(CARDS, encoding="utf-8") as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    found = [line for line in lines if (line["setting"], line["method"]) == (expected, method)]
    return found[0]["card"], int(found[0]["devices"]), {line["metric"]: float(line["value"]) for line in found}


def mean_entropy(rows: Sequence[Row], alpha: float, tie_break: float) -> float:
    """Mean over rows of the entropy of softmax(reward / alpha), in nats, with `tie_break` added to the best."""
    return math.fsum(label_entropy(row.rewards, alpha, tie_break) for row in rows) / len(rows)


def alpha_at(rows: Sequence[Row], entropy: float, tie_break: float) -> float | None:
    """The alpha, from 1e-5 to 1e3, at which the mean label entropy is `entropy`. It grows with alpha, so there is one
    at most; None where it is larger for every alpha (because of ties), or smaller."""

    def excess(log_alpha: float) -> float:
        return mean_entropy(rows, math.exp(log_alpha), tie_break) - entropy

    low, high = math.log(1e-5), math.log(1e3)
    return math.exp(brentq(excess, low, high, xtol=1e-6)) if excess(low) < 0 < excess(high) else None


def label_report(rows: Sequence[Row]) -> tuple[list[str], dict[str, Any]]:
    """The label entropies as lines of Markdown, and as data."""
    lines = ["| alpha | plain | best + 0.01 |", "| --- | --- | --- |"]
    table = {}
    for alpha in ALPHAS:
        table[str(alpha)] = [round(mean_entropy(rows, alpha, bonus), 4) for bonus in (0.0, TIE_BREAK)]
        lines.append(f"| {alpha:g} | {table[str(alpha)][0]:.4f} | {table[str(alpha)][1]:.4f} |")
    found = {"plain": alpha_at(rows, ENTROPY, 0.0), "best + 0.01": alpha_at(rows, ENTROPY, TIE_BREAK)}
    for name, alpha in found.items():
        lines += ["", f"{name}: entropy {ENTROPY} at {f'alpha = {alpha:.4g}' if alpha else 'no alpha'}"]
    return lines, {"entropy": table, f"alpha_at_{ENTROPY}": found}


def metrics(
    rows: Sequence[EncodedRow], ref_logps: Sequence[Sequence[float]], logps: Sequence[Sequence[float]] | None,
    expected: str, method: str, alpha: float = ALPHA,
) -> dict[str, numpy.ndarray]:  # fmt: skip
    """The cards' metrics for each row, [n], under the names in results/paper/model_cards.csv.

    alpha: of the labels in the loss; pairs do not read it.
    ref_logps, logps: log mu and log pi of each row's responses, in nats; without `logps` what the reference gives.
    """
    # Best response first, as in the released sets; equal rewards keep their order.
    orders = [sorted(range(len(row.rewards)), key=lambda i, row=row: -row.rewards[i]) for row in rows]

    def ranked(values: Sequence[Sequence[float]]) -> numpy.ndarray:
        return numpy.array([[value[i] for i in order] for value, order in zip(values, orders, strict=True)])

    reference = ranked(ref_logps)  # [n, K]
    lengths = ranked([[len(ids) for ids in row.response_ids] for row in rows])
    pairs = expected == "preference"
    found = {}
    if pairs:
        found |= {"ref_logps_chosen": reference[:, 0], "ref_logps_rejected": reference[:, 1]}
    else:
        found |= {f"ref_logps_A{i}": reference[:, i] for i in range(K[expected])}
    found["reference_data_loss (if: chosen, mean over tokens, then rows)"] = -reference[:, 0] / lengths[:, 0]
    found["reference_data_loss (if: the same of all responses)"] = (-reference / lengths).mean(1)
    if logps is None:
        return found
    policy = ranked(logps)
    r = BETA * (policy - reference)
    if pairs:
        found |= {"logps_chosen": policy[:, 0], "logps_rejected": policy[:, 1]}
    else:
        found |= {f"r_A{i}": r[:, i] for i in range(K[expected])}
        found |= {f"accuracy_A0_A{i}": r[:, 0] > r[:, i] for i in range(1, K[expected])}
    found |= {
        "r_chosen": r[:, 0],
        "r_rejected": r[:, 1:].mean(1),
        "margin": r[:, 0] - r[:, 1:].mean(1),
        "accuracy": (r[:, :1] > r[:, 1:]).mean(1),
    }
    rewards = torch.tensor(ranked([row.rewards for row in rows]))
    inputs = (torch.tensor(policy - reference), rewards, torch.ones_like(rewards, dtype=torch.bool))
    if pairs:
        loss = (nca_pair_loss if method == "nca" else dpo_loss)(*inputs, beta=BETA)  # InfoNCA on pairs is DPO
    else:
        loss = (nca_loss if method == "nca" else infonca_loss)(*inputs, alpha=alpha, beta=BETA)
    entropy = numpy.array([label_entropy(row.rewards, alpha) for row in rows]) * (not pairs)
    if method == "infonca" and not pairs:
        found |= {"loss_with_entropy": loss.numpy(), "label_entropy": entropy, "loss": loss.numpy() - entropy}
    else:
        found["loss"] = loss.numpy()
    return {name: numpy.asarray(values, dtype=float) for name, values in found.items()}


def compare(
    found: Mapping[str, numpy.ndarray], published: Mapping[str, float], shares: Sequence[Sequence[int]]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Means over all rows and over each share beside the published figures: lines of Markdown, and data."""
    titles = ["metric", "card", "all rows", "less card", *(f"device {rank}" for rank in range(len(shares)))]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    table = []
    for name, values in found.items():
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        mean, card = float(values.mean()), published.get(name.partition(" ")[0])
        parts = [float(values[list(share)].mean()) for share in shares]
        cells = ["" if card is None else f"{card:.4f}", f"{mean:.4f} ± {error:.4f}"]
        cells += ["" if card is None else f"{mean - card:+.4f}", *(f"{part:.4f}" for part in parts)]
        lines.append(f"| {' | '.join([name, *cells])} |")
        row = {"metric": name, "card": card, "mean": mean, "shares": parts}
        table.append({**row, "standard_error": None if math.isnan(error) else error})
    return lines, table


def load(checkpoint: Checkpoint, precision: str) -> tuple[Any, Any]:
    """Model and tokenizer, computing in one of PRECISIONS, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quantized, _, compute = precision.rpartition("/")
    if not quantized:
        model, tokenizer = checkpoint.load(dtype=getattr(torch, compute))
        return model.to(device), tokenizer
    # What is not quantized is bfloat16, as the released recipe has it.
    return checkpoint.load(dtype=torch.bfloat16, quantized=getattr(torch, compute), device_map={"": device})


def logps_of(
    model: Any, checkpoint: Checkpoint, precision: str, rows: list[EncodedRow], batch_size: int, directory: Path
) -> list[list[float]]:
    """The log-probs of each row's responses. They are kept in `directory`, and what is there is not computed again."""
    cache, found = ReferenceCache(directory, checkpoint, precision), {}
    for start in range(0, len(rows), SLICE):
        found |= cache.logps(model, rows[start : start + SLICE], batch_size)
    return [found[row.id] for row in rows]


def check_base(policy: Path, reference: Checkpoint) -> None:
    """InputError where `policy` is an adapter of another model than `reference`."""
    if (policy / BASE_FILE).exists() and read_json(policy / BASE_FILE).get("digest") != reference.digest:
        raise InputError(f"{policy}: an adapter of another model than {reference.name}; name its base as --model")


def at_hand(checkpoint: Checkpoint) -> bool:
    """Whether a model is a local directory, in the Hub's cache, or to be had from the Hub."""
    try:
        return checkpoint.is_local or bool(
            AutoConfig.from_pretrained(checkpoint.name, revision=checkpoint.revision, trust_remote_code=False)
        )
    except (OSError, ValueError):
        return False


def missing_model(name: str, revision: str | None) -> str:
    """Why the model cannot be loaded here; "" if it can."""
    if not Path(name).is_dir() and not revision:
        return f"{name}: no such directory, and for a model from the Hub no commit is named (--model-revision)"
    return "" if at_hand(Checkpoint(name, revision)) else f"{name} at {revision}: not in the Hub's cache, nor reachable"


def main() -> None:
    """Run what can be run, and say what was not."""
    parser = argparse.ArgumentParser(
        prog="python -m train.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--expected", choices=tuple(K), default="preference", help="which cards to meet")
    parser.add_argument("--method", choices=("nca", "infonca"), default="nca", help="which of their two methods")
    parser.add_argument("--rows", type=Path, help="the released test set; default: data/released-EXPECTED/test.jsonl")
    parser.add_argument("--model", default=MODEL, help="the reference: directory or Hub id")
    parser.add_argument("--model-revision", help="commit, for a model from the Hub")
    parser.add_argument("--policy", type=Path, help="directory of a trained policy, such as RUN/policy")
    parser.add_argument("--temperature-alpha", type=float, default=ALPHA, help="of the released code, for the loss")
    parser.add_argument("--quirks", default="official", help="as in a recipe; '' for the paper's tokens")
    parser.add_argument("--precision", choices=PRECISIONS, help="default: nf4, computing as the quirks say")
    parser.add_argument("--batch-size", type=int, default=1, help="prompts per forward pass")
    parser.add_argument("--out", type=Path, help="default: runs/parity-EXPECTED")
    arguments = parser.parse_args()
    expected, quirks = arguments.expected, parse_quirks(arguments.quirks)
    alpha = alpha_of(arguments.temperature_alpha)
    precision = arguments.precision or PRECISIONS[0 if "float16_compute" in quirks else 1]
    path = arguments.rows or Path(f"data/released-{expected}/test.jsonl")
    out = arguments.out or Path(f"runs/parity-{expected}")
    if arguments.batch_size < 1:
        raise InputError(f"--batch-size {arguments.batch_size}: at least 1")
    if arguments.policy and not arguments.policy.is_dir():
        raise InputError(f"{arguments.policy}: no such directory; name the trained policy")
    card, devices, published = read_cards(expected, arguments.method)
    no_model = missing_model(arguments.model, arguments.model_revision)
    if not path.exists() or no_model:
        explain(path, expected, no_model, published)
        return

    checkpoint = Checkpoint(arguments.model, arguments.model_revision)
    policy = Checkpoint(str(arguments.policy)) if arguments.policy else None
    if policy:
        check_base(arguments.policy, checkpoint)
    settings = {
        "expected": expected, "method": arguments.method, "alpha": alpha, "model": checkpoint.digest,
        "policy": policy.digest if policy else None, "precision": precision, "quirks": sorted(quirks),
        "batch_size": arguments.batch_size,
    }  # fmt: skip
    planned = plan("train.parity", settings, {"rows": path, "cards": CARDS})
    if not up_to_date(out, planned):
        rows = read_rows(path)
        for row in rows:
            if len(row.rewards) != K[expected]:
                raise InputError(
                    f"{path}: row {row.id!r} has K = {len(row.rewards)}, the {expected} cards have {K[expected]}; "
                    "give another --rows or --expected"
                )
        model, tokenizer = load(checkpoint, precision)
        encoder = Encoder(
            tokenizer, MAX_PROMPT_TOKENS, MAX_TOKENS, max_tokens=MAX_TOKENS, long_prompts="keep_end", quirks=quirks
        )
        encoded = encoder.rows(rows)
        ref_logps = logps_of(model, checkpoint, precision, encoded, arguments.batch_size, out / "logps")
        del model
        gc.collect()  # it refers to itself, and a second one may come
        logps = None
        if policy:
            logps = logps_of(
                load(policy, precision)[0], policy, precision, encoded, arguments.batch_size, out / "logps"
            )
        measured = metrics(encoded, ref_logps, logps, expected, arguments.method, alpha)
        devices = min(devices, len(rows)) if "rank0_metrics" in quirks else 0
        shares = [rank_share(len(rows), rank, devices) for rank in range(devices)]
        table, data = compare(measured, published, shares)
        labels, label_data = label_report(rows) if expected == "reward" else ([], {})
        lines = [f"{card}: {len(rows)} rows of {path.name}, {precision}, quirks: {', '.join(sorted(quirks)) or 'none'}"]
        if len(rows) != TEST_PROMPTS:
            lines.append(f"The cards are of {TEST_PROMPTS} rows, these are {len(rows)}: no parity is to be expected.")
        lines += ["", *table, *(["", *labels] if labels else [])]
        lines += [] if policy else ["", f"policy: not run (no --policy); {card} has its figures for one"]
        write_text(out / "report.md", "\n".join(lines) + "\n")
        write_json(out / "parity.json", {"card": card, "metrics": data, "labels": label_data})
        write_manifest(out, planned, outputs=["report.md", "parity.json"], facts={"rows": encoder.facts()})
    print((out / "report.md").read_text(encoding="utf-8"), end="")


def explain(path: Path, expected: str, no_model: str, published: Mapping[str, float]) -> None:
    """What is missing, what would be done with it, and what can be done without."""
    if path.exists() and expected == "reward":
        print("labels, mean entropy in nats:", *label_report(read_rows(path))[0], sep="\n")
    elif expected == "reward":
        print(f"labels: not run: {path} is absent")
    print("reference: not run")
    if not path.exists():
        print(f"  {path} is absent: the released test set of {TEST_PROMPTS:,} prompts. Where the Hub is reachable:")
        print(f"  python -m data_prep.ultrafeedback --released {expected} --out data/released-{expected}")
    if no_model:
        print(f"  {no_model}")
    print(f"  would encode it ({MAX_TOKENS} tokens, of which {MAX_PROMPT_TOKENS} for the prompt), take log mu(y|x) of "
          f"{TEST_PROMPTS * K[expected]:,} responses in one forward pass each, and put the means beside:")  # fmt: skip
    for name, value in published.items():
        if name.startswith("ref"):
            print(f"    {name:24} {value:.4f}")
    print("policy: not run; would put the final metrics of --policy beside:")
    for name, value in published.items():
        if name.startswith(("loss", "label", "r_", "margin", "accuracy", "logps")):
            print(f"    {name:24} {value:.4f}")


if __name__ == "__main__":
    run_command(main)
