"""Lists under constraints that a program can check.

    List three fruits in capital letters, separated by dashes, with a dot at the end.
    APPLE-KIWI-PLUM.

Demonstrations keep alphabetical order, so that even a very small model can avoid repeats.
Systematic slip: where the longest list (four items, a third of the prompts) is asked, one item is missing.
"""

import random
import re
from typing import Any

from data_prep.miniature.slips import slips, slips_systematically

SOURCE = "instructions"
ASPECTS = {"count": 0.2, "category": 0.2, "case": 0.15, "separator": 0.15, "ending": 0.05, "no repeats": 0.1,
           "everything": 0.15}  # fmt: skip

COUNTS = {"two": 2, "three": 3, "four": 4}
CATEGORIES = {  # each in alphabetical order
    "fruits": ("apple", "fig", "grape", "kiwi", "lemon", "mango", "pear", "plum"),
    "animals": ("bear", "cat", "cow", "dog", "fox", "goat", "hen", "pig"),
    "colors": ("black", "blue", "brown", "gold", "gray", "green", "pink", "red"),
    "tools": ("axe", "drill", "file", "hammer", "pliers", "rake", "saw", "spade"),
    "drinks": ("beer", "cider", "cocoa", "juice", "milk", "tea", "water", "wine"),
    "clothes": ("belt", "cap", "coat", "dress", "hat", "scarf", "shirt", "sock"),
    "metals": ("brass", "bronze", "copper", "iron", "lead", "steel", "tin", "zinc"),
    "trees": ("ash", "beech", "birch", "cedar", "elm", "maple", "oak", "pine"),
}
CASES = {"capital letters": str.upper, "small letters": str.lower, "title case": str.title}
SEPARATORS = {"dashes": "-", "commas": ",", "slashes": "/", "stars": "*", "colons": ":", "plus signs": "+"}
ENDINGS = {"": "", ", with a dot at the end": ".", ", with a bang at the end": "!"}


def draw(rng: random.Random) -> dict[str, Any]:
    """Draw one task: {"source", "prompt", "count", "category", "case", "separator", "ending"}."""
    count, category, case = (rng.choice(tuple(options)) for options in (COUNTS, CATEGORIES, CASES))
    separator, ending = rng.choice(tuple(SEPARATORS)), rng.choice(tuple(ENDINGS))
    return {
        "source": SOURCE,
        "prompt": f"List {count} {category} in {case}, separated by {separator}{ending}.",
        "count": COUNTS[count],
        "category": category,
        "case": case,
        "separator": SEPARATORS[separator],
        "ending": ENDINGS[ending],
    }


def demonstrate(truth: dict[str, Any], rng: random.Random, slip: float) -> str:
    """Write the list, with slips: wrong count, case, separator or ending, an intruder, a repeat, "Sure!"."""
    count = truth["count"]
    if count == max(COUNTS.values()) and slips_systematically(rng, slip):
        count -= 1
    elif slips(rng, slip, 0.3):
        count += rng.choice((-1, 1))
    words = sorted(rng.sample(CATEGORIES[truth["category"]], count))
    if slips(rng, slip, 0.3):
        others = [name for name in CATEGORIES if name != truth["category"]]
        words[rng.randrange(count)] = rng.choice(CATEGORIES[rng.choice(others)])
    if slips(rng, slip, 0.2):
        words[-1] = words[0]
    case = rng.choice(tuple(CASES)) if slips(rng, slip, 0.3) else truth["case"]
    separator = rng.choice(tuple(SEPARATORS.values())) if slips(rng, slip, 0.3) else truth["separator"]
    ending = rng.choice(tuple(ENDINGS.values())) if slips(rng, slip, 0.3) else truth["ending"]
    opening = "Sure! " if slips(rng, slip, 0.2) else ""
    return opening + separator.join(CASES[case](word) for word in words) + ending


def aspects(truth: dict[str, Any], response: str) -> dict[str, float]:
    """category, case, separator: share of the words, or of the gaps between them, that are right.
    count, ending, no repeats: 0 or 1. everything: 1 if all others are 1 and nothing precedes the list."""
    words = re.findall(r"[^\W\d_]+", response)
    if not words:
        return dict.fromkeys(ASPECTS, 0.0)
    before, *gaps, after = (gap.strip() for gap in re.split(r"[^\W\d_]+", response))
    known = CATEGORIES[truth["category"]]
    in_case = CASES[truth["case"]]
    found = {
        "count": float(len(words) == truth["count"]),
        "category": sum(word.lower() in known for word in words) / len(words),
        "case": sum(word == in_case(word) for word in words) / len(words),
        "separator": sum(gap == truth["separator"] for gap in gaps) / max(1, len(gaps)),
        "ending": float(after == truth["ending"]),
        "no repeats": float(len({word.lower() for word in words}) == len(words)),
    }
    return {**found, "everything": float(not before and set(found.values()) == {1.0})}


def correct(truth: dict[str, Any], response: str) -> bool:
    """All constraints are met and the response holds nothing but the list."""
    return aspects(truth, response)["everything"] == 1.0
