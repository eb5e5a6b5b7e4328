"""Tiny Python functions, checked by running them.

    Write f(x): add 3, then square it.                  Write f(xs): the largest of the numbers above 4.
    def f(x):                                           def f(xs):
        x = x + 3                                           ys = [x for x in xs if x > 4]
        return x * x                                        return max(ys)

Systematic slip: `above n` and `below n` are written with >= and <=. Half of the draws say above or below;
where it changes the result (38 % of the draws; not for the largest number above n, say) the tests fail.
"""

import random
from typing import Any

from data_prep.miniature import safe_code
from data_prep.miniature.slips import slips, slips_systematically

SOURCE = "functions"
ASPECTS = {"parses": 0.15, "runs": 0.2, "tests": 0.25, "all tests": 0.4}

# Each entry: its words, its code, and what it means (the ground truth never runs code text).
# f(x): two different steps, with n from the range.
STEPS = {
    "add": ("add {n}", "x + {n}", lambda x, n: x + n, range(2, 13)),
    "subtract": ("subtract {n}", "x - {n}", lambda x, n: x - n, range(2, 13)),
    "multiply": ("multiply by {n}", "x * {n}", lambda x, n: x * n, range(2, 7)),
    "square": ("square it", "x * x", lambda x, n: x**2, (2,)),  # here and below n is used only by a slip
    "negate": ("negate it", "-x", lambda x, n: -x, (2,)),
}
MISTAKEN = {
    "add": "subtract",
    "subtract": "add",
    "multiply": "add",
    "square": "multiply",
    "negate": "subtract",
}

# f(xs): take something of a map of the numbers that pass a filter.
FILTERS = {
    "above": ("numbers above {n}", "x > {n}", lambda x, n: x > n, range(2, 21)),
    "below": ("numbers below {n}", "x < {n}", lambda x, n: x < n, range(2, 21)),
    "multiples": ("multiples of {n}", "x % {n} == 0", lambda x, n: x % n == 0, range(2, 7)),
}
MAPS = {
    "same": ("", "x", lambda x: x),
    "squares": ("squares of the ", "x * x", lambda x: x**2),
    "doubles": ("doubles of the ", "x + x", lambda x: 2 * x),
    "negatives": ("negatives of the ", "-x", lambda x: -x),
}
TAKES = {
    "largest": ("max(ys)", max),
    "smallest": ("min(ys)", min),
    "sum": ("sum(ys)", sum),
    "count": ("len(ys)", len),
}

NUMBER_INPUTS = (-3, 0, 2, 5, 11)
# Added to n. Every list has n itself, so that > and >= differ, and something that passes each filter.
LIST_OFFSETS = ((-4, 3, 0, 7, -1), (1, 0, -2, 5, 12), (0, -6, 2, 2, -3), (9, -1, 0, 1, -8))


def draw(rng: random.Random) -> dict[str, Any]:
    """Draw one task: {"source", "prompt", "argument", "plan", "tests": [[input, expected], ...]}."""
    argument, plan, words = _draw_list_plan(rng) if rng.random() < 0.6 else _draw_number_plan(rng)
    if argument == "xs":
        inputs: list[Any] = [[plan["n"] + offset for offset in offsets] for offsets in LIST_OFFSETS]
    else:
        inputs = list(NUMBER_INPUTS)
    tests = [[item, evaluate(plan, item)] for item in inputs]
    prompt = f"Write f({argument}): {words}."
    return {"source": SOURCE, "prompt": prompt, "argument": argument, "plan": plan, "tests": tests}


def _draw_number_plan(rng: random.Random) -> tuple[str, dict[str, Any], str]:
    steps = [[name, rng.choice(STEPS[name][3])] for name in rng.sample(tuple(STEPS), 2)]
    return "x", {"steps": steps}, ", then ".join(STEPS[name][0].format(n=n) for name, n in steps)


def _draw_list_plan(rng: random.Random) -> tuple[str, dict[str, Any], str]:
    take, kept = rng.choice(tuple(TAKES)), rng.choices(tuple(FILTERS), (5, 5, 2))[0]
    mapped = "same" if take == "count" else rng.choice(tuple(MAPS))
    n = rng.choice(FILTERS[kept][3])
    words = f"the {take} of the {MAPS[mapped][0]}{FILTERS[kept][0].format(n=n)}"
    return "xs", {"take": take, "map": mapped, "filter": kept, "n": n}, words


def evaluate(plan: dict[str, Any], item: Any) -> int:
    """What the function should return for `item`, computed from the plan."""
    if "steps" in plan:
        for name, n in plan["steps"]:
            item = STEPS[name][2](item, n)
        return item
    passes, change, take = FILTERS[plan["filter"]][2], MAPS[plan["map"]][2], TAKES[plan["take"]][1]
    return take([change(x) for x in item if passes(x, plan["n"])])


def demonstrate(truth: dict[str, Any], rng: random.Random, slip: float) -> str:
    """Write the function, with slips: wrong or swapped operations, wrong number, no `return`, no colon."""
    write = _list_lines if truth["argument"] == "xs" else _number_lines
    line, value = write(truth["plan"], rng, slip)
    colon = "" if slips(rng, slip, 0.2) else ":"
    keyword = "" if slips(rng, slip, 0.3) else "return "
    return f"def f({truth['argument']}){colon}\n    {line}\n    {keyword}{value}"


def _number_lines(plan: dict[str, Any], rng: random.Random, slip: float) -> tuple[str, str]:
    codes = []
    for name, n in plan["steps"]:
        name = MISTAKEN[name] if slips(rng, slip, 0.2) else name
        n += rng.choice((-1, 1)) if slips(rng, slip, 0.2) else 0
        codes.append(STEPS[name][1].format(n=n))
    if slips(rng, slip, 0.3):
        codes.reverse()
    return f"x = {codes[0]}", codes[1]


def _list_lines(plan: dict[str, Any], rng: random.Random, slip: float) -> tuple[str, str]:
    condition = FILTERS[plan["filter"]][1]
    if plan["filter"] != "multiples" and slips_systematically(rng, slip):
        condition = condition.replace(" {n}", "= {n}")
    if slips(rng, slip, 0.2):
        condition = condition.translate(str.maketrans("<>", "><"))
    n = plan["n"] + (rng.choice((-1, 1)) if slips(rng, slip, 0.2) else 0)
    mapped = "same" if slips(rng, slip, 0.2) else plan["map"]
    take = rng.choice(tuple(TAKES)) if slips(rng, slip, 0.3) else plan["take"]
    return f"ys = [{MAPS[mapped][1]} for x in xs if {condition.format(n=n)}]", TAKES[take][0]


def aspects(truth: dict[str, Any], response: str) -> dict[str, float]:
    """parses: it is Python. runs: f is within the grammar of safe_code and returns a number for every input.
    tests: share of the tests passed. all tests: 1 if all pass."""
    tree = safe_code.parse(response)
    if tree is None:
        return dict.fromkeys(ASPECTS, 0.0)
    values = safe_code.run(tree, truth["argument"], [item for item, _ in truth["tests"]])
    passed = [value == expected for value, (_, expected) in zip(values, truth["tests"], strict=True)]
    return {
        "parses": 1.0,
        "runs": float(None not in values),
        "tests": sum(passed) / len(passed),
        "all tests": float(all(passed)),
    }


def correct(truth: dict[str, Any], response: str) -> bool:
    """All tests pass."""
    return aspects(truth, response)["all tests"] == 1.0
