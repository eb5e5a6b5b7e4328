"""From a response to verdicts, 1 or 0, one for each metric. Called by lm-eval for each item (`process_results`).

Answers are compared by libraries: Minerva's normalisation and sympy equivalence as in lm-eval, or math-verify. Both
use an alarm signal against endless simplification, so all of this runs in the main thread.
"""

import json
import math
import re
from typing import Any

import math_verify
from lm_eval.tasks.minerva_math import utils as minerva

FLOAT_TOLERANCE = 0.04  # relative; TheoremQA's own rule for answers that are not whole numbers
YES, NO = ("true", "yes"), ("false", "no")


def boxed(response: str) -> str | None:
    """What the last \\boxed{} of a response holds; None if there is none."""
    found = minerva.last_boxed_only_string(response)
    if found is None or not found.startswith("\\boxed"):
        return None
    try:
        return minerva.remove_boxed(found).strip()
    except AssertionError:
        return None


def after_answer_is(response: str) -> str | None:
    """What stands after the last "answer is", in whatever case, without a final full stop; None if it is not there."""
    parts = re.split(r"answer is:?\s+", response, flags=re.IGNORECASE)
    return parts[-1].strip().removesuffix(".") if len(parts) > 1 else None


def equivalent(found: str | None, gold: str) -> bool:
    """Whether two answers are the same: after Minerva's normalisation by sympy, or by math-verify."""
    if found is None:
        return False
    if gold == "None":  # GSM-Plus: a question that lacks what is needed to answer it
        return re.sub(r"\\text\{(.*)\}", r"\1", found).strip().casefold() == "none"
    return minerva.is_equiv(_normalised(found), _normalised(gold)) or verified(f"\\boxed{{{found}}}", gold)


def _normalised(answer: str) -> str:
    """By Minerva's rules, but for equations: of those they keep the right side, and all `... = 0` would be equal."""
    left, equals, _ = answer.partition("=")
    return answer.replace(" ", "") if equals and len(left.strip()) > 1 else minerva.normalize_final_answer(answer)


def verified(response: str, gold: str) -> bool:
    """Whether math-verify finds the gold answer in a response."""
    if gold == "None":
        return equivalent(boxed(response), gold)
    return bool(math_verify.verify(math_verify.parse(f"\\boxed{{{gold}}}"), math_verify.parse(response)))


def word_problem(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """GSM-Plus, SVAMP, ASDiv. doc: question, gold (a number as text, or "None")."""
    (response,) = results
    return {
        "boxed": int(equivalent(boxed(response), doc["gold"])),
        "math_verify": int(verified(response, doc["gold"])),
    }


def competition(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """MATH. doc: problem, solution (its answer in \\boxed{}), answer (normalised)."""
    return {
        **minerva.process_results(doc, results),
        "boxed": int(equivalent(boxed(results[0]), doc["answer"])),
    }


def minerva_shots() -> list[dict[str, str]]:
    """Minerva's four worked examples, with the fields of our documents."""
    return [{**shot, "question": shot["problem"]} for shot in minerva.list_fewshot_samples()]


def number(text: str) -> float | None:
    """The real number that a text states, maybe in LaTeX, as a fraction or before a unit; None if there is none."""
    text = text.strip(" $")
    try:  # 4e-05, which is no LaTeX
        plain = float(text.replace(",", ""))
        return plain if math.isfinite(plain) else None
    except ValueError:
        pass
    if text.endswith("%"):
        share = number(text.rstrip("\\% "))
        return None if share is None else share / 100
    for parsed in math_verify.parse(f"\\boxed{{{text}}}"):
        try:
            value = float(parsed.evalf())
        except (AttributeError, TypeError, ValueError, OverflowError):
            continue
        return value if math.isfinite(value) else None
    before_unit = re.fullmatch(r"([-+]?\d+(?:\.\d+)?)\s+[a-zA-Z][^\d]*", text)
    return float(before_unit.group(1)) if before_unit else None


def theorem_equal(found: str | None, gold: str, kind: str) -> bool:
    """TheoremQA's comparison. gold: as JSON. kind: its Answer_type, such as "list of integer"."""
    if found is None:
        return False
    if kind == "option":
        letter = re.search(r"\(?\b([a-z])\b\)?", re.sub(r"\\\w+", "", found.casefold()))
        return letter is not None and letter.group(1) == json.loads(gold).strip("() ").casefold()
    expected = json.loads(gold)
    if kind == "bool":
        words = re.findall(r"[a-z]+", found.casefold())
        return any(word in (YES if expected else NO) for word in words) and not any(
            word in (NO if expected else YES) for word in words
        )
    if kind.startswith("list"):
        inner = found.strip(" $").replace("\\left", "").replace("\\right", "").strip("[](){}\\ ")
        parts = [number(part) for part in inner.split(",")]
        return len(parts) == len(expected) and all(map(_close, parts, expected))
    return _close(number(found), expected)


def _close(found: float | None, expected: float) -> bool:
    if found is None:
        return False
    if isinstance(expected, int):
        return round(found) == expected
    return abs(found - expected) <= FLOAT_TOLERANCE * abs(expected)


def theorem(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """TheoremQA. doc: question, gold (JSON), kind."""
    (response,) = results
    strict, lenient = boxed(response), after_answer_is(response)
    if strict is not None:
        lenient = strict
    return {
        "boxed": int(theorem_equal(strict, doc["gold"], doc["kind"])),
        "answer": int(theorem_equal(lenient, doc["gold"], doc["kind"])),
    }


def big_bench_hard(doc: dict[str, Any], results: list[str]) -> dict[str, int]:
    """BIG-Bench Hard. doc: input, target."""
    (response,) = results
    return {
        "substring": int(doc["target"] in response),
        "exact_match": int(after_answer_is(response) == doc["target"]),
    }


def extracted(task: str, response: str) -> dict[str, str | None]:
    """What the scorers above take for the answer, for a reader of samples.jsonl. (GSM8K's comes from lm-eval.)"""
    if task == "bbh":
        return {"exact_match": after_answer_is(response)}
    found: dict[str, str | None] = {"boxed": boxed(response)}
    if task == "math":
        found["exact_match"] = minerva.normalize_final_answer(minerva.get_unnormalized_answer(response))
    if task == "theoremqa":
        found["answer"] = found["boxed"] if found["boxed"] is not None else after_answer_is(response)
    return found
