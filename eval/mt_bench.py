"""MT-Bench: 80 two-turn questions, each answer graded from 1 to 10 by a judge model.

    python -m eval.mt_bench prompts --out FILE                                  for eval.generate --samples 1
    python -m eval.mt_bench judge --answers DIR --out DIR --policy NAME --scale NAME --judge-url URL --judge-model NAME
    python -m eval.mt_bench scores --judgements FILE --out DIR --scale NAME     of FastChat's own files

Questions, reference answers and judge prompts are FastChat's public files, none of which is in this project: what is
not given by --questions, --references and --judge-prompts is downloaded to --data, at a pinned commit and with known
digests. Protocol (fastchat/llm_judge, same commit): temperature by category; single-answer grading, turn 2 with the
whole conversation in view; reference answers for math, reasoning and coding; the judge at temperature 0 with 2048
tokens. A score is the mean over all ratings that are there, as in FastChat's show_result.
"""

import argparse
import dataclasses
import math
import random
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy
from scipy import stats

from data_prep.files import InputError, read_jsonl, run_command, to_json, write_jsonl
from data_prep.manifest import file_digest, plan, read_manifest, up_to_date, write_manifest
from eval.checks import Check
from eval.endpoint import Endpoint
from eval.fastchat import (
    FILES,
    TEMPERATURES,
    TURNS,
    Judgement,
    Question,
    locate,
    read_judge_prompts,
    read_judgements,
    read_questions,
    template,
)
from eval.judge import Judge, Request, add_arguments, from_arguments, models_of, parse_rating
from eval.records import Score

JUDGE_TOKENS = 2048
RESAMPLES = 10_000


# Judging


def to_prompts(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Lines for eval.generate: the first turn, the second as a follow-up, and the category's temperature."""
    return [
        {
            "id": question.id, "prompt": [{"role": "user", "content": question.turns[0]}],
            "follow_ups": [question.turns[1]], "temperature": TEMPERATURES[question.category],
            "source": question.category,
        }
        for question in questions
    ]  # fmt: skip


def read_answers(folder: Path, questions: Sequence[Question]) -> tuple[dict[tuple[str, int], str], dict[str, Any]]:
    """Answers by question and turn, the first sample of each, and facts; InputError where one is missing."""
    path, answers, decodings, others = folder / "answers.jsonl", {}, set(), 0
    for number, line in read_jsonl(path):
        try:
            key = (line["id"], line["turn"])
            others += line["sample"] > 0
            if line["sample"] == 0:
                if key in answers:
                    raise InputError(f"{path}: two first answers to question {key[0]}; generate with --samples 1 alone")
                answers[key] = line["response"]
                decodings.add(line["decoding"])
        except KeyError as error:
            raise InputError(f"{path}:{number}: no {error}; generate the answers again") from None
    for question in questions:
        if lacking := [turn for turn in TURNS if (question.id, turn) not in answers]:
            raise InputError(f"{path}: no answer to turn {lacking[0]} of question {question.id}; answer the prompts of "
                             "python -m eval.mt_bench prompts")  # fmt: skip
    if len(answers) != 2 * len(questions):
        raise InputError(f"{path}: holds answers to other questions too; generate with the same questions")
    empty = sum(not text.strip() for text in answers.values())
    return answers, {"decoding": "+".join(sorted(decodings)), "empty_answers": empty, "answers_not_judged": others}


def to_request(
    question: Question, answers: dict[tuple[str, int], str], turn: int, pass_number: int, prompts: dict[str, Any]
) -> Request:
    """What the judge is asked about one turn. answers: of this question at least, by question and turn."""
    prompt = prompts[template(turn, question.references is not None)]
    if turn == 1:
        fields = {"question": question.turns[0], "answer": answers[question.id, 1]}
    else:
        fields = {f"question_{k}": question.turns[k - 1] for k in TURNS}
        fields |= {f"answer_{k}": answers[question.id, k] for k in TURNS}
    if question.references:
        fields |= {f"ref_answer_{k}": question.references[k - 1] for k in TURNS[:turn]}
    try:
        text = prompt["prompt_template"].format(**fields)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"judge prompt {prompt['name']}: cannot be filled in ({error!r}); mend its template") from None
    messages = [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": text}]
    return Request(f"{question.id}/{turn}/{pass_number}", messages, JUDGE_TOKENS, 0.0, pass_number)


def judge_answers(
    questions: Sequence[Question], requests: Sequence[Request], judge: Judge, passes: int
) -> tuple[list[Judgement], str]:
    """One judgement for each question, turn and pass, and the exact judge."""
    replies = judge.ask(requests, parse_rating)
    judgements = []
    for question in questions:
        for turn in TURNS:
            for k in range(passes):
                reply = replies.get(f"{question.id}/{turn}/{k}")
                rating, model, text = (parse_rating(reply.text), reply.model, reply.text) if reply else (None, "", "")
                judgements.append(Judgement(question.id, turn, k, rating, model, text))
    return judgements, models_of(replies.values())


# Scores


def missing(judgements: Sequence[Judgement], wanted: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Which of the wanted (question, turn) have no rating at all."""
    rated = {(judgement.question, judgement.turn) for judgement in judgements if judgement.rating is not None}
    return [key for key in wanted if key not in rated]


def mean(judgements: Sequence[Judgement]) -> tuple[int, float, float, float]:
    """n questions, the mean over all ratings, and its 95 % percentile bootstrap interval over questions (which keeps
    the turns and passes of a question together); InputError without any rating."""
    ratings: dict[str, list[float]] = defaultdict(list)
    for judgement in judgements:
        if judgement.rating is not None:
            ratings[judgement.question].append(judgement.rating)
    if not ratings:
        raise InputError("no rating at all; nothing to score")
    sums, counts = (numpy.array([f(found) for found in ratings.values()]) for f in (math.fsum, len))
    value = math.fsum(sums) / int(counts.sum())
    draws = numpy.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = numpy.quantile(sums[draws].sum(1) / counts[draws].sum(1), [0.025, 0.975])
    return len(sums), value, min(float(low), value), max(float(high), value)


def measure(judgements: Sequence[Judgement], categories: dict[str, str]) -> dict[str, tuple[int, float, float, float]]:
    """n, value and interval by metric: overall, by turn, and by category of question where `categories` knows it.

    With three passes or more also score_over_passes: n passes, and Student's t interval over their means, which is
    the judge's own noise.
    """
    found = {"score": mean(judgements)}
    for turn in TURNS:
        found[f"score_turn_{turn}"] = mean([judgement for judgement in judgements if judgement.turn == turn])
    for category in dict.fromkeys(categories.values()):
        own = [judgement for judgement in judgements if categories.get(judgement.question) == category]
        if own:
            found[f"score_{category}"] = mean(own)
    means = pass_means(judgements)
    if len(means) >= 3:
        center = statistics.fmean(means)
        half = float(stats.t.ppf(0.975, len(means) - 1)) * statistics.stdev(means) / math.sqrt(len(means))
        found["score_over_passes"] = (len(means), center, center - half, center + half)
    return found


def pass_means(judgements: Sequence[Judgement]) -> list[float]:
    """The mean rating of each pass that judged every question and turn."""
    ratings: dict[int, list[float]] = defaultdict(list)
    for judgement in judgements:
        if judgement.rating is not None:
            ratings[judgement.pass_number].append(judgement.rating)
    whole = len({(judgement.question, judgement.turn) for judgement in judgements})
    return [statistics.fmean(found) for _, found in sorted(ratings.items()) if len(found) == whole]


def question_means(folder: Path) -> dict[str, float]:
    """The mean rating of each question in an output of `judge`, over turns and passes; InputError if one is missing."""
    ratings: dict[str, list[float]] = defaultdict(list)
    for _, line in read_jsonl(folder / "judgements.jsonl"):
        if line["rating"] is None:
            raise InputError(f"{folder}: a rating is missing; judge again before comparing")
        ratings[line["question"]].append(line["rating"])
    return {name: statistics.fmean(found) for name, found in ratings.items()}


# Known answers


def selftest() -> list[Check]:
    """A local judge that knows the truth rates perfect answers 10 and empty ones 1: over HTTP, through the client, the
    parser and the scores, with and without reference answers."""
    from data_prep.miniature.world import FAMILIES
    from data_prep.miniature.world import prompts as world_prompts
    from eval.truth_judge import JUDGE_PROMPTS, TruthJudge

    items = list(world_prompts(0, "test", 6))
    rng = random.Random(0)
    perfect = [FAMILIES[item["source"]].demonstrate(item["truth"], rng, 0.0) for item in items]
    texts = [item["prompt"][-1]["content"] for item in items]
    questions = [
        Question("first", "writing", (texts[0], texts[2])), Question("second", "math", (texts[4], texts[1]), ("a", "b"))
    ]  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        write_jsonl(path, items)
        server = TruthJudge([path])
        server.start()
        judge = Judge(Endpoint(server.url, server.model), Path(folder) / "judge.jsonl")
        prompts = {prompt["name"]: prompt for prompt in JUDGE_PROMPTS}
        for kind, expected in (("perfect answers", 10), ("empty answers", 1)):
            answers = {
                (question.id, turn): perfect[texts.index(question.turns[turn - 1])] if expected == 10 else ""
                for question in questions for turn in TURNS
            }  # fmt: skip
            requests = [to_request(question, answers, turn, 0, prompts) for question in questions for turn in TURNS]
            judgements, _ = judge_answers(questions, requests, judge, 1)
            for metric in ("score", "score_turn_1", "score_turn_2"):
                found.append(Check(f"mt_bench, {metric}: {kind}", expected, measure(judgements, {})[metric][1]))
        server.close()
    return found


# Commands


def prompts_command(arguments: argparse.Namespace) -> None:
    """Write the prompts file for eval.generate."""
    questions = read_questions(locate("questions", arguments.questions, arguments.data))
    write_jsonl(arguments.out, to_prompts(questions))
    print(f"{len(questions)} questions in {arguments.out}")


def judge_command(arguments: argparse.Namespace) -> None:
    """Judge one policy's answers and score it."""
    if arguments.passes < 1:
        raise InputError("--passes must be at least 1")
    out = arguments.out
    files = {name: locate(name, getattr(arguments, name), arguments.data) for name in FILES}
    judge = from_arguments(arguments, out / "judge.jsonl")
    settings = {
        **{name: getattr(arguments, name) for name in ("policy", "scale", "seed", "passes", "allow_missing")},
        "judge": {"url": judge.endpoint.base_url, "model": judge.endpoint.model},
    }
    planned = plan("eval.mt_bench", settings, {**files, "answers": arguments.answers / "answers.jsonl"})
    if not arguments.dry_run and up_to_date(out, planned):
        print(f"{out}: done already, nothing to do")
        return
    questions = read_questions(files["questions"], files["references"])
    prompts = read_judge_prompts(files["judge_prompts"])
    answers, facts = read_answers(arguments.answers, questions)
    requests = [
        to_request(question, answers, turn, k, prompts)
        for k in range(arguments.passes)
        for question in questions
        for turn in TURNS
    ]
    if arguments.dry_run:
        print(judge.estimate(requests))
        return
    manifest = read_manifest(arguments.answers)["hash"]
    judgements, judged_by = judge_answers(questions, requests, judge, arguments.passes)
    lacking = sum(judgement.rating is None for judgement in judgements)
    if lacking and not arguments.allow_missing:
        stated = "; ".join(f"{n} x {why}" for why, n in Counter(judge.missing.values()).most_common(3))
        raise InputError(f"{lacking} of {len(judgements)} judgements are missing ({stated}); run the same command "
                         "again to ask for these alone, or give --allow-missing")  # fmt: skip
    facts |= {"judge": judged_by, "judged": len(judgements) - lacking, "missing": lacking}
    categories = {question.id: question.category for question in questions}
    scores = [
        Score(arguments.scale, arguments.seed, arguments.policy, facts["decoding"], "mt_bench", metric, judged_by,
              n, value, low, high, manifest)
        for metric, (n, value, low, high) in measure(judgements, categories).items()
    ]  # fmt: skip
    write_jsonl(out / "judgements.jsonl", map(dataclasses.asdict, judgements))
    write_jsonl(out / "scores.jsonl", map(dataclasses.asdict, scores))
    paid = {"calls": judge.calls, "usd": round(judge.spent, 4)}
    facts["pass_means"] = pass_means(judgements)
    outputs = ["judgements.jsonl", "scores.jsonl"]
    write_manifest(out, planned, outputs=outputs, facts=facts, circumstances=paid)
    show(scores, lacking)


def scores_command(arguments: argparse.Namespace) -> None:
    """Scores of judgements made before, for each model in the file."""
    path, out = arguments.judgements, arguments.out
    inputs = {"judgements": path, **({"questions": arguments.questions} if arguments.questions else {})}
    settings = {name: getattr(arguments, name) for name in ("scale", "seed", "allow_missing")}
    planned = plan("eval.mt_bench", settings, inputs)
    by_model = read_judgements(path)
    categories = {}
    if arguments.questions:
        categories = {question.id: question.category for question in read_questions(arguments.questions)}
    # Without the questions: those of all models in the file.
    names = list(categories) or sorted({j.question for judgements in by_model.values() for j in judgements})
    wanted = [(name, turn) for name in names for turn in TURNS]
    scores, facts = [], {}
    for model, judgements in by_model.items():
        rated = [judgement for judgement in judgements if judgement.rating is not None]
        facts[model] = {
            "judgements": len(judgements),
            "without_rating": len(judgements) - len(rated),
            "repeated": sum(judgement.pass_number > 0 for judgement in judgements),
            "missing": len(lacking := missing(judgements, wanted)),
        }
        if lacking and not arguments.allow_missing:
            name, turn = lacking[0]
            raise InputError(f"{path}: {len(lacking)} of {len(wanted)} judgements of {model} are missing (turn {turn} "
                             f"of question {name} is one); judge again, or give --allow-missing")  # fmt: skip
        judged_by = "+".join(sorted({judgement.judge for judgement in rated})) + " (judgements given)"
        own = [
            Score(arguments.scale, arguments.seed, model, "unknown", "mt_bench", metric, judged_by, n, value, low,
                  high, file_digest(path))
            for metric, (n, value, low, high) in measure(judgements, categories).items()
        ]  # fmt: skip
        print(f"{model}: {to_json(facts[model])}")
        show(own, len(lacking))
        scores += own
    write_jsonl(out / "scores.jsonl", map(dataclasses.asdict, scores))
    write_manifest(out, planned, outputs=["scores.jsonl"], facts=facts)


def show(scores: Iterable[Score], lacking: int) -> None:
    """One line for each score."""
    for score in scores:
        print(f"mt_bench {score.metric}: {score.value:.4f} [{score.low:.4f}, {score.high:.4f}], n = {score.n}, "
              f"{lacking} missing, {score.judge}")  # fmt: skip


def main() -> None:
    """Make prompts, judge answers, or score judgements."""
    parser = argparse.ArgumentParser(prog="python -m eval.mt_bench")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("prompts", help="write the prompts file for eval.generate")
    judging = commands.add_parser("judge", help="judge the answers of eval.generate and score them")
    scoring = commands.add_parser("scores", help="score judgements in FastChat's layout; nobody is asked")
    making.set_defaults(run=prompts_command)
    judging.set_defaults(run=judge_command)
    scoring.set_defaults(run=scores_command)
    for command in (making, judging):
        command.add_argument("--questions", type=Path, help="question.jsonl of FastChat")
        command.add_argument("--data", type=Path, default=Path("data/mt_bench"), help="folder for downloads")
    making.add_argument("--out", type=Path, required=True, help="file")
    judging.add_argument("--references", type=Path, help="reference answers, such as FastChat's gpt-4.jsonl")
    judging.add_argument("--judge-prompts", type=Path, help="judge_prompts.jsonl of FastChat")
    judging.add_argument("--answers", type=Path, required=True, help="folder of eval.generate")
    judging.add_argument("--policy", required=True, help="its name in the records")
    judging.add_argument("--passes", type=int, default=1, help="judgements of each answer; 3 or more show judge noise")
    scoring.add_argument("--judgements", type=Path, required=True, help="such as gpt-4_single.jsonl")
    scoring.add_argument("--questions", type=Path, help="question.jsonl of FastChat, for scores by category")
    for command in (judging, scoring):
        command.add_argument("--out", type=Path, required=True, help="folder")
        command.add_argument("--scale", required=True, help="for the records, such as tiny or mistral-7b")
        command.add_argument("--seed", type=int, default=0, help="of the training run, for the records")
        command.add_argument("--allow-missing", action="store_true", help="score what is there; say what is not")
    add_arguments(judging)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    run_command(main)
