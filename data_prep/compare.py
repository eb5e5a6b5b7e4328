"""How far two sets of rows agree: python -m data_prep.compare A B

A and B are files of rows. Prompts are matched by their text, responses of a prompt by theirs; rows with the same
prompt are taken together. Printed as JSON:

prompts     in_both, only_in_a, only_in_b
responses   of the prompts in both: in_both, only_in_a, only_in_b (a text counts once for each prompt)
scores      of the responses in both: equal, different
orders      of all pairs of responses in both: same, reversed, tied_only_in_a, tied_only_in_b, tied_in_both
best        of the prompts in both: same_best (the texts with the highest reward, ties included), different_best
"""

import argparse
import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from data_prep.files import run_command, to_json
from data_prep.rows import Row, read_rows

# Scores are halves or means of a few ratings; a difference below this is rounding.
TOLERANCE = 1e-6


def by_prompt(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """{prompt: {response: reward}}; of a text that stands twice in a prompt the highest reward counts."""
    prompts: dict[str, dict[str, float]] = {}
    for row in rows:
        scores = prompts.setdefault(to_json(row.prompt), {})
        for text, reward in zip(row.responses, row.rewards, strict=True):
            scores[text] = max(reward, scores.get(text, reward))
    return prompts


def sign(difference: float) -> int:
    """-1, 0 or 1; 0 within TOLERANCE."""
    return 0 if abs(difference) <= TOLERANCE else (1 if difference > 0 else -1)


def compare(a: Iterable[Row], b: Iterable[Row]) -> dict[str, dict[str, int]]:
    """The counts described above."""
    a_prompts, b_prompts = by_prompt(a), by_prompt(b)
    responses, scores, orders, best = Counter(), Counter(), Counter(), Counter()
    for prompt in a_prompts.keys() & b_prompts.keys():
        in_a, in_b = a_prompts[prompt], b_prompts[prompt]
        both = sorted(in_a.keys() & in_b.keys())
        responses += Counter(in_both=len(both), only_in_a=len(in_a) - len(both), only_in_b=len(in_b) - len(both))
        scores.update("different" if sign(in_a[text] - in_b[text]) else "equal" for text in both)
        for one, two in itertools.combinations(both, 2):
            orders[_order(sign(in_a[one] - in_a[two]), sign(in_b[one] - in_b[two]))] += 1
        same = _best(in_a) == _best(in_b)
        best["same_best" if same else "different_best"] += 1
    common = len(a_prompts.keys() & b_prompts.keys())
    return {
        "prompts": {
            "in_both": common,
            "only_in_a": len(a_prompts) - common,
            "only_in_b": len(b_prompts) - common,
        },
        "responses": dict(sorted(responses.items())),
        "scores": dict(sorted(scores.items())),
        "orders": dict(sorted(orders.items())),
        "best": dict(sorted(best.items())),
    }


def _order(in_a: int, in_b: int) -> str:
    if in_a == in_b:
        return "same" if in_a else "tied_in_both"
    if not in_a:
        return "tied_only_in_a"
    return "reversed" if in_b else "tied_only_in_b"


def _best(scores: dict[str, float]) -> set[str]:
    highest = max(scores.values())
    return {text for text, score in scores.items() if highest - score <= TOLERANCE}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("a", type=Path, metavar="A", help="rows, .jsonl or .parquet")
    parser.add_argument("b", type=Path, metavar="B", help="rows, .jsonl or .parquet")
    options = parser.parse_args()
    print(to_json(compare(read_rows(options.a), read_rows(options.b)), indent=1))


if __name__ == "__main__":
    run_command(main)
