"""The cache of log mu(y|x): right values, keyed by content, never trusted blindly."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from data_prep.files import InputError, read_jsonl, write_jsonl
from data_prep.rows import Row
from train.engine import reference
from train.engine.models import Checkpoint
from train.engine.reference import ReferenceCache, response_key
from train.engine.tokens import EncodedRow, Encoder


@pytest.fixture(scope="module")
def model(mu: Path) -> nn.Module:
    return Checkpoint(str(mu)).load()[0]


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast, make_rows: Callable[..., list[Row]]) -> list[EncodedRow]:
    return Encoder(tokenizer, 64, 24).rows(make_rows(6, seed=7, ks=(4,)))


@pytest.fixture
def filled(mu: Path, model: nn.Module, rows: list[EncodedRow], tmp_path: Path) -> Path:
    """A directory with the cache of all responses of `rows`."""
    ReferenceCache(tmp_path, Checkpoint(str(mu))).logps(model, rows, 4)
    return tmp_path


def subset(row: EncodedRow, name: str, *indices: int) -> EncodedRow:
    return EncodedRow(name, row.prompt_ids, [row.response_ids[i] for i in indices], [row.rewards[i] for i in indices])


def test_values_are_the_log_probs_of_the_model(
    mu: Path, model: nn.Module, rows: list[EncodedRow], filled: Path,
    plain_logps: Callable[[nn.Module, list[int], list[int]], Tensor],
) -> None:  # fmt: skip
    """What comes out of the file again equals one plain forward pass for each response."""
    found = ReferenceCache(filled, Checkpoint(str(mu))).logps(model, rows, 2)
    assert list(found) == [row.id for row in rows]
    with torch.no_grad():
        for row in rows:
            expected = [plain_logps(model, row.prompt_ids, ids).item() for ids in row.response_ids]
            assert found[row.id] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_subsets_of_k_are_found_by_content(mu: Path, model: nn.Module, rows: list[EncodedRow], filled: Path) -> None:
    """A pair made of a K = 4 row, under another id and in another order, is read and not computed again."""
    (path,) = filled.glob("*.jsonl")
    # Shifts within the tolerance, to tell a value that was read from one that was computed.
    lines = [{**line, "logps": line["logps"] + 3e-4} for _, line in read_jsonl(path)]
    write_jsonl(path, lines)
    before = path.read_bytes()
    cache = ReferenceCache(filled, Checkpoint(str(mu)))
    shifted = {line["key"]: line["logps"] for line in lines}
    pairs = [subset(row, f"pair-{i}", 3, 1) for i, row in enumerate(rows)]
    for name, values in cache.logps(model, pairs, 4).items():
        pair = next(pair for pair in pairs if pair.id == name)
        assert values == [shifted[response_key(pair.prompt_ids, ids)] for ids in pair.response_ids]
    assert path.read_bytes() == before


def test_new_responses_are_added_beside_the_known_ones(
    mu: Path, model: nn.Module, rows: list[EncodedRow], tmp_path: Path
) -> None:
    """A cache of pairs grows to K = 4; the file holds each response once."""
    checkpoint = Checkpoint(str(mu))
    pairs = ReferenceCache(tmp_path, checkpoint).logps(model, [subset(row, row.id, 0, 2) for row in rows], 4)
    full = ReferenceCache(tmp_path, checkpoint).logps(model, rows, 4)
    direct = ReferenceCache(tmp_path / "other", checkpoint).logps(model, rows, 4)
    for row in rows:
        assert full[row.id] == pytest.approx(direct[row.id], abs=1e-4)
        assert [full[row.id][i] for i in (0, 2)] == pytest.approx(pairs[row.id], abs=1e-4)
    keys = [line["key"] for path in tmp_path.glob("*.jsonl") for _, line in read_jsonl(path)]
    assert len(keys) == len(set(keys)) == len({tuple([*row.prompt_ids, -1, *ids]) for row in rows
                                               for ids in row.response_ids})  # fmt: skip


def test_the_key_is_the_content() -> None:
    """Prompt and response both count, and so does where one ends and the other begins."""
    assert response_key([1, 2], [3, 4]) == response_key([1, 2], [3, 4])
    others = [response_key(*pair) for pair in (([1, 2], [3, 5]), ([1], [2, 3, 4]), ([1, 2, 3], [4]), ([12], [3, 4]))]
    assert len({response_key([1, 2], [3, 4]), *others}) == 5


def test_another_model_or_template_has_another_file(mu: Path, make_mu: Callable[..., Path], tmp_path: Path) -> None:
    """Weights, template and dtype are in the name of the file; the place of the model is not."""
    same = make_mu(tmp_path / "same", 1)
    other = make_mu(tmp_path / "other", 2)
    retold = make_mu(tmp_path / "retold", 1)
    template = retold / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|assistant|>", "<|user|>"))

    def name(path: Path, dtype: str = "float32") -> str:
        return ReferenceCache(tmp_path, Checkpoint(str(path)), dtype).path.name

    assert name(same) == name(mu)
    assert len({name(mu), name(other), name(retold), name(mu, "bfloat16")}) == 4


@pytest.mark.parametrize(
    "line", ["{", '{"key": "a"}', '{"key": "a", "logps": null}', '{"key": "a", "logps": "x"}', "[1]"]
)
def test_a_damaged_line_is_refused(mu: Path, filled: Path, line: str) -> None:
    """A line that cannot be read is named by file and number."""
    (path,) = filled.glob("*.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(InputError, match=rf"{path.name}:3: ") as refused:
        ReferenceCache(filled, Checkpoint(str(mu)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shift", [0.05, float("nan")])
def test_an_altered_value_is_refused(
    mu: Path, model: nn.Module, rows: list[EncodedRow], filled: Path, shift: float
) -> None:
    """A sample is computed again before the file is trusted: a value off by 0.05 nats names its row."""
    (path,) = filled.glob("*.jsonl")
    lines = [line for _, line in read_jsonl(path)]
    key = response_key(rows[2].prompt_ids, rows[2].response_ids[1])
    altered = next(line for line in lines if line["key"] == key)
    altered["logps"] += shift
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=f"{rows[2].id!r}.*delete the file"):
        ReferenceCache(filled, Checkpoint(str(mu))).logps(model, rows, 4)


def test_a_file_of_another_model_is_refused(
    mu: Path, make_mu: Callable[..., Path], rows: list[EncodedRow], filled: Path, tmp_path: Path
) -> None:
    """Renamed to fit, the values of another model do not pass the check of the sample."""
    other = Checkpoint(str(make_mu(tmp_path / "other", 2)))
    cache = ReferenceCache(filled, Checkpoint(str(mu)))
    cache.path.rename(ReferenceCache(filled, other).path)
    with pytest.raises(InputError, match="the model gives"):
        ReferenceCache(filled, other).logps(other.load()[0], rows, 4)


def test_the_command_fills_the_cache_that_a_run_reads(
    mu: Path, files: dict[str, Path], align_run: Callable[..., Path], finished: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """`python -m train.engine.reference` beforehand: the run adds nothing, and its policy is the same."""
    shared = tmp_path / "shared"
    words = ["reference", "--model", mu, "--rows", files["rows"], "--eval-rows", files["heldout"], "--cache", shared]
    monkeypatch.setattr(sys, "argv", [str(word) for word in [*words, "--recipe", files["recipe"]]])
    reference.main()
    (path,) = shared.glob("*.jsonl")
    before = path.read_bytes()
    assert f"{len(before.splitlines())} reference log-probs in {path}" in capsys.readouterr().out
    out = align_run(tmp_path / "run", "--reference-cache", shared)
    assert path.read_bytes() == before
    assert not (out / "reference").exists()
    weights = "policy/model.safetensors"
    assert (out / weights).read_bytes() == (finished / weights).read_bytes()
