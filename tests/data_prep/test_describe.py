"""The description of a file of rows."""

import dataclasses
import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import facts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from data_prep.describe import describe, label_entropy, quantiles, truncation
from data_prep.rows import Row

REWARDS = st.lists(st.sampled_from([1.0, 2.0, 6.5, 7.0, 7.5, 10.0]), min_size=2, max_size=8)


def row(rewards: list[float], name: str = "x") -> Row:
    texts = [" ".join(["word"] * (i + 1)) for i in range(len(rewards))]
    return Row(name, [{"role": "user", "content": "one two three"}], texts, rewards, "test")


@given(REWARDS, st.sampled_from([0.05, 0.3, 1.0, 10.0]), st.sampled_from([0.0, 0.01]))
def test_label_entropy(rewards: list[float], alpha: float, tie_break: float) -> None:
    """The entropy is -sum p log p of the softmax, computed here the plain way."""
    raised = numpy.array(rewards)
    raised[raised.argmax()] += tie_break
    p = numpy.exp((raised - raised.max()) / alpha)
    p /= p.sum()
    expected = -sum(value * math.log(value) for value in p if value > 0)
    assert label_entropy(rewards, alpha, tie_break) == pytest.approx(expected, abs=1e-12)


@given(REWARDS)
def test_label_entropy_at_small_alpha(rewards: list[float]) -> None:
    """At alpha = 0, and far below the gaps, it is the log of the number of tied best; a tie-break ends that."""
    tied = math.log(rewards.count(max(rewards)))
    assert label_entropy(rewards, 0.0) == pytest.approx(tied)
    assert label_entropy(rewards, 1e-4) == pytest.approx(tied)
    assert label_entropy(rewards, 1e-4, 0.01) == pytest.approx(0.0, abs=1e-12)


def test_tie_of_two_at_the_released_tie_break() -> None:
    """Two tied best at alpha = 0.01 with 0.01 added: p = e / (1 + e), entropy 0.582 nats."""
    assert label_entropy([7.0, 7.0, 1.0, 1.0], 0.01, 0.01) == pytest.approx(0.5822, abs=1e-4)


def test_counts() -> None:
    """Ties, K and rewards of three rows, by hand."""
    found = describe([row([3.0, 3.0], "a"), row([1.0, 2.0, 3.0], "b"), row([5.0, 1.0], "c")], [0.0])
    assert found["rows_by_K"] == {"2": 2, "3": 1}
    assert found["share_tied_best"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["responses_by_reward"] == {"1.0": 2, "2.0": 1, "3.0": 3, "5.0": 1}
    assert found["label_entropy"]["0.0"]["plain"] == pytest.approx(math.log(2) / 3, abs=1e-4)


def test_quantiles_are_values_that_occur() -> None:
    """Nearest-rank quantiles of 1 to 100."""
    assert quantiles(range(1, 101)) == {
        "mean": 50.5, "min": 1, "25%": 25, "50%": 50, "75%": 75, "95%": 95, "max": 100,
    }  # fmt: skip


def test_truncation() -> None:
    """Both rules on four rows: limits for each text, and the longest response of the row with its prompt.

    The last row reaches both limits, and so is too long by neither.
    """
    found = truncation([10, 3, 10, 8], [[5, 6], [2, 13], [1, 1], [5, 5]], max_prompt=8, max_response=5)
    assert found == {
        "prompts_too_long": 2,
        "responses_too_long": 2,
        "rows_with_any_too_long": 3,
        "rows_too_long_by_released_rule": 2,
    }


def test_command(command, write, tmp_path) -> None:
    """Text, figure and manifest are written; lengths count template, text and one EOS; the second run skips."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        chat_template="{% for m in messages %}[user] {{ m.content }} {% endfor %}[answer]",
    ).save_pretrained(tmp_path / "tokenizer")
    path, out = write("rows.jsonl", [dataclasses.asdict(row([3.0, 1.0, 2.0]))]), tmp_path / "out"
    run = ["data_prep.describe", path, "--out", out, "--tokenizer", tmp_path / "tokenizer", "--alphas", "0", "1"]
    done = command(*run, "--max-response-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert facts(out)["prompt_tokens"]["max"] == 5
    assert [facts(out)["response_tokens"][name] for name in ("min", "50%", "max")] == [2, 3, 4]
    assert facts(out)["truncation"]["responses_too_long"] == 1
    assert (out / "description.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "description.txt").read_text() == done.stdout
    assert "up to date" in command(*run, "--max-response-tokens", "3").stdout
