"""Judging the miniature by its ground truth: no judge model, no opinion.

    python -m eval.truth --prompts FILE --answers NAME=DIR [NAME=DIR ...] --seed 0 --out DIR

Every answer is scored by the world that made its prompt: reward from 1 to 10; exact match of the final number for
arithmetic; pass@1 (all tests pass) for functions; all constraints met for instructions. Win rates compare two
policies' answers with the same prompt, decoding and sample number by reward; a tie is half a win.

NAME is "mu" for the reference policy, else METHOD-REGIME; each is compared with mu, and with DPO of its own regime.
Each score is a mean over prompts (of the mean over a prompt's samples) with a 95 % bootstrap interval over prompts.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy
from tqdm import tqdm

from data_prep.files import InputError, read_jsonl, run_command, write_jsonl
from data_prep.manifest import code_digest, plan, read_manifest, up_to_date, write_manifest
from data_prep.miniature.world import correct, score
from data_prep.rows import read_prompts
from eval.records import Score

CRITERIA = {"arithmetic": "exact_match", "functions": "pass@1", "instructions": "constraints_met"}
RESAMPLES = 2000
Key = tuple[str, str, int]  # prompt id, decoding, sample
Judged = dict[Key, tuple[float, float]]  # reward, and 1 if correct, else 0


def judge(prompts: list[dict[str, Any]], answers: Path) -> Judged:
    """Reward and correctness (1 or 0) of each answer in `answers`/answers.jsonl; InputError if any is missing."""
    truths = {item["id"]: item["truth"] for item in prompts}
    path, judged = answers / "answers.jsonl", {}
    for number, answer in read_jsonl(path):
        try:
            truth, key = truths[answer["id"]], (answer["id"], answer["decoding"], answer["sample"])
            judged[key] = (score(truth, answer["response"]), float(correct(truth, answer["response"])))
        except KeyError as error:
            raise InputError(f"{path}:{number}: no {error} here or among the prompts; generate it again") from None
    shapes = {(decoding, sample) for _, decoding, sample in judged}
    if len(judged) != len(shapes) * len(truths):
        raise InputError(f"{path}: answers to some prompts are missing; generate it again")
    return judged


def interval(values: numpy.ndarray) -> tuple[float, float, float]:
    """Mean of one value for each prompt, [n], and its 95 % percentile bootstrap interval over prompts."""
    draws = numpy.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = numpy.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(math.fsum(values) / len(values)), float(low), float(high)


def per_prompt(judged: dict[Key, Any], ids: list[str], decoding: str, value: Any) -> numpy.ndarray:
    """`value(key)` averaged over the samples of each prompt, [n] in the order of `ids`."""
    samples = sorted({sample for _, found, sample in judged if found == decoding})
    return numpy.array([math.fsum(value((name, decoding, k)) for k in samples) / len(samples) for name in ids])


def measure(
    prompts: list[dict[str, Any]], judged: dict[str, Judged], manifests: dict[str, str], seed: int
) -> list[Score]:
    """All scores of one seed: for each policy, decoding and benchmark its metrics with intervals."""
    ids_of = {source: [item["id"] for item in prompts if item["source"] == source] for source in CRITERIA}
    ids_of = {"all": [item["id"] for item in prompts], **ids_of}
    judge_version = f"truth {code_digest('data_prep.miniature.world')[:12]}"
    scores = []
    for name, answers in tqdm(judged.items(), desc="judge", unit="policy"):
        regime = name.rpartition("-")[2]
        rivals = {"mu": judged.get("mu"), "dpo": judged.get(f"dpo-{regime}")}
        for decoding in sorted({key[1] for key in answers}):
            for benchmark, ids in ids_of.items():
                metrics = {
                    "reward": per_prompt(answers, ids, decoding, lambda key, own=answers: own[key][0]),
                    CRITERIA.get(benchmark, "correct"): per_prompt(
                        answers, ids, decoding, lambda key, own=answers: own[key][1]
                    ),
                }
                for rival, other in rivals.items():
                    if other is None or other is answers:
                        continue
                    if other.keys() != answers.keys():
                        raise InputError(f"{name} and {rival} have other numbers of answers; generate them alike")
                    metrics[f"win_rate_vs_{rival}"] = per_prompt(
                        answers, ids, decoding,
                        lambda key, own=answers, other=other: _win(own[key][0], other[key][0]),
                    )  # fmt: skip
                for metric, values in metrics.items():
                    value, low, high = interval(values)
                    scores.append(Score(
                        scale="tiny", seed=seed, policy=name, decoding=decoding, benchmark=benchmark, metric=metric,
                        judge=judge_version, n=len(values), value=value, low=low, high=high, manifest=manifests[name],
                    ))  # fmt: skip
    return scores


def _win(own: float, other: float) -> float:
    return 1.0 if own > other else 0.5 if own == other else 0.0


def main() -> None:
    """Judge the answers of one seed's policies."""
    parser = argparse.ArgumentParser(prog="python -m eval.truth")
    parser.add_argument("--prompts", required=True, help="prompts with their truths")
    parser.add_argument("--answers", required=True, nargs="+", metavar="NAME=DIR", help="from eval.generate")
    parser.add_argument("--seed", type=int, required=True, help="of the world, for the records")
    parser.add_argument("--out", required=True, help="directory for scores.jsonl")
    arguments = parser.parse_args()
    folders = {}
    for item in arguments.answers:
        name, equals, folder = item.partition("=")
        if not equals:
            raise InputError(f"--answers {item}: write NAME=DIR")
        folders[name] = Path(folder)
    inputs = {"prompts": arguments.prompts, **{name: folder / "answers.jsonl" for name, folder in folders.items()}}
    planned = plan("eval.truth", {"seed": arguments.seed}, inputs)
    if up_to_date(arguments.out, planned):
        print(f"{arguments.out}: done already, nothing to do")
        return
    prompts = read_prompts(arguments.prompts)
    if not all("truth" in item for item in prompts):
        raise InputError(f"{arguments.prompts}: prompts without a truth; give those of the miniature world")
    judged = {name: judge(prompts, folder) for name, folder in folders.items()}
    manifests = {name: read_manifest(folder)["hash"] for name, folder in folders.items()}
    scores = measure(prompts, judged, manifests, arguments.seed)
    write_jsonl(Path(arguments.out) / "scores.jsonl", map(dataclasses.asdict, scores))
    write_manifest(arguments.out, planned, outputs=["scores.jsonl"], facts={"scores": len(scores)})


if __name__ == "__main__":
    run_command(main)
