"""`python -m train.parity`: the committed figures, the metrics, and the whole command on a tiny model."""

import csv
import json
import math
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from released import released_logps, released_sequences, zephyr_tokenizer
from transformers import AutoModelForCausalLM

from data_prep.files import InputError, write_json
from data_prep.manifest import file_digest
from data_prep.rows import Row, write_rows
from train import parity
from train.engine.models import new_mistral
from train.engine.official import rank_share
from train.engine.rundir import save_policy
from train.engine.tokens import EncodedRow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, float]]:
    """The committed figures: card, then metric."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    with open(parity.CARDS, encoding="utf-8") as file:
        for line in csv.DictReader(line for line in file if not line.startswith("#")):
            assert line["status"] in ("verified", "derived")
            found[line["card"].removeprefix("ChenDRAG/zephyr-")][line["metric"]] = float(line["value"])
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reference and a policy, random and small."""
    paths = {}
    for seed, name in enumerate(("mu", "pi")):
        tokenizer = zephyr_tokenizer()
        model = new_mistral(
            tokenizer, hidden=32, layers=1, heads=2, kv_heads=1, feed_forward=32, positions=256, seed=seed
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        paths[name] = tmp_path_factory.mktemp("parity") / name
        save_policy(paths[name], model, tokenizer)
    return paths


@pytest.fixture
def make_rows(tmp_path: Path) -> Callable[[int, int], tuple[Path, list[Row]]]:
    """Write `count` rows of K = `k` to a file, best response first, the first two tied in some."""

    def make(count: int, k: int) -> tuple[Path, list[Row]]:
        rng = random.Random(k)

        def text() -> str:
            return "".join(rng.choices("abcdefghij\n", k=rng.randint(1, 20))) + "a"

        rows = []
        for i in range(count):
            rewards = [8.0 if i % 3 else 7.0, 7.0, 5.0, 2.0][:k]
            rows.append(Row(f"r{i}", [{"role": "user", "content": text()}], [text() for _ in range(k)], rewards, "t"))
        write_rows(tmp_path / "test.jsonl", rows)
        return tmp_path / "test.jsonl", rows

    return make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command in this process; what it printed."""

    def command(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["train.parity", *map(str, words)])
        parity.main()
        return capsys.readouterr().out

    return command


def oracle(model: Path, rows: list[Row]) -> numpy.ndarray:
    """Log-probs [n, K] of the released kind, at the released limits."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = zephyr_tokenizer()
    return numpy.array([released_logps(loaded, released_sequences(tokenizer, row, 1024, 512)) for row in rows])


def test_the_committed_figures_agree_with_each_other(figures: dict[str, dict[str, float]]) -> None:
    """Within rounding: margin = chosen - rejected; rejected and accuracy are means over A1 to A3; the reference's
    log-probs of both preference cards are one number, logps - r / 0.01; the InfoNCA losses differ by the entropy."""
    assert sorted(figures) == ["NCA-preference", "NCA-reward", "infoNCA-preference", "infoNCA-reward"]
    for card, found in figures.items():
        assert found["margin"] == pytest.approx(found["r_chosen"] - found["r_rejected"], abs=2e-4)
        if card.endswith("reward"):
            assert found["r_rejected"] == pytest.approx(sum(found[f"r_A{i}"] for i in (1, 2, 3)) / 3, abs=2e-4)
            accuracies = [found[f"accuracy_A0_A{i}"] for i in (1, 2, 3)]
            assert found["accuracy"] == pytest.approx(sum(accuracies) / 3, abs=2e-4)
            assert found["loss"] == pytest.approx(found["loss_with_entropy"] - found["label_entropy"], abs=2e-4)
        else:
            for which, target in (("chosen", -275.16), ("rejected", -233.17)):
                assert found[f"ref_logps_{which}"] == pytest.approx(target, abs=0.011)
                implied = found[f"logps_{which}"] - found[f"r_{which}"] / parity.BETA
                assert implied == pytest.approx(found[f"ref_logps_{which}"], abs=0.006)
    assert figures["infoNCA-reward"]["label_entropy"] == parity.ENTROPY


@pytest.mark.parametrize("tie_break", [0.0, 0.01])
def test_the_alpha_of_an_entropy_is_found(tie_break: float) -> None:
    """For two responses with a gap d the entropy is that of a coin with odds exp(d / alpha): from the entropy of a
    known alpha that alpha comes back. Where ties alone have more entropy there is none."""
    gap, alpha = 0.5, 0.3
    p = 1 / (1 + math.exp(-(gap + tie_break) / alpha))
    entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
    message = [{"role": "user", "content": "a"}]
    rows = [Row("a", message, ["a", "b"], [7.5, 7.0], "t"), Row("b", message, ["a", "b"], [2.0, 2.5], "t")]
    assert parity.mean_entropy(rows, alpha, tie_break) == pytest.approx(entropy, abs=1e-12)
    assert parity.alpha_at(rows, entropy, tie_break) == pytest.approx(alpha, rel=1e-5)
    tied = [Row("a", message, ["a", "b"], [7.5, 7.5], "t")]
    assert (parity.alpha_at(tied, 0.3, tie_break) is None) == (tie_break == 0)


def test_metrics_by_hand() -> None:
    """One row, K = 4, the best response not first: r, accuracies, margin, losses and entropy from their definitions."""
    row = EncodedRow("a", [1], [[1] * 2, [1] * 4, [1] * 5, [1] * 10], [3.0, 8.0, 1.0, 7.0])
    ref, pi = [-10.0, -20.0, -30.0, -40.0], [-15.0, -19.0, -28.0, -47.0]
    found = {}
    for method in ("nca", "infonca"):
        found[method] = {
            name: values.item()
            for name, values in parity.metrics([row], [ref], [pi], "reward", method, alpha=2.0).items()
        }
    r = [0.01 * d for d in (1.0, -7.0, -5.0, 2.0)]  # responses 1, 3, 0, 2: by their rewards
    weights = [math.exp(reward / 2) for reward in (8, 7, 3, 1)]
    p = [weight / sum(weights) for weight in weights]
    entropy = -sum(x * math.log(x) for x in p)
    infonca = -sum(x * (y - math.log(sum(map(math.exp, r)))) for x, y in zip(p, r, strict=True))
    nca = sum(x * math.log1p(math.exp(-y)) + math.log1p(math.exp(y)) / 4 for x, y in zip(p, r, strict=True))
    expected = {
        "r_A0": r[0], "r_A1": r[1], "r_A2": r[2], "r_A3": r[3], "r_chosen": r[0], "r_rejected": sum(r[1:]) / 3,
        "margin": r[0] - sum(r[1:]) / 3, "accuracy_A0_A1": 1, "accuracy_A0_A2": 1, "accuracy_A0_A3": 0,
        "accuracy": 2 / 3, "ref_logps_A0": -20, "ref_logps_A3": -30,
    }  # fmt: skip
    assert found["nca"].items() >= {"accuracy_A0_A1": 1.0, "accuracy_A0_A3": 0.0}.items()
    for name, value in expected.items():
        assert found["nca"][name] == found["infonca"][name] == pytest.approx(value, abs=1e-12), name
    assert found["nca"]["loss"] == pytest.approx(nca, abs=1e-12)
    assert found["infonca"]["loss_with_entropy"] == pytest.approx(infonca, abs=1e-12)
    assert found["infonca"]["label_entropy"] == pytest.approx(entropy, abs=1e-12)
    assert found["infonca"]["loss"] == pytest.approx(infonca - entropy, abs=1e-12)


def test_without_weights_and_data_it_says_what_it_would_do(tmp_path: Path) -> None:
    """`not run` is stated with what is missing, how to get it and the targets; that is no error."""
    words = ["--rows", str(tmp_path / "absent.jsonl"), "--model-revision", "0" * 40]
    done = subprocess.run(
        [sys.executable, "-m", "train.parity", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for said in ("reference: not run", "policy: not run", "absent.jsonl is absent", "mistral-7b-sft-beta", "-275.15",
                 "-233.17", "--released preference"):  # fmt: skip
        assert said in done.stdout


def test_labels_need_rows_only(run: Callable[..., str], make_rows: Callable, tmp_path: Path) -> None:
    """Without the model the label entropies are still measured. A third of the rows have two tied at the top."""
    path, rows = make_rows(30, 4)
    said = run("--expected", "reward", "--rows", path)
    tied = math.log(2) * sum(row.rewards[0] == row.rewards[1] for row in rows) / len(rows)
    assert f"| 0.0001 | {tied:.4f} | 0.0000 |" in said
    assert "best + 0.01: entropy 0.2326 at alpha = " in said
    assert "reference: not run" in said


@pytest.mark.parametrize(("expected", "k", "devices"), [("preference", 2, 2), ("reward", 4, 4)])
def test_the_reference_means_are_those_of_the_released_computation(
    run: Callable[..., str], make_rows: Callable, models: dict[str, Path], tmp_path: Path, expected: str, k: int,
    devices: int,
) -> None:  # fmt: skip
    """On a tiny model: means over all rows and over each device's share of them are those of full, padded, masked
    sequences; a second call reads them; with the paper's tokens they are others."""
    path, rows = make_rows(20, k)
    words = ["--expected", expected, "--rows", path, "--model", models["mu"], "--precision", "float32"]
    said = run(*words, "--out", tmp_path / "out")
    assert "no parity is to be expected" in said  # 20 rows are not the test set
    names = ["ref_logps_chosen", "ref_logps_rejected"] if k == 2 else [f"ref_logps_A{i}" for i in range(4)]
    truth = oracle(models["mu"], rows)
    found = {line["metric"]: line for line in json.loads((tmp_path / "out/parity.json").read_text())["metrics"]}
    for name, column in zip(names, truth.T, strict=True):
        assert found[name]["mean"] == pytest.approx(column.mean(), abs=1e-3)
        assert found[name]["standard_error"] == pytest.approx(column.std(ddof=1) / math.sqrt(20), abs=1e-3)
        shares = [column[rank_share(20, rank, devices)].mean() for rank in range(devices)]
        assert found[name]["shares"] == pytest.approx(shares, abs=1e-3)
        assert len({round(share, 2) for share in shares}) > 1
    stamp = (tmp_path / "out/report.md").stat().st_mtime_ns
    assert run(*words, "--out", tmp_path / "out") == said
    assert (tmp_path / "out/report.md").stat().st_mtime_ns == stamp
    run(*words, "--out", tmp_path / "paper", "--quirks", "")
    plain = {line["metric"]: line for line in json.loads((tmp_path / "paper/parity.json").read_text())["metrics"]}
    assert abs(plain[names[0]]["mean"] - found[names[0]]["mean"]) > 1
    assert plain[names[0]]["shares"] == []


def test_a_policy_is_put_beside_its_card(
    run: Callable[..., str], make_rows: Callable, models: dict[str, Path], tmp_path: Path
) -> None:
    """Pairs, both methods: chosen, rejected, margin, accuracy and loss are those of the released sums, tied pairs
    included, and the card's figures stand beside them."""
    path, rows = make_rows(12, 2)
    mu, pi = oracle(models["mu"], rows), oracle(models["pi"], rows)
    chosen, rejected = 0.01 * (pi - mu).T
    losses = {
        "infonca": numpy.log1p(numpy.exp(rejected - chosen)),
        "nca": numpy.log1p(numpy.exp(-chosen))
        + 0.5 * (numpy.log1p(numpy.exp(chosen)) + numpy.log1p(numpy.exp(rejected))),
    }
    for method, card in (("nca", "0.0489"), ("infonca", "-0.8931")):
        said = run("--rows", path, "--model", models["mu"], "--policy", models["pi"], "--method", method,
                   "--precision", "float32", "--out", tmp_path / method)  # fmt: skip
        found = {
            line["metric"]: line["mean"]
            for line in json.loads((tmp_path / method / "parity.json").read_text())["metrics"]
        }
        assert found["r_chosen"] == pytest.approx(chosen.mean(), abs=1e-4)
        assert found["r_rejected"] == pytest.approx(rejected.mean(), abs=1e-4)
        assert found["margin"] == pytest.approx((chosen - rejected).mean(), abs=1e-4)
        assert found["accuracy"] == pytest.approx((chosen > rejected).mean(), abs=1e-9)
        assert found["logps_chosen"] == pytest.approx(pi[:, 0].mean(), abs=1e-3)
        assert found["loss"] == pytest.approx(losses[method].mean(), abs=1e-4)
        assert f"| r_chosen | {card} | " in said


def test_an_adapter_is_measured_on_its_own_base_only(
    run: Callable[..., str], make_rows: Callable, models: dict[str, Path], tmp_path: Path
) -> None:
    """An adapter's log-probs are those of its merged model; beside another reference it is refused."""
    path, rows = make_rows(6, 2)
    base = AutoModelForCausalLM.from_pretrained(models["mu"], attn_implementation="eager")
    policy = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapter = tmp_path / "adapter"
    policy.save_pretrained(adapter)
    zephyr_tokenizer().save_pretrained(adapter)
    record = {"name": str(models["mu"]), "revision": None, "digest": file_digest(models["mu"]), "quantized": None}
    write_json(adapter / "base.json", record)
    sequences = [released_sequences(zephyr_tokenizer(), row, 1024, 512) for row in rows]
    merged = policy.merge_and_unload().eval()
    truth = numpy.array([released_logps(merged, s) for s in sequences])
    words = ["--rows", path, "--policy", adapter, "--precision", "float32", "--out", tmp_path / "out"]
    run(*words, "--model", models["mu"])
    found = {line["metric"]: line["mean"] for line in json.loads((tmp_path / "out/parity.json").read_text())["metrics"]}
    assert found["logps_chosen"] == pytest.approx(truth[:, 0].mean(), abs=1e-3)
    assert abs(found["logps_chosen"] - found["ref_logps_chosen"]) > 0.1
    with pytest.raises(InputError, match="an adapter of another model"):
        run(*words, "--model", models["pi"])


def test_rows_of_another_k_are_refused(make_rows: Callable, models: dict[str, Path]) -> None:
    """Four responses do not fit the preference cards: one line, exit code 2."""
    path, _ = make_rows(3, 4)
    done = subprocess.run(
        [sys.executable, "-m", "train.parity", "--rows", path, "--model", models["mu"], "--out", path.parent / "out"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "K = 4" in done.stderr.splitlines()[-1]
    assert "'r0'" in done.stderr.splitlines()[-1]
