"""The alpaca_eval package behind our judge: annotations, and the length-controlled win rate.

Templates, the order of the two answers (by a hash of the instruction), parsing and metrics are the package's. It is
kept from the network, from keys in .env files, and from writing into its own folder.
"""

import ast
import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pandas
from tqdm import tqdm

from data_prep.files import InputError
from eval.judge import Reply, Request

PROBES = 3  # requests that show whether a judge gives log-probs
REFITS = 200  # resamples for the interval of the length-controlled win rate, each with a new fit
RANKING, WEIGHTED = "alpaca_eval_gpt4", "weighted_alpaca_eval_gpt4_turbo"  # the package's annotators
GAMED = ["index", "preference", "std_delta_len", "instruction_difficulty", "not_gamed_baseline", "model"]
Ask = Callable[[list[Request], Callable[[Any], Any]], dict[str, Reply]]


class NoLogprobs(Exception):
    """The judge gives none, so the weighted annotator cannot be used."""


class _AllMissing(Exception):
    """Not one judgement came."""


def annotate(pairs: list[dict[str, Any]], annotator: str, ask: Ask, probe: bool = True) -> list[dict[str, Any]]:
    """Judgements {id, index, preference, judge, reply} of the package's annotator, with `ask` in place of its client.

    preference: from 1 (the reference wins) to 2 (ours); equal answers are a draw, 1.5, without a call; None where
    missing. NoLogprobs if the annotator weighs by log-probs and the judge gives none.
    """
    package = _package()
    kept = ["{annotation_key}_judge", "{annotation_key}_reply"]
    with _quiet():
        pool = package.annotators.PairwiseAnnotator(
            annotators_config=annotator, caching_path=None, other_output_keys_to_keep=kept
        )
        single = pool.annotators[annotator]

        def rating(reply: Any) -> Any:
            """The package's own reading, or None; a ranking that contradicts itself is none."""
            completion = _completion(reply) if isinstance(reply, Reply) else reply
            try:
                (value,) = single.fn_completion_parser(completion)
            except Exception:  # the parsers raise whatever the text makes them raise
                return None
            sound = isinstance(reply, Reply) or _consistent(reply)
            return value if sound and value == value else None

        def complete(prompts: list[str], max_tokens: int, temperature: float, **options: Any) -> dict[str, list]:
            top = options.get("top_logprobs", 0)
            requests = [
                Request(
                    str(place), package.utils.prompt_to_chatml(prompt.strip()), max_tokens, temperature, logprobs=top
                )
                for place, prompt in enumerate(prompts)
            ]
            if top and probe:
                _probe(requests[:PROBES], ask, rating)
            replies = ask(requests, rating)
            found = [replies.get(request.id) for request in requests]
            if not any(found):
                raise _AllMissing  # the package cannot do with an empty table
            return {
                single.completion_key: [
                    (_completion(reply) if top else reply.text) if reply else "" for reply in found
                ],
                "judge": [reply.model if reply else "" for reply in found],
                "reply": [reply.text if reply else "" for reply in found],
            }

        single.fn_completions = complete
        try:
            rows = pool(pandas.DataFrame(pairs), chunksize=None)
        except _AllMissing:
            rows = pairs
    judgements = []
    for row in rows:
        preference = row.get("preference")
        missing = preference is None or preference != preference
        judgements.append({
            "id": row["id"], "index": int(row["index"]), "preference": None if missing else float(preference),
            "judge": _text(row.get("preference_judge")), "reply": _text(row.get("preference_reply")),
        })  # fmt: skip
    place = {pair["id"]: number for number, pair in enumerate(pairs)}
    return sorted(judgements, key=lambda judgement: place[judgement["id"]])


def length_controlled(judged: list[dict[str, Any]], gamed: Path, refits: int = REFITS) -> tuple[float, float, float]:
    """The package's length-controlled win rate of {index, output_1, output_2, preference}, as a share, with a 95 %
    bootstrap interval over instructions (the model is fitted again to each resample).

    gamed: df_gamed.csv of the dataset tatsu-lab/alpaca_eval, which holds the difficulty of each instruction by its
    index in the evaluation set, so all of it must be judged. InputError if it is not.
    """
    table = pandas.DataFrame(judged)[["index", "output_1", "output_2", "preference"]]
    try:
        known = set(pandas.read_csv(gamed, usecols=GAMED)["index"])
    except ValueError as error:
        raise InputError(f"{gamed}: not df_gamed.csv of tatsu-lab/alpaca_eval ({error})") from None
    if set(table["index"]) != known:
        raise InputError(f"{gamed}: has the difficulty of {len(known)} instructions, {len(table)} others are judged; "
                         "the length-controlled win rate needs all of the evaluation set, in its order")  # fmt: skip
    table = table.assign(generator_1="reference", generator_2="policy", annotator=WEIGHTED)
    draws = numpy.random.default_rng(0).integers(len(table), size=(refits, len(table)))
    value = _length_controlled(table, gamed)
    values = [_length_controlled(table.iloc[draw], gamed) for draw in tqdm(draws, desc="length control", unit="fit")]
    low, high = numpy.quantile(values, [0.025, 0.975])
    return value, min(float(low), value), max(float(high), value)


def _length_controlled(table: pandas.DataFrame, gamed: Path) -> float:
    module = _package().metrics.glm_winrate
    download = module.hf_hub_download
    module.hf_hub_download = lambda **_: str(gamed)  # it has no argument for a file that is here already
    try:
        with _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scikit-learn, on what is to change in later versions
            found = module.get_length_controlled_winrate(
                table.reset_index(drop=True), save_weights_dir=None, is_add_glm_preference_inplace=False
            )
    finally:
        module.hf_hub_download = download
    return float(found["length_controlled_winrate"]) / 100


def _probe(requests: list[Request], ask: Ask, rating: Callable[[Any], Any]) -> None:
    """NoLogprobs unless a reply to one of these has log-probs. It is kept, so asking costs nothing extra."""
    seen: list[bool] = []

    def look(reply: Reply) -> Any:
        seen.append(reply.top_logprobs is not None)
        return rating(reply) or (reply.text.strip() in ("m", "M") or None)

    for request in requests:
        ask([request], look)
        if seen:
            break
    if not any(seen):
        raise NoLogprobs


def _completion(reply: Reply) -> dict[str, Any]:
    """A reply in the layout that the package's log-prob parser reads."""
    if reply.top_logprobs is None:
        return {}
    return {"logprobs": {"content": [{"top_logprobs": top} for top in reply.top_logprobs]}}


def _consistent(text: str) -> bool:
    """Whether a ranking gives each model one rank and each rank to one model: of two ratings none is the judge's."""
    try:
        entries = [(entry["model"], entry["rank"]) for entry in ast.literal_eval(text)]
        return len(entries) == len({model for model, _ in entries}) == len({rank for _, rank in entries})
    except Exception:
        return False


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""  # pandas puts NaN where a row has none


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's log: it prints whole replies at every failed parse."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@functools.cache
def _package() -> Any:
    """alpaca_eval, imported without its side effects: it reads keys from any .env above it and turns on logging."""
    os.environ["PYTHON_DOTENV_DISABLED"] = "1"
    level = logging.root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses pkg_resources, for which requirements.txt holds setuptools back
        import alpaca_eval.metrics.glm_winrate
    logging.root.setLevel(level)
    return alpaca_eval
