"""Loading and saving: pinned revisions, safetensors only, no dropout, exact round trips, one-line errors."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from data_prep.files import InputError
from train.engine.models import Checkpoint, new_mistral
from train.engine.rundir import save_policy

IDS = torch.tensor([[1, 20, 30, 40, 50]])


@pytest.fixture
def copy(make_mu: Callable[[Path, int], Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return make_mu(tmp_path / "copy", 3)


def test_a_hub_id_needs_a_revision(tmp_path: Path) -> None:
    """A name that is no directory is a Hub id, whose weights may change: its commit must be given."""
    for name in ("mistralai/Mistral-7B-v0.1", str(tmp_path / "none")):
        with pytest.raises(InputError, match=f"{name}: no such directory; .*--model-revision"):
            Checkpoint(name)
    assert not Checkpoint("mistralai/Mistral-7B-v0.1", "26bca36").is_local


def test_the_digest_is_the_content(mu: Path, copy: Path, make_mu: Callable[[Path, int], Path], tmp_path: Path) -> None:
    """Of a directory, all its files and not its name; of a Hub model, its name and commit."""
    assert Checkpoint(str(make_mu(tmp_path / "elsewhere", 1))).digest == Checkpoint(str(mu)).digest
    assert Checkpoint(str(copy)).digest != Checkpoint(str(mu)).digest
    before = Checkpoint(str(copy)).digest
    (copy / "chat_template.jinja").write_text("another template")
    assert Checkpoint(str(copy)).digest != before
    assert len({Checkpoint("a/b", "1").digest, Checkpoint("a/b", "2").digest, Checkpoint("a/c", "1").digest}) == 3


def test_a_save_and_load_round_trip_is_exact(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The same logits to the last bit, the same ids and the same template."""
    model = new_mistral(tokenizer, hidden=32, layers=2, heads=4, kv_heads=2, feed_forward=64, positions=128, seed=5)
    save_policy(tmp_path / "policy", model, tokenizer)
    loaded, reloaded = Checkpoint(str(tmp_path / "policy")).load()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    messages = [{"role": "user", "content": " odd — text\n"}]
    assert reloaded.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    assert (reloaded.eos_token_id, reloaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]  # nothing unfinished stays behind


def test_a_new_model_follows_from_its_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    """The same seed gives the same weights; embeddings are tied; queries are grouped."""
    shape = {"hidden": 32, "layers": 1, "heads": 4, "kv_heads": 2, "feed_forward": 64, "positions": 64}
    first, again, other = (new_mistral(tokenizer, **shape, seed=seed) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert first.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)


def test_dropout_is_off_whatever_the_checkpoint_asks_for(mu: Path) -> None:
    """A checkpoint with attention_dropout 0.1 is loaded with 0: two forward passes in training mode are equal."""
    assert json.loads((mu / "config.json").read_text())["attention_dropout"] == 0.1
    live = AutoModelForCausalLM.from_pretrained(mu).train()
    assert not torch.equal(live(IDS).logits, live(IDS).logits)  # so the checkpoint's dropout is real
    model = Checkpoint(str(mu)).load()[0].train()
    assert model.config.attention_dropout == 0.0
    assert torch.equal(model(IDS).logits, model(IDS).logits)


def test_pickled_weights_are_not_read(copy: Path) -> None:
    """A pytorch_model.bin can run code when it is read; only safetensors count."""
    weights = copy / "model.safetensors"
    torch.save(Checkpoint(str(copy)).load()[0].state_dict(), copy / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(InputError, match="cannot be loaded"):
        Checkpoint(str(copy)).load()


def damage(path: Path, name: str) -> None:
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("what", ["everything", "config.json", "tokenizer.json", "model.safetensors"])
def test_an_unreadable_checkpoint_is_one_line(copy: Path, what: str) -> None:
    """An empty directory, or one with a truncated file, is named in one line."""
    if what == "everything":
        for path in copy.iterdir():
            path.unlink()
    else:
        damage(copy, what)
    with pytest.raises(InputError, match=f"{copy}: cannot be loaded") as refused:
        Checkpoint(str(copy)).load()
    assert "\n" not in str(refused.value)
