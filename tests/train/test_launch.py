"""The launch files: known keys, what accelerate makes of them, and processes that are really started."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "train" / "launch"
TINY = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 8,
}  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.yaml")), ids=lambda path: path.stem)
def test_keys_are_those_of_accelerate(path: Path) -> None:
    """accelerate reads the file (it refuses unknown keys itself), and each key of its fsdp and deepspeed sections is an
    option of `accelerate launch` (there it does not look). No file chooses a precision: the recipe does."""
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) | set(config.deepspeed_config) <= options
    assert config.mixed_precision in ("no", None)
    assert (config.fsdp_config != {}) == (path.stem == "fsdp")


def test_zero3_settings_are_consistent() -> None:
    """The JSON is where the YAML says, accelerate reads it as stage 3 without offloading, and it leaves to the recipe
    what the recipe states. (DeepSpeed itself is not among the requirements.)"""
    named = yaml.safe_load((LAUNCH / "deepspeed_zero3.yaml").read_text())["deepspeed_config"]["deepspeed_config_file"]
    settings = json.loads((ROOT / named).read_text())
    parsed = HfDeepSpeedConfig(str(ROOT / named))
    assert parsed.is_zero3()
    assert not parsed.is_offload()
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert settings[key] == "auto"


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_processes_are_started(name: str, tmp_path: Path) -> None:
    """`accelerate launch` with the file starts two processes that know of each other, and hands FSDP's settings on;
    the plugin made of them is FSDP2 and wraps the decoder layers of Mistral and of Mixtral."""
    program = tmp_path / "report.py"
    program.write_text(
        "import json, os, pathlib\n"
        "known = ('RANK', 'WORLD_SIZE', 'ACCELERATE_USE_FSDP')\n"
        "names = [name for name in os.environ if name.startswith('FSDP') or name in known]\n"
        "pathlib.Path(__file__).with_name(os.environ['RANK'] + '.json').write_text("
        "json.dumps({name: os.environ[name] for name in names}))\n"
    )
    words = ["accelerate", "launch", "--config_file", str(LAUNCH / f"{name}.yaml"), "--num_processes", "2",
             "--main_process_port", "0", str(program)]  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert {process["WORLD_SIZE"] for process in found} == {"2"}
    assert ("ACCELERATE_USE_FSDP" in found[0]) == (name == "fsdp")
    if name != "fsdp":
        return
    settings = {key: value for key, value in found[0].items() if key.startswith("FSDP")}
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        for key, value in settings.items():
            patch.setenv(key, value)
        for model in (MistralForCausalLM(MistralConfig(**TINY)), MixtralForCausalLM(MixtralConfig(**TINY))):
            plugin = FullyShardedDataParallelPlugin()
            plugin.set_auto_wrap_policy(model)
            assert plugin.fsdp_version == 2
            assert plugin.reshard_after_forward is True
            wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
            assert {kind.__name__ for kind in wrapped} == {type(model.model.layers[0]).__name__}


def test_slurm_starts_one_launcher_a_node(tmp_path: Path) -> None:
    """With stand-ins for Slurm's commands: each of two nodes runs accelerate with its own rank, the first node's
    address and all GPUs of both, and the arguments arrive as they were typed."""
    stand_ins = {
        "scontrol": 'printf "node-a\\nnode-b\\n"',
        "srun": 'for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": 'printf "%s|" "$@"; echo',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2"}
    words = ["bash", str(LAUNCH / "slurm.sbatch"), "train.nca", "--recipe", "R", "--out", "a b"]
    env = environment(**slurm)
    env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)
    lines = done.stdout.splitlines()
    assert lines == [
        f"launch|--config_file|train/launch/fsdp.yaml|--num_machines|2|--num_processes|16|--machine_rank|{rank}|"
        "--main_process_ip|node-a|--main_process_port|29500|-m|train.nca|--recipe|R|--out|a b|"
        for rank in (0, 1)
    ], done.stderr
    parsed = launch_command_parser().parse_args(lines[1].removesuffix("|").split("|")[1:])
    assert (parsed.num_machines, parsed.machine_rank, parsed.module) == (2, 1, True)


def test_launch_files_named_anywhere_exist() -> None:
    """Recipes, scripts and the files themselves name launch files that are there."""
    files = [*LAUNCH.iterdir(), *(ROOT / "train" / "recipes").rglob("*.yaml"), *(ROOT / "scripts").glob("*.sh")]
    named = {name for path in files for name in re.findall(r"train/launch/[\w.]+\w", path.read_text())}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
