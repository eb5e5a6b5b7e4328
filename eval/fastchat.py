"""FastChat's public files of MT-Bench: questions, reference answers, judge prompts, judgements.

None of their text is in this project. What is not given is downloaded from a pinned commit, with known digests.
"""

import dataclasses
import http.client
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

from data_prep.files import InputError, atomic_path, read_jsonl, sha256_file

COMMIT = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d"  # of lm-sys/FastChat, Apache-2.0
SOURCE = f"https://raw.githubusercontent.com/lm-sys/FastChat/{COMMIT}/fastchat/llm_judge/data"
FILES = {  # our name: path there, SHA-256
    "questions": ("mt_bench/question.jsonl", "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"),
    "references": (
        "mt_bench/reference_answer/gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
    "judge_prompts": ("judge_prompts.jsonl", "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6"),
}
# fastchat/llm_judge/common.py of the same commit: temperature_config and NEED_REF_CATS.
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
REFERENCED = ("math", "reasoning", "coding")
TURNS = (1, 2)


@dataclasses.dataclass(frozen=True)
class Question:
    """A two-turn question. references: the reference answers to both turns, where its category has them."""

    id: str
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Judgement:
    """One rating, from 1 to 10, of the answer to one turn; None where it is missing. judge: the exact model."""

    question: str
    turn: int
    pass_number: int
    rating: float | None
    judge: str
    reply: str


def locate(name: str, given: Path | None, data: Path) -> Path:
    """The file given, else the one in `data`, downloaded if it is not there; InputError unless it is the known one."""
    if given:
        return given
    remote, known = FILES[name]
    return fetch(f"{SOURCE}/{remote}", known, data / Path(remote).name)


def fetch(url: str, known: str, path: Path) -> Path:
    """`path`, downloaded from `url` if it is not there; InputError unless its SHA-256 is `known`."""
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=60) as reply, atomic_path(path) as temporary:
                temporary.write_bytes(reply.read())
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split())
            raise InputError(f"{url}: no download ({reason}); put the file at {path}") from None
    if sha256_file(path) != known:
        raise InputError(f"{path}: its SHA-256 is not {known[:12]}... of {url}; remove it to download it again")
    return path


def read_questions(path: Path, references: Path | None = None) -> list[Question]:
    """Questions in file order; with `references`, their reference answers. InputError for a bad or missing line."""
    answers = {}
    if references:
        for number, line in read_jsonl(references):
            try:
                first, second = line["choices"][0]["turns"]
                answers[str(line["question_id"])] = (first, second)
            except (KeyError, IndexError, TypeError, ValueError):
                raise InputError(f"{references}:{number}: not a reference answer with two turns") from None
    found: dict[str, Question] = {}
    for number, line in read_jsonl(path):
        try:
            name, category, (first, second) = str(line["question_id"]), line["category"], line["turns"]
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}:{number}: a question has question_id, category and two turns") from None
        if category not in TEMPERATURES:
            raise InputError(f"{path}:{number}: unknown category {category!r}; known: {', '.join(TEMPERATURES)}")
        if name in found:
            raise InputError(f"{path}:{number}: question {name} stands twice")
        wanted = references is not None and category in REFERENCED
        if wanted and name not in answers:
            raise InputError(f"{references}: no reference answer to question {name} ({category})")
        found[name] = Question(name, category, (first, second), answers[name] if wanted else None)
    if not found:
        raise InputError(f"{path}: no questions")
    return list(found.values())


def read_judge_prompts(path: Path) -> dict[str, dict[str, str]]:
    """Judge prompts by name, each with system_prompt and prompt_template; InputError unless all four are there."""
    prompts = {line.get("name"): line for _, line in read_jsonl(path)}
    needed = {template(turn, referenced) for turn in TURNS for referenced in (False, True)}
    lacking = {name for name in needed if not {"system_prompt", "prompt_template"} <= set(prompts.get(name, {}))}
    if lacking:
        raise InputError(f"{path}: no judge prompt {', '.join(sorted(lacking))}")
    return {name: prompts[name] for name in needed}


def template(turn: int, referenced: bool) -> str:
    """FastChat's name of the judge prompt for a turn, with or without reference answers."""
    return f"single{'-math' if referenced else ''}-v1{'-multi-turn' if turn == 2 else ''}"


def read_judgements(path: Path) -> dict[str, list[Judgement]]:
    """Judgements of each model in a file of FastChat ({question_id, model, judge, score, turn}); its score -1 is a
    missing rating, and a repeated judgement is one more pass. InputError for a line of another layout."""
    found: dict[str, list[Judgement]] = defaultdict(list)
    seen: Counter[tuple[str, str, int]] = Counter()
    for number, line in read_jsonl(path):
        try:
            model, name, turn, rating = line["model"], str(line["question_id"]), line["turn"], float(line["score"])
            judge = line["judge"][0] if isinstance(line["judge"], list) else line["judge"]
        except (KeyError, TypeError, ValueError, IndexError):
            raise InputError(f"{path}:{number}: a judgement has question_id, model, judge, score and turn") from None
        if turn not in TURNS or not (rating == -1 or 1 <= rating <= 10):
            raise InputError(f"{path}:{number}: turn {turn!r} with score {rating:g}; a turn is 1 or 2, a score from 1 "
                             "to 10, or -1 for none")  # fmt: skip
        key = (model, name, turn)
        kept = None if rating == -1 else rating
        found[model].append(Judgement(name, turn, seen[key], kept, str(judge), line.get("judgment", "")))
        seen[key] += 1
    if not found:
        raise InputError(f"{path}: no judgements")
    return dict(found)
