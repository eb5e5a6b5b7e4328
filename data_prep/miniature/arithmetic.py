"""Two-step word problems. A response shows both steps and the answer: `7 + 5 = 12. 12 - 3 = 9. #### 9`.

Systematic slip: in the template `change` (a third of the prompts) the subtraction is done as an addition.
"""

import random
import re
from typing import Any

from data_prep.miniature.slips import slips, slips_systematically

SOURCE = "arithmetic"
ASPECTS = {"answer": 0.5, "marked": 0.15, "true equations": 0.15, "right steps": 0.2}

NAMES = ("Ann", "Ben", "Eva", "Max", "Sam", "Tom")
THINGS = ("pens", "nuts", "cards", "coins", "eggs", "books")
TEMPLATES = {
    "change": "{name} has {x} {things}, finds {y} and loses {z}. How many are left?",  # x + y - z
    "bags": "{name} has {x} bags of {y} {things} and {z} more. How many in all?",  # x * y + z
    "times": "{name} had {x} {things} and lost {y}. {other} has {z} times the rest. How many?",  # (x - y) * z
}

# Digits are bounded so that int() never meets a number too long for it.
NUMBER = r"-?[0-9]{1,9}(?![0-9])"
EQUATION = re.compile(rf"(?<![0-9])({NUMBER}) ?([+*-]) ?({NUMBER}) ?= ?({NUMBER})")

Equation = tuple[int, str, int, int]  # left, operator, right, result


def apply(operator: str, left: int, right: int) -> int:
    """The value of `left operator right` for the operators +, - and *."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def draw(rng: random.Random) -> dict[str, Any]:
    """Draw one problem: {"source", "prompt", "template", "steps": two equations, "answer"}."""
    template = rng.choice(tuple(TEMPLATES))
    if template == "change":
        x, y = rng.randint(2, 12), rng.randint(2, 12)
        z = rng.randint(2, min(12, x + y - 1))
        first, second = "+", "-"
    elif template == "bags":
        x, y, z = rng.randint(2, 6), rng.randint(2, 6), rng.randint(2, 12)
        first, second = "*", "+"
    else:
        x = rng.randint(5, 12)
        y, z = rng.randint(2, x - 1), rng.randint(2, 3)
        first, second = "-", "*"
    name, other = rng.sample(NAMES, 2)
    middle = apply(first, x, y)
    answer = apply(second, middle, z)
    words = {"name": name, "other": other, "things": rng.choice(THINGS), "x": x, "y": y, "z": z}
    return {
        "source": SOURCE,
        "prompt": TEMPLATES[template].format(**words),
        "template": template,
        "steps": [[x, first, y, middle], [middle, second, z, answer]],
        "answer": answer,
    }


def demonstrate(truth: dict[str, Any], rng: random.Random, slip: float) -> str:
    """Solve the problem, with slips: wrong operator, wrong result, missing first step, missing `####`.

    What follows a slip is consistent with it, as in a person's working.
    """
    (left, first, right, _), (_, second, last, _) = truth["steps"]
    if slips(rng, slip, 0.3):
        first = rng.choice([operator for operator in "+-*" if operator != first])
    if truth["template"] == "change" and slips_systematically(rng, slip):
        second = "+"
    middle = _result(first, left, right, rng, slip)
    answer = _result(second, middle, last, rng, slip)
    text = f"{middle} {second} {last} = {answer}."
    if not slips(rng, slip, 0.3):
        text = f"{left} {first} {right} = {middle}. {text}"
    mark = "" if slips(rng, slip, 0.3) else "#### "
    return f"{text} {mark}{answer}"


def _result(operator: str, left: int, right: int, rng: random.Random, slip: float) -> int:
    """The value of one step, off by one or two with a slip."""
    error = rng.choice((-2, -1, 1, 2)) if slips(rng, slip, 0.3) else 0
    return apply(operator, left, right) + error


def equations(text: str) -> list[Equation]:
    """All equations `a + b = c` in a text, true or not."""
    return [(int(a), operator, int(b), int(c)) for a, operator, b, c in EQUATION.findall(text)]


def marked_answer(text: str) -> int | None:
    """The number after the only `####`, if it ends the text; else None."""
    parts = text.split("####")
    if len(parts) != 2 or not re.fullmatch(NUMBER, parts[1].strip()):
        return None
    return int(parts[1])


def aspects(truth: dict[str, Any], response: str) -> dict[str, float]:
    """answer: the marked answer, or else the last number, is right. marked: `#### number` ends the response.
    true equations: share of the written equations that hold. right steps: share of the steps that appear."""
    written = equations(response)
    answer = marked_answer(response)
    numbers = re.findall(rf"(?<![0-9]){NUMBER}", response)
    last = answer if answer is not None else int(numbers[-1]) if numbers else None
    return {
        "answer": float(last == truth["answer"]),
        "marked": float(answer is not None),
        "true equations": sum(apply(o, a, b) == c for a, o, b, c in written) / max(1, len(written)),
        "right steps": sum(tuple(step) in written for step in truth["steps"]) / len(truth["steps"]),
    }


def correct(truth: dict[str, Any], response: str) -> bool:
    """Exact match of the marked answer. A right number without its `####` does not count."""
    return marked_answer(response) == truth["answer"]
