"""LoRA and QLoRA on Mistral and Mixtral: the start, the gradients, the base they belong to, and merging."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from data_prep.files import InputError, read_json, read_jsonl, write_json
from data_prep.manifest import read_manifest
from data_prep.rows import Row, read_rows
from train import merge
from train.engine.batches import collate
from train.engine.experts import fuse_experts, separate_experts
from train.engine.logps import causal_lm, logps_of_rows, response_logps, response_logps_and_aux_loss
from train.engine.models import Checkpoint, as_reference, load_policy, new_mistral
from train.engine.recipe import AlignmentRecipe
from train.engine.rundir import save_policy
from train.engine.tokens import EncodedRow, Encoder

CPU = torch.device("cpu")
SMALL = {"lora_rank": 4, "lora_alpha": 8}


@pytest.fixture(scope="module")
def mixtral(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random mixture of 4 experts, with dropout-like settings a checkpoint may have."""
    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=128, sliding_window=None, num_local_experts=4,
        num_experts_per_tok=2, initializer_range=0.2, router_aux_loss_coef=0.02, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "mixtral"
    save_policy(path, MixtralForCausalLM(config), tokenizer)
    return path


@pytest.fixture(scope="module")
def mistral(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as bitsandbytes needs: its blocks hold 64 weights."""
    model = new_mistral(tokenizer, hidden=64, layers=2, heads=4, kv_heads=2, feed_forward=128, positions=128, seed=5)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("models") / "mistral"
    save_policy(path, model, tokenizer)
    return path


@pytest.fixture(params=["mistral lora", "mistral qlora", "mixtral lora", "mixtral qlora"])
def policy(request: pytest.FixtureRequest, mistral: Path, mixtral: Path, files: dict[str, Path]) -> Any:
    """The start of a run, with the directory of its base."""
    name, tuning = request.param.split()
    path = {"mistral": mistral, "mixtral": mixtral}[name]
    return load(path, files, tuning=tuning), path


def load(path: Path, files: dict[str, Path], **overrides: Any) -> Any:
    declined = {"router_aux_loss": "declined"} if path.name == "mixtral" else {}
    recipe = AlignmentRecipe.load(files["recipe"], {**SMALL, **declined, **overrides})
    return load_policy(Checkpoint(str(path)), recipe, CPU)[0]


def ids(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[EncodedRow]:
    return Encoder(tokenizer, 64, 24).rows(rows)


def stir(policy: nn.Module) -> None:
    """Move the adapters off their start, where half of them is zero and takes the gradient of the other half."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def differences(one: list[list[float]], other: list[list[float]]) -> list[float]:
    return [abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]


def test_a_run_starts_at_the_reference(
    policy: Any, tokenizer: PreTrainedTokenizerFast, make_rows: Callable[..., list[Row]]
) -> None:
    """At the start pi = mu exactly; afterwards the policy moves and the base, with adapters off, does not."""
    model, _ = policy
    rows = ids(tokenizer, make_rows(4, seed=1))
    start = logps_of_rows(model, rows, 2)
    with as_reference(model):
        before = logps_of_rows(model, rows, 2)
    assert max(differences(start, before)) == 0
    stir(model)
    with as_reference(model):
        assert logps_of_rows(model, rows, 2) == before
    assert min(differences(logps_of_rows(model, rows, 2), before)) > 1e-3


def test_the_unquantized_base_is_the_checkpoint(
    mistral: Path, mixtral: Path, files: dict[str, Path], tokenizer: PreTrainedTokenizerFast,
    make_rows: Callable[..., list[Row]],
) -> None:  # fmt: skip
    """Adapters off, the log-probs are those of the checkpoint by itself; nf4 is close to it and not the same."""
    rows = ids(tokenizer, make_rows(6, seed=2))
    for path in (mistral, mixtral):
        plain = logps_of_rows(Checkpoint(str(path)).load()[0], rows, 3)
        lora, qlora = (load(path, files, tuning=tuning) for tuning in ("lora", "qlora"))
        with as_reference(lora), as_reference(qlora):
            assert max(differences(logps_of_rows(lora, rows, 3), plain)) < 1e-4
            quantized = differences(logps_of_rows(qlora, rows, 3), plain)
        assert max(quantized) > 1e-2
        assert sum(quantized) / len(quantized) < 0.15 * sum(abs(x) for values in plain for x in values) / len(quantized)


def test_every_projection_has_an_adapter_and_gets_a_gradient(
    policy: Any, tokenizer: PreTrainedTokenizerFast, make_rows: Callable[..., list[Row]]
) -> None:
    """Attention and feed-forward of every layer, the fused experts of a mixture included; nothing else is trained."""
    model, path = policy
    stir(model)
    logps_of_rows(model, ids(tokenizer, make_rows(2, seed=3)), 2)  # evaluated before it is trained, as in a run
    model.train()
    response_logps(model, collate(ids(tokenizer, make_rows(6, seed=3)))).div(100).tanh().sum().backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    single = any("gate_up.lora" in name for name in trained)  # quantized experts have an adapter each
    per_layer = 2 * 7 if path.name == "mistral" else 2 * (4 + 2 * (4 if single else 1))
    assert len(trained) == per_layer * model.config.num_hidden_layers
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())


def test_single_experts_compute_what_fused_ones_do(
    mixtral: Path, tokenizer: PreTrainedTokenizerFast, make_rows: Callable[..., list[Row]]
) -> None:
    """Taken apart, unquantized, and put together again, a mixture keeps its log-probs and its weights."""
    rows = ids(tokenizer, make_rows(6, seed=8))
    model, _ = Checkpoint(str(mixtral)).load()
    before, weights = logps_of_rows(model, rows, 3), {name: w.clone() for name, w in model.state_dict().items()}
    separate_experts(model, None)
    assert not any("gate_up_proj" in name for name, _ in model.named_parameters())
    assert max(differences(logps_of_rows(model, rows, 3), before)) < 1e-4
    fuse_experts(model)
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert max(differences(logps_of_rows(model, rows, 3), before)) == 0


def test_packed_gradients_of_adapters_equal_plain_ones(
    mistral: Path, mixtral: Path, files: dict[str, Path], tokenizer: PreTrainedTokenizerFast,
    make_rows: Callable[..., list[Row]], plain_logps: Callable[[nn.Module, list[int], list[int]], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Below a frozen head, in chunks smaller than a response: loss within 1e-5, each gradient within 1e-4."""
    monkeypatch.setattr("train.engine.logps.CHUNK_LOGITS", 16 * len(tokenizer))
    rows = ids(tokenizer, make_rows(4, seed=4))
    for path in (mistral, mixtral):
        model = load(path, files, tuning="lora")
        stir(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        batch = collate(rows)
        assert len(batch["targets"]) > 3 * 16  # several chunks
        packed = response_logps(model, batch)
        found = torch.autograd.grad(torch.tanh(packed / 20).sum(), parameters)
        plain = torch.stack([
            torch.tanh(plain_logps(causal_lm(model), row.prompt_ids, response) / 20)
            for row in rows for response in row.response_ids
        ])  # fmt: skip
        assert torch.tanh(packed[batch["mask"]] / 20).sum().item() == pytest.approx(plain.sum().item(), abs=1e-5)
        expected = torch.autograd.grad(plain.sum(), parameters)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.linalg.norm(ours - theirs) <= 1e-4 * torch.linalg.norm(theirs)


def test_bfloat16_stays_near_float32(
    mistral: Path, files: dict[str, Path], tokenizer: PreTrainedTokenizerFast, make_rows: Callable[..., list[Row]]
) -> None:
    """dtype: bfloat16 computes in bfloat16 (the log-probs move) and sums in float32 (they move little)."""
    rows = ids(tokenizer, make_rows(8, seed=5))
    for tuning in ("lora", "full"):
        exact, rounded = (
            logps_of_rows(load(mistral, files, tuning=tuning, dtype=dtype), rows, 4)
            for dtype in ("float32", "bfloat16")
        )  # fmt: skip
        moved = differences(exact, rounded)
        assert 1e-4 < sum(moved) / len(moved) < 0.3
    kept = {p.dtype for p in load(mistral, files, tuning="full", dtype="bfloat16").parameters()}
    assert kept == {torch.float32}  # what is trained keeps its last digits


def test_a_mixture_must_name_its_router_loss(mistral: Path, mixtral: Path, files: dict[str, Path]) -> None:
    """Silence is refused for a mixture, and the loss for a model without one."""
    with pytest.raises(InputError, match="name it in the recipe"):
        load(mixtral, files, router_aux_loss="")
    with pytest.raises(InputError, match="no mixture of experts"):
        load(mistral, files, router_aux_loss="as_configured")


def test_the_router_loss_is_that_of_transformers(
    mixtral: Path, files: dict[str, Path], tokenizer: PreTrainedTokenizerFast, make_rows: Callable[..., list[Row]]
) -> None:
    """as_configured: the load-balancing loss of the stream's tokens, as transformers computes it from router logits of
    separate forward passes; declined: none."""
    (row,) = ids(tokenizer, make_rows(1, seed=6, ks=(2,)))
    row = dataclasses.replace(row, response_ids=[row.response_ids[0], row.response_ids[1][:1]])  # one stream, no branch
    batch = collate([row])
    model = load(mixtral, files, router_aux_loss="as_configured")
    _, aux = response_logps_and_aux_loss(model, batch)
    plain = MixtralForCausalLM.from_pretrained(mixtral, use_safetensors=True)
    with torch.no_grad():
        logits = plain(input_ids=batch["input_ids"], output_router_logits=True).router_logits
    assert aux.item() == pytest.approx(float(load_balancing_loss_func(logits, 4, 2)), rel=1e-5)
    assert aux.requires_grad
    assert response_logps_and_aux_loss(load(mixtral, files, router_aux_loss="declined"), batch)[1] is None


@pytest.mark.parametrize("name", ["mistral", "mixtral"])
@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_a_run_trains_saves_and_loads_its_adapter(
    name: str, tuning: str, mistral: Path, mixtral: Path, align_run: Callable[..., Path], files: dict[str, Path],
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
) -> None:  # fmt: skip
    """`--tuning`: the loss falls, only the adapter is saved, and what is loaded again is what was measured last."""
    path = {"mistral": mistral, "mixtral": mixtral}[name]
    words = ["--model", path, "--tuning", tuning, "--lora-rank", 4, "--epochs", 4, "--learning-rate", 0.003]
    words += ["--router-aux-loss", "as_configured"] if name == "mixtral" else []
    out = align_run(tmp_path / "run", *words)
    found = [line["loss"] for _, line in read_jsonl(out / "log.jsonl") if "loss" in line]
    assert sum(found[-3:]) < sum(found[:3])
    assert (out / "policy" / "adapter_model.safetensors").exists()
    assert not (out / "policy" / "model.safetensors").exists()
    facts = read_manifest(out)["identity"]["facts"]["model"]
    assert 0 < facts["trainable"] < facts["parameters"]
    policy, _ = Checkpoint(str(out / "policy")).load()
    assert isinstance(policy, PeftModel)
    heldout = ids(tokenizer, read_rows(files["heldout"]))
    last = [record for _, record in read_jsonl(out / "trend.jsonl") if record["split"] == "heldout"][-1]
    logps = logps_of_rows(policy, heldout, 4)
    best = [values[row.rewards.index(max(row.rewards))] for row, values in zip(heldout, logps, strict=True)]
    assert sum(best) / len(best) == pytest.approx(last["chosen"]["logps"], rel=1e-4)


def test_an_adapter_is_refused_on_another_base(mistral: Path, align_run: Callable[..., Path], tmp_path: Path) -> None:
    """The base carries its digest: changed weights, a lost record or a damaged one stop the load in one line."""
    base = tmp_path / "base"
    shutil.copytree(mistral, base)
    out = align_run(tmp_path / "run", "--model", base, "--tuning", "lora", "--epochs", 1)
    policy = Checkpoint(str(out / "policy"))
    record = read_json(out / "policy" / "base.json")
    assert record == {"name": str(base), "revision": None, "digest": Checkpoint(str(base)).digest, "quantized": None}
    policy.load()
    config = base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-3}))
    with pytest.raises(InputError, match=r"was trained on .* bring the base back"):
        policy.load()
    with pytest.raises(InputError, match="cannot carry adapters"):
        align_run(tmp_path / "again", "--model", _with_base(out / "policy", mistral, tmp_path), "--tuning", "lora")
    write_json(out / "policy" / "base.json", {"name": str(base)})
    with pytest.raises(InputError, match=r"base\.json: not a record"):
        policy.load()
    (out / "policy" / "base.json").unlink()
    with pytest.raises(InputError, match="its base is unknown"):
        policy.load()


def _with_base(policy: Path, base: Path, directory: Path) -> Path:
    copy = directory / "copy"
    shutil.copytree(policy, copy)
    write_json(copy / "base.json", {"name": str(base), "revision": None, "digest": Checkpoint(str(base)).digest,
                                    "quantized": None})  # fmt: skip
    return copy


@pytest.mark.parametrize(
    ("name", "tuning"), [("mistral", "lora"), ("mixtral", "lora"), ("mistral", "qlora"), ("mixtral", "qlora")]
)
def test_merging_reports_what_it_changes(
    name: str, tuning: str, mistral: Path, mixtral: Path, align_run: Callable[..., Path], files: dict[str, Path],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A merged LoRA has the log-probs of the unmerged one; a QLoRA, merged unquantized, has not, and that is said."""
    path = {"mistral": mistral, "mixtral": mixtral}[name]
    words = ["--model", path, "--tuning", tuning, "--lora-rank", 4, "--learning-rate", 0.02, "--epochs", 1]
    words += ["--router-aux-loss", "declined"] if name == "mixtral" else []
    run, out = align_run(tmp_path / "run", *words), tmp_path / "merged"
    command = ["merge", "--policy", run / "policy", "--rows", files["heldout"], "--out", out, "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    merge.main()
    assert "merged less unmerged" in capsys.readouterr().out
    parity = read_manifest(out)["identity"]["facts"]["parity"]
    assert parity["responses"] == sum(len(row.responses) for row in read_rows(files["heldout"]))
    if tuning == "lora":
        assert parity["largest_difference"] < 1e-3
    else:
        assert parity["largest_difference"] > 1e-2
    merged, _ = Checkpoint(str(out / "policy")).load()
    assert not isinstance(merged, PeftModel)
    merge.main()
    assert "done already" in capsys.readouterr().out
