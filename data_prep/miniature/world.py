"""The three families as one world: scores, splits and the files of prompts and demonstrations."""

import itertools
import random
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_prep.files import InputError, sha256_text, write_jsonl
from data_prep.manifest import plan, up_to_date, write_manifest
from data_prep.miniature import arithmetic, functions, instructions
from data_prep.miniature.slips import DEFAULT_SLIP

FAMILIES = {family.SOURCE: family for family in (arithmetic, functions, instructions)}
# Arithmetic is the hardest to learn, so half of the demonstrations show it.
DEMONSTRATION_CYCLE = (arithmetic, functions, arithmetic, instructions)

DEMONSTRATIONS_FILE = "demonstrations.jsonl"
SPLITS = ("train", "heldout", "test")


def score(truth: Mapping[str, Any], response: str) -> float:
    """The explicit reward of a response: 1 + 9 * its weighted aspects, from 1 to 10. Takes any string."""
    family = FAMILIES[truth["source"]]
    found = family.aspects(truth, response)
    return round(1 + 9 * sum(weight * found[name] for name, weight in family.ASPECTS.items()), 6)


def correct(truth: Mapping[str, Any], response: str) -> bool:
    """Whether a response meets its task's exact criterion. Takes any string."""
    return FAMILIES[truth["source"]].correct(truth, response)


def split_of(prompt_text: str) -> str:
    """The split of a prompt, for every seed: 'heldout' (10 %), 'test' (20 %) or 'train', by its SHA-256."""
    tenth = int(sha256_text(prompt_text), 16) % 10
    return "heldout" if tenth == 0 else "test" if tenth <= 2 else "train"


def demonstrations(seed: int, count: int, slip: float = DEFAULT_SLIP) -> Iterator[dict[str, Any]]:
    """Yield `count` imperfect demonstrations on prompts of the train split, in the mix 2 : 1 : 1."""
    rng = random.Random(f"{seed}/demonstrations")
    for index, family in enumerate(itertools.islice(itertools.cycle(DEMONSTRATION_CYCLE), count)):
        truth = _draw_from(family, "train", rng)
        yield {
            "id": f"demonstration-{index:05}",
            "prompt": [{"role": "user", "content": truth["prompt"]}],
            "response": family.demonstrate(truth, rng, slip),
            "source": family.SOURCE,
        }


def prompts(seed: int, split: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield `count` prompts of a split with their truths, a third from each family.

    Prompts for measurement (heldout, test) are distinct; train prompts may repeat. Raises InputError where
    a family has too few distinct prompts.
    """
    for source, family in FAMILIES.items():
        rng = random.Random(f"{seed}/{split}/{source}")
        seen: set[str] = set()
        for index in range(count // len(FAMILIES)):
            truth = _draw_from(family, split, rng, seen if split != "train" else ())
            seen.add(truth["prompt"])
            yield {
                "id": f"{split}-{source}-{index:04}",
                "prompt": [{"role": "user", "content": truth["prompt"]}],
                "source": source,
                "truth": truth,
            }


def _draw_from(family: Any, split: str, rng: random.Random, seen: Collection[str] = ()) -> dict[str, Any]:
    """Draw until the prompt belongs to `split` and is not in `seen`."""
    for _ in range(20_000):
        truth = family.draw(rng)
        if split_of(truth["prompt"]) == split and truth["prompt"] not in seen:
            return truth
    raise InputError(f"only {len(seen)} distinct {split} prompts found for {family.SOURCE}; ask for fewer")


def build(
    out: Path | str,
    seed: int = 0,
    *,
    n_demonstrations: int = 38400,
    n_train: int = 768,
    n_heldout: int = 240,
    n_test: int = 300,
) -> bool:
    """Write demonstrations.jsonl, prompts-{train,heldout,test}.jsonl and manifest.json into `out`.

    The same seed and sizes give the same bytes. Returns False, with nothing done, if they are already there.
    Raises InputError for sizes that cannot be split evenly between the families.
    """
    out = Path(out)
    sizes = dict(zip(SPLITS, (n_train, n_heldout, n_test), strict=True))
    counts = {"demonstrations": n_demonstrations, **sizes}
    for name, count in counts.items():
        parts = len(DEMONSTRATION_CYCLE if name == "demonstrations" else FAMILIES)
        if count <= 0 or count % parts:
            raise InputError(f"--{name} {count}: must be a positive multiple of {parts}")
    planned = plan("data_prep.miniature.__main__", {"seed": seed, "slip": DEFAULT_SLIP, **counts}, {})
    if up_to_date(out, planned):
        return False

    written = {"demonstrations": write_jsonl(out / DEMONSTRATIONS_FILE, demonstrations(seed, n_demonstrations))}
    for split, size in sizes.items():
        written[split] = write_jsonl(out / f"prompts-{split}.jsonl", prompts(seed, split, size))
    files = [DEMONSTRATIONS_FILE, *(f"prompts-{split}.jsonl" for split in SPLITS)]
    write_manifest(out, planned, outputs=files, facts=written)
    return True
