"""FSDP over two processes (gloo) against one process: loss, gradients and gathered metrics.

Accelerate never chooses FSDP on a CPU, so the worker shards with torch's own fully_shard, as accelerate does on GPUs:
each decoder layer, then the model. All else is the engine's.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from train.engine.rundir import save_policy

ROOT = Path(__file__).resolve().parents[2]
CASES = [("mistral", "full"), ("mixtral", "full"), ("mistral", "lora")]
WORKER = """
import json, sys
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from data_prep.rows import read_rows
from train.engine.batches import EpochSampler, collate
from train.engine.logps import causal_lm, logps_of_rows
from train.engine.models import Checkpoint, load_policy
from train.engine.recipe import AlignmentRecipe
from train.engine.run import training_arguments
from train.engine.tokens import Encoder
from train.engine.trainer import TrendTrainer
from train.nca import nca_loss

torch.set_num_threads(1)
state = PartialState(cpu=True)


def measure(model_path, rows_path, heldout_path, recipe_path, out, aux, tuning):
    settings = {"kl_prompts": 0, "router_aux_loss": aux, "tuning": tuning, "lora_rank": 4}
    recipe = AlignmentRecipe.load(recipe_path, settings)
    model, tokenizer = load_policy(Checkpoint(model_path), recipe, state.device)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # off the start, where half of the gradients are zero
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    encoder = Encoder.of(tokenizer, recipe)
    rows, heldout = (encoder.rows(read_rows(path)) for path in (rows_path, heldout_path))
    reference = {}
    for some in (rows, heldout):
        reference |= zip((row.id for row in some), logps_of_rows(model, some, 4))
    shifted = {name: [value - 1.5 * i for i, value in enumerate(values)] for name, values in reference.items()}
    if state.num_processes > 1:
        mesh = init_device_mesh("cpu", (2,))
        for layer in causal_lm(model).model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trainer = TrendTrainer(
        model, training_arguments(Path(out), recipe), rows, shifted, partial(nca_loss, alpha=1.0, beta=0.5),
        EpochSampler([row.stream_length for row in rows], 8, 1, seed=0),
        heldout=heldout, heldout_ref_logps=reference, train_subset=rows, reference=None, kl_rows=[],
        tokenizer=tokenizer, beta=0.5, max_response_tokens=8, trend_path=Path(out) / "trend.jsonl", batch_size=8,
        start_tolerance=99.0,
    )
    trainer.evaluate()
    mine = rows[:8][state.process_index :: state.num_processes]
    model.train()
    loss = trainer.compute_loss(model, trainer._collate(mine), num_items_in_batch=torch.tensor(8))
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            gradients[name] = whole.flatten()[:: max(whole.numel() // 64, 1)].tolist()
    sharded = isinstance(next(model.parameters()), DTensor)
    total = trainer.accelerator.reduce(loss.detach(), "mean").item()
    return {"loss": total, "gradients": gradients, "records": trainer.records, "sharded": sharded,
            "processes": state.num_processes}


out = sys.argv[1]
found = [measure(*case) for case in json.loads(sys.argv[2])]
if state.is_main_process:
    (Path(out) / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def mixture(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random mixture of experts."""
    torch.manual_seed(3)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.2, sliding_window=None,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "mixture"
    save_policy(path, MixtralForCausalLM(config), tokenizer)
    return path


@pytest.fixture(scope="module")
def found(
    mu: Path, mixture: Path, files: dict[str, Path], environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """For each case what one process and two found."""
    directory = tmp_path_factory.mktemp("sharded")
    worker = directory / "worker.py"
    worker.write_text(WORKER)
    results = []
    for processes in (1, 2):
        out = directory / str(processes)
        out.mkdir()
        inputs = [str(path) for path in (files["rows"], files["heldout"], files["recipe"], out)]
        models = {"mistral": (mu, ""), "mixtral": (mixture, "declined")}
        cases = [[str(models[name][0]), *inputs, models[name][1], tuning] for name, tuning in CASES]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        done = subprocess.run(
            [sys.executable, *launcher, str(worker), str(out), json.dumps(cases)], cwd=ROOT, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads((out / "found.json").read_text()))
    return {" ".join(case): list(pair) for case, pair in zip(CASES, zip(*results, strict=True), strict=True)}


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_two_sharded_processes_equal_one(case: tuple[str, str], found: dict[str, list[dict[str, Any]]]) -> None:
    """The mean loss over the global batch, every gradient, and every number of the trend."""
    one, two = found[" ".join(case)]
    assert (one["processes"], two["processes"], one["sharded"], two["sharded"]) == (1, 2, False, True)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["gradients"].keys() == one["gradients"].keys()
    for name, gradient in one["gradients"].items():
        ours, theirs = torch.tensor(two["gradients"][name]), torch.tensor(gradient)
        assert torch.linalg.norm(ours - theirs) <= 1e-4 * torch.linalg.norm(theirs), name
    for ours, theirs in zip(two["records"], one["records"], strict=True):
        for key in ("chosen", "rejected"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5)
        assert (ours["prompts"], ours["accuracy"]) == (theirs["prompts"], pytest.approx(theirs["accuracy"]))
