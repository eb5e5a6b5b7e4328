"""Records in the layouts of the public sets, and what a build left behind."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def completion(response: Any, score: Any, ratings: Sequence[Any] = ("3", "3", "3", "3")) -> dict[str, Any]:
    """One completion in UltraFeedback's own layout."""
    return {
        "model": "m",
        "response": response,
        "overall_score": score,
        "annotations": {aspect: {"Rating": r} for aspect, r in zip(ASPECTS, ratings, strict=True)},
    }


def original(prompt: str, scored: Sequence[tuple[Any, Any]], source: str = "sharegpt", **extra: Any) -> dict[str, Any]:
    """One record in UltraFeedback's own layout, from (response, score) pairs."""
    completions = [completion(response, score) for response, score in scored]
    return {"source": source, "instruction": prompt, "completions": completions, **extra}


def chat(prompt: str, response: str) -> list[dict[str, str]]:
    """A conversation of two messages, as the released sets store it."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def released_pair(prompt: str, chosen: tuple[str, Any], rejected: tuple[str, Any]) -> dict[str, Any]:
    """One record of the released preference set, from (response, score) pairs."""
    return {
        "prompt": prompt,
        "chosen": chat(prompt, chosen[0]),
        "rejected": chat(prompt, rejected[0]),
        "score_chosen": chosen[1],
        "score_rejected": rejected[1],
    }


def released_reward(prompt: str, scored: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """One record of the released reward set, by falling score as its authors sorted it."""
    record: dict[str, Any] = {"prompt": prompt}
    for i, (response, score) in enumerate(sorted(scored, key=lambda pair: pair[1], reverse=True)):
        record |= {f"A{i}": chat(prompt, response), f"score_A{i}": score}
    return record


def generated(count: int, seed: int = 0, words: int = 30) -> list[dict[str, Any]]:
    """Records in UltraFeedback's layout with different prompts and four responses of about `words` words."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(2000)]

    def text() -> str:
        return " ".join(rng.choices(vocabulary, k=1 + int(rng.expovariate(1 / words))))

    scores = (1, 2, 3, 4, 5, 6, 6.5, 7, 7.5, 8, 8.5, 9)
    return [
        original(f"{i} {text()}", [(text(), rng.choice(scores)) for _ in range(4)], critique=text())
        for i in range(count)
    ]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file, without the project's own reader."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def facts(directory: Path) -> dict[str, Any]:
    """The facts in a directory's manifest."""
    return json.loads((directory / "manifest.json").read_text(encoding="utf-8"))["identity"]["facts"]
