"""Win rates: AlpacaEval, and against the DPO model. Judged through the alpaca_eval package and `eval.judge`.

    python -m eval.win_rate --benchmark alpaca_eval_1 --answers DIR --prompts FILE --reference FILE --policy nca \\
        --scale mistral-7b --judge-url URL --judge-model NAME --judge-key-variable OPENAI_API_KEY --out DIR
    python -m eval.win_rate --benchmark alpaca_eval_1 --annotations FILE --policy nca --scale mistral-7b --out DIR

| benchmark     | reference                     | annotator of the package              |                     |
|---------------|-------------------------------|---------------------------------------|---------------------|
| alpaca_eval_1 | text_davinci_003's answers    | alpaca_eval_gpt4 (ranking)            | the paper's Table 2 |
| vs_dpo        | the DPO model's answers       | alpaca_eval_gpt4 (ranking)            | the paper's Table 2 |
| alpaca_eval_2 | gpt4_1106_preview's answers   | weighted_alpaca_eval_gpt4_turbo       | extension           |

Answers are a folder of `eval.generate`. A reference is another such folder, or a file of {instruction, output} in the
package's layout (JSON list or lines). --annotations takes judgements that were made before, in the package's layout,
and asks nobody. A win is 1, a draw 0.5; alpaca_eval_2 weighs by the judge's log-probs, and falls back to the ranking
annotator where the judge gives none, as its records say.

Into --out: judgements.jsonl {id, index, preference, win, judge, reply}, scores.jsonl (shares with 95 % bootstrap
intervals over prompts), manifest.json, and judge.jsonl, the cache by which the same command continues after a stop.
Nothing is scored while a judgement is missing, unless --allow-missing.
"""

import argparse
import dataclasses
import math
import re
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from data_prep.files import InputError, read_json, read_jsonl, run_command, sha256_file, write_jsonl
from data_prep.manifest import plan, read_manifest, up_to_date, write_manifest
from data_prep.rows import read_prompts
from eval.alpaca import RANKING, WEIGHTED, NoLogprobs, annotate, length_controlled
from eval.intervals import PairedDifference, bootstrap_interval, paired_difference
from eval.judge import Judge, add_arguments, from_arguments
from eval.records import Score

ANNOTATORS = {"alpaca_eval_1": RANKING, "vs_dpo": RANKING, "alpaca_eval_2": WEIGHTED}


def read_pairs(
    prompts: Path, answers: Path, reference: Path, decoding: str | None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Pairs to judge {id, index, instruction, output_1: reference, output_2: ours}, and facts about them.

    index: position in the reference, by which the length-controlled win rate knows an instruction. One answer to a
    prompt is judged: the first sample of `decoding`. InputError where a prompt has no answer or no reference.
    """
    ours, used, unused = _answers(answers, decoding)
    instructions = {item["id"]: _instruction(item, prompts) for item in read_prompts(prompts)}
    if reference.is_dir():
        theirs, *_ = _answers(reference, used)
        places = {id: place for place, id in enumerate(theirs)}
    else:
        listed = _read_list(reference, ("instruction", "output"))
        by_instruction = {item["instruction"]: place for place, item in enumerate(listed)}
        places = {id: by_instruction[text] for id, text in instructions.items() if text in by_instruction}
        theirs = {id: listed[place]["output"] for id, place in places.items()}
    pairs, defused = [], 0
    for id, instruction in instructions.items():
        for folder, outputs in ((answers, ours), (reference, theirs)):
            if id not in outputs:
                raise InputError(f"{folder}: no answer to prompt {id!r}; generate with the same prompts")
        texts = {"instruction": instruction, "output_1": theirs[id], "output_2": ours[id]}
        safe = {name: _defuse(text) for name, text in texts.items()}
        defused += safe != texts
        pairs.append({"id": id, "index": places[id], **safe})
    return pairs, {"decoding": used, "pairs": len(pairs), "answers_not_judged": unused, "defused": defused}


def _answers(folder: Path, decoding: str | None) -> tuple[dict[str, str], str, int]:
    """Response by prompt id, the decoding they are of, and how many other answers there are."""
    path = folder / "answers.jsonl"
    lines = [(number, line) for number, line in read_jsonl(path)]
    try:
        found = sorted({line["decoding"] for _, line in lines})
        if decoding is None and len(found) > 1:
            raise InputError(f"{path}: holds {' and '.join(found)} answers; choose with --decoding")
        decoding = decoding or found[0]
        firsts: dict[str, tuple[int, str]] = {}
        for _, line in lines:
            if line["decoding"] == decoding and line["sample"] < firsts.get(line["id"], (math.inf, ""))[0]:
                firsts[line["id"]] = (line["sample"], line["response"])
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: not answers of eval.generate ({error!r}); generate them again") from None
    if not firsts:
        raise InputError(f"{path}: no {decoding} answers; choose with --decoding")
    return {id: response for id, (_, response) in firsts.items()}, decoding, len(lines) - len(firsts)


def _instruction(item: dict[str, Any], path: Path) -> str:
    turns = [message["content"] for message in item["prompt"] if message["role"] != "system"]
    if len(turns) != 1:
        raise InputError(f"{path}: prompt {item['id']!r} has {len(turns)} turns; AlpacaEval compares answers to one")
    return turns[0]


def _defuse(text: str) -> str:
    """Part the words by which the package's templates and its chat format would take an answer for their own: an
    answer that holds {output_2} would swallow its rival, one that holds <|im_end|> would speak to the judge."""
    return re.sub(r"\{(instruction|output_[12])\}", r"{ \1 }", text).replace("<|im_", "<| im_")


def _read_list(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    """A JSON list, or JSON lines, of objects with these fields."""
    found = [record for _, record in read_jsonl(path)] if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(found, list) or not found:
        raise InputError(f"{path}: expected a list of objects")
    for place, item in enumerate(found):
        missing = set(fields) - set(item) if isinstance(item, dict) else set(fields)
        if missing:
            raise InputError(f"{path}: item {place} lacks {sorted(missing)}; give the package's layout")
    return found


def read_annotations(path: Path) -> list[dict[str, Any]]:
    """Judgements made before: {id, index, instruction, output_1, output_2, preference, judge, reply}, in file order.

    The package writes 0 (once) or 1.5 for a draw and null or -1 for a missing judgement.
    """
    judged = []
    for place, item in enumerate(_read_list(path, ("instruction", "output_1", "output_2", "preference"))):
        preference = item["preference"]
        if preference is None or preference == -1:
            value = None
        elif isinstance(preference, int | float) and (preference == 0 or 1 <= preference <= 2):
            value = float(preference) or 1.5
        else:
            raise InputError(f"{path}: item {place} has preference {preference!r}; from 1 to 2, 0 or null is needed")
        texts = {name: str(item[name]) for name in ("instruction", "output_1", "output_2")}
        judged.append({"id": str(place), "index": place, **texts, "preference": value,
                       "judge": str(item.get("annotator", "unknown")), "reply": ""})  # fmt: skip
    return judged


# Scores


def judge_pairs(pairs: list[dict[str, Any]], benchmark: str, judge: Judge) -> tuple[list[dict[str, Any]], str]:
    """Judgements of the benchmark's annotator, and its name; of the ranking annotator where log-probs are lacking."""
    try:
        return annotate(pairs, ANNOTATORS[benchmark], judge.ask), ANNOTATORS[benchmark]
    except NoLogprobs:
        return annotate(pairs, RANKING, judge.ask), f"{RANKING} (no log-probs: not weighted)"


def win_rate(judgements: list[dict[str, Any]]) -> tuple[int, float, float, float]:
    """n, mean and 95 % interval of the judgements that are there; InputError if none is."""
    wins = [judgement["preference"] - 1 for judgement in judgements if judgement["preference"] is not None]
    if not wins:
        raise InputError("no judgement at all; nothing to score")
    low, high = bootstrap_interval(wins)
    return len(wins), math.fsum(wins) / len(wins), low, high


def compare(ours: Path | str, theirs: Path | str) -> PairedDifference:
    """Two outputs of this command on the same prompts: the difference of their win rates, paired by prompt.

    Prompts without a judgement on either side are left out; n says how many remain. InputError if the prompts or the
    judges differ.
    """
    found = []
    for folder in (Path(ours), Path(theirs)):
        lines = [line for _, line in read_jsonl(folder / "judgements.jsonl")]
        found.append({line["id"]: line["win"] for line in lines})
    judges = {score["judge"] for folder in (ours, theirs) for _, score in read_jsonl(Path(folder) / "scores.jsonl")}
    if set(found[0]) != set(found[1]) or len(judges) > 1:
        raise InputError(f"{ours} and {theirs} have other prompts or other judges; judge them alike")
    both = [(win, found[1][id]) for id, win in found[0].items() if win is not None and found[1][id] is not None]
    if not both:
        raise InputError(f"{ours} and {theirs} have no judged prompt in common")
    return paired_difference([a for a, _ in both], [b for _, b in both])


class _Planned(Exception):
    """Carries the requests of a dry run out of the package."""


def dry_run(pairs: list[dict[str, Any]], benchmark: str, judge: Judge) -> str:
    """What judging would take, in one line."""

    def plan_only(requests: list[Any], accept: Any) -> dict[str, Any]:
        raise _Planned(requests)

    try:
        annotate(pairs, ANNOTATORS[benchmark], plan_only, probe=False)
    except _Planned as planned:
        return str(judge.estimate(planned.args[0]))
    return "0 calls to make: all answers equal their reference"


def main() -> None:
    """Judge and score one policy's answers."""
    arguments = _parse()
    out, given = Path(arguments.out), arguments.annotations
    judge = None if given else from_arguments(arguments, out / "judge.jsonl")
    planned = _plan(arguments, judge)
    if not arguments.dry_run and up_to_date(out, planned):
        print(f"{out}: done already, nothing to do")
        return
    if judge is None:
        texts = judgements = read_annotations(given)
        facts: dict[str, Any] = {"decoding": arguments.decoding or "unknown"}
        judged_by = f"{'+'.join(sorted({judgement['judge'] for judgement in judgements}))} (annotations given)"
        manifest, reasons, cost = sha256_file(given), Counter(), {}
    else:
        texts, facts = read_pairs(arguments.prompts, arguments.answers, arguments.reference, arguments.decoding)
        manifest = read_manifest(arguments.answers)["hash"]
        if arguments.dry_run:
            print(dry_run(texts, arguments.benchmark, judge))
            return
        judgements, annotator = judge_pairs(texts, arguments.benchmark, judge)
        models = "+".join(sorted({judgement["judge"] for judgement in judgements} - {""}))
        judged_by = f"{annotator} by {models or 'nobody: all answers are equal'}"
        reasons, cost = Counter(judge.missing.values()), {"calls": judge.calls, "usd": round(judge.spent, 4)}
    missing = sum(judgement["preference"] is None for judgement in judgements)
    if missing and not arguments.allow_missing:
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3)) or "null in the file"
        raise InputError(f"{missing} of {len(judgements)} judgements are missing ({why}); "
                         f"{'' if given else 'run the same command again to ask for these alone, or '}"
                         "give --allow-missing to score the others")  # fmt: skip
    results = {"win_rate": win_rate(judgements)}
    if arguments.length_control:
        rows = [{**text, **judgement} for text, judgement in zip(texts, judgements, strict=True)]
        n = results["win_rate"][0]
        results["length_controlled_win_rate"] = (n, *length_controlled(rows, arguments.length_control))
    scores = [
        Score(
            scale=arguments.scale, seed=arguments.seed, policy=arguments.policy, decoding=facts["decoding"],
            benchmark=arguments.benchmark, metric=metric, judge=judged_by, n=n, value=value, low=low, high=high,
            manifest=manifest,
        )
        for metric, (n, value, low, high) in results.items()
    ]  # fmt: skip
    draws = sum(judgement["preference"] == 1.5 for judgement in judgements)
    facts |= {"judge": judged_by, "judged": len(judgements) - missing, "missing": missing, "draws": draws}
    write_jsonl(out / "judgements.jsonl", map(_line, judgements))
    write_jsonl(out / "scores.jsonl", map(dataclasses.asdict, scores))
    write_manifest(out, planned, outputs=["judgements.jsonl", "scores.jsonl"], facts=facts, circumstances=cost)
    for score in scores:
        print(f"{score.benchmark} {score.metric}: {100 * score.value:.2f} % [{100 * score.low:.2f}, "
              f"{100 * score.high:.2f}], n = {score.n}, {missing} missing, {judged_by}")  # fmt: skip
    if arguments.benchmark == "alpaca_eval_2" and not arguments.length_control:
        print("length-controlled win rate: not computed; it needs df_gamed.csv of tatsu-lab/alpaca_eval "
              "(--length-control)")  # fmt: skip


def _plan(arguments: argparse.Namespace, judge: Judge | None) -> dict[str, Any]:
    """What decides the outputs: settings, and digests of the files that are read."""
    names = ("prompts", "annotations", "length_control", "answers", "reference")
    paths = {name: getattr(arguments, name) for name in names if getattr(arguments, name)}
    inputs = {name: path / "answers.jsonl" if path.is_dir() else path for name, path in paths.items()}
    settings = {
        **{name: getattr(arguments, name) for name in ("benchmark", "policy", "scale", "seed", "decoding")},
        "allow_missing": arguments.allow_missing,
        "judge": judge and {"url": judge.endpoint.base_url, "model": judge.endpoint.model},
        "alpaca_eval": metadata.version("alpaca_eval"),
    }
    return plan("eval.win_rate", settings, inputs)


def _line(judgement: dict[str, Any]) -> dict[str, Any]:
    """A line of judgements.jsonl: without the texts, with the win (None where missing)."""
    kept = {name: judgement[name] for name in ("id", "index", "preference", "judge", "reply")}
    return {**kept, "win": None if kept["preference"] is None else kept["preference"] - 1}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.win_rate")
    parser.add_argument("--benchmark", required=True, choices=list(ANNOTATORS))
    parser.add_argument("--answers", type=Path, help="folder of eval.generate")
    parser.add_argument("--reference", type=Path, help="folder of eval.generate, or a file of {instruction, output}")
    parser.add_argument("--prompts", type=Path, help="the prompts that were answered")
    parser.add_argument("--decoding", choices=["greedy", "sampled"], help="which answers, where there are both")
    parser.add_argument("--annotations", type=Path, help="judgements made before; then nobody is asked")
    parser.add_argument("--length-control", type=Path, metavar="FILE", help="df_gamed.csv, for alpaca_eval_2")
    parser.add_argument("--policy", required=True, help="its name in the records")
    parser.add_argument("--scale", required=True, help="for the records, such as tiny or mistral-7b")
    parser.add_argument("--seed", type=int, default=0, help="of the training run, for the records")
    parser.add_argument("--allow-missing", action="store_true", help="score what is there, and state what is not")
    parser.add_argument("--out", required=True)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.annotations and (arguments.answers or arguments.reference or arguments.prompts or arguments.dry_run):
        raise InputError("--annotations holds both answers and judgements; leave out --answers, --reference, --prompts "
                         "and --dry-run")  # fmt: skip
    if not arguments.annotations and not (arguments.answers and arguments.reference and arguments.prompts):
        raise InputError("give --answers, --reference and --prompts, or --annotations")
    if arguments.length_control and arguments.benchmark != "alpaca_eval_2":
        raise InputError("--length-control belongs to alpaca_eval_2")
    return arguments


if __name__ == "__main__":
    run_command(main)
