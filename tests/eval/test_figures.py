"""eval.figures: the curves are the records, the picture shows them, and the published curves are the paper's."""

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy
import pandas
import pytest
from datasets import Dataset
from synthetic import METHODS, REGIMES, STEPS, number, student, write_lines, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import curves, drawing, figures, points

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "results" / "paper" / "figure2_likelihood.csv"
ENDINGS = (".png", ".svg", ".csv")


@pytest.fixture
def draw(run, tmp_path):
    """Draw the figure of a results folder; returns its path without the ending."""

    def call(folder: Path, name: str = "figure", *more: object) -> Path:
        done = run(figures.main, "--trend", folder / "trend.jsonl", "--out", tmp_path / name, *more)
        assert done.code == 0, done.err
        return tmp_path / name

    return call


def published() -> pandas.DataFrame:
    return pandas.read_csv(PAPER, comment="#")


@pytest.mark.parametrize(("more", "quantity"), [((), "log_ratio"), (("--paper", PAPER), "r")])
def test_curves_are_the_records(more, quantity, draw, tmp_path) -> None:
    """The figure's CSV is the mean and range over seeds of the held-out records, by pandas."""
    folder = write_results(tmp_path / "results")
    frame = pandas.read_json(folder / "trend.jsonl", lines=True)
    frame = frame[frame.split == "heldout"]
    with open(draw(folder, "figure", *more).with_suffix(".csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(METHODS) * len(REGIMES) * 2 * len(STEPS)
    for side in ("chosen", "rejected"):
        values = frame[side].map(lambda found: found[quantity])
        grouped = values.groupby([frame.regime, frame.method, frame.step])
        expected = grouped.agg(["mean", "min", "max"])
        for (regime, method, step), (mean, low, high) in expected.iterrows():
            share = step / max(STEPS)
            (row,) = [r for r in rows if (r["regime"], r["method"], r["side"]) == (regime, method, side)
                      and abs(float(r["share_of_training"]) - share) < 1e-6]  # fmt: skip
            found = [float(row[key]) for key in ("mean", "lowest_seed", "highest_seed")]
            assert found == pytest.approx([mean, low, high], abs=1e-6)


def test_same_records_same_bytes(draw, tmp_path) -> None:
    """Drawn twice, PNG, SVG and CSV are the same bytes; other records give others."""
    folder = write_results(tmp_path / "results")
    one, two = draw(folder, "one"), draw(folder, "two")
    other = draw(write_results(tmp_path / "other", without=["nca-hard"]), "three")
    for ending in ENDINGS:
        assert one.with_suffix(ending).read_bytes() == two.with_suffix(ending).read_bytes()
        assert one.with_suffix(ending).read_bytes() != other.with_suffix(ending).read_bytes()


def pixels_of(picture: numpy.ndarray, color: str) -> int:
    """How many pixels have a colour."""
    return int((abs(picture[..., :3] - matplotlib.colors.to_rgb(color)).max(-1) < 0.02).sum())


def test_picture_shows_every_method(draw, tmp_path) -> None:
    """The PNG is not blank: each method's line is there in its colour, in all four panels; a method without records
    is not."""
    names = {method: style[0] for method, style in drawing.STYLES.items()}
    assert len(set(names.values())) == len(METHODS)
    picture = matplotlib.image.imread(draw(write_results(tmp_path / "results")).with_suffix(".png"))
    inked = (picture[..., :3].min(-1) < 0.98).mean()
    assert 0.03 < inked < 0.8
    height, width = picture.shape[:2]
    for color in names.values():
        for rows in (slice(0, height // 2), slice(height // 2, height)):
            for columns in (slice(0, int(width * 0.4)), slice(int(width * 0.45), int(width * 0.8))):
                assert pixels_of(picture[rows, columns], color) > 40
    without = write_results(tmp_path / "without", without=["kto-hard", "kto-gentle"])
    assert pixels_of(matplotlib.image.imread(draw(without).with_suffix(".png")), names["kto"]) == 0


def test_published_curves_are_laid_over(draw, tmp_path) -> None:
    """With --paper the picture has the published curves of DPO and pairwise NCA, and of our runs those on pairs."""
    folder = write_results(tmp_path / "results")
    plain = draw(folder, "plain").with_suffix(".svg").read_text()
    paper = draw(folder, "paper", "--paper", PAPER).with_suffix(".svg").read_text()
    for label in ("DPO, paper (7B)", "NCA, pairs, paper (7B)"):  # matplotlib notes each text in a comment
        assert f"<!-- {label} -->" in paper
        assert f"<!-- {label} -->" not in plain
    assert "<!-- InfoNCA -->" in plain
    assert "<!-- InfoNCA -->" not in paper


def test_published_curves_are_those_of_the_file() -> None:
    """The values that are drawn are the columns of the committed file; NCA's chosen one is that implied by margin."""
    found, frame = curves.read_paper(PAPER), published()
    for key, column in {
        ("dpo", "chosen"): "dpo_chosen",
        ("dpo", "rejected"): "dpo_rejected",
        ("nca_pair", "chosen"): "nca_chosen_implied_by_margin",
        ("nca_pair", "rejected"): "nca_rejected",
    }.items():
        assert found.pop(key) == list(zip(frame.epoch_fraction, frame[column], strict=True))
    assert not found


def test_published_numbers_agree_with_each_other() -> None:
    """margin = chosen - rejected in every row (NCA to 0.005, DPO to the reading error of 0.02); the NCA line as
    plotted is twice that from step 300 on; steps and shares of the epoch agree; the end points are the model cards'."""
    frame = published()
    assert len(frame) == 20
    implied = frame.nca_margin + frame.nca_rejected
    assert (frame.nca_chosen_implied_by_margin - implied).abs().max() <= 0.005
    assert (frame.dpo_chosen - frame.dpo_rejected - frame.dpo_margin).abs().max() <= 0.02
    later = frame[frame.step >= 300]
    assert (later.nca_chosen_as_plotted - 2 * later.nca_chosen_implied_by_margin).abs().max() <= 0.01
    assert (frame.epoch_fraction - frame.step / frame.step.max()).abs().max() < 1e-4
    last = frame.iloc[-1]
    ends = (last.nca_chosen_implied_by_margin, last.nca_rejected, last.dpo_chosen, last.dpo_rejected)
    assert ends == pytest.approx((0.0489, -0.5399, -0.8931, -2.0138), abs=0.005)


def test_published_numbers_state_their_source() -> None:
    """The file says which figure of which paper it is, from where, at which commit, how read and how exact."""
    head = "".join(line for line in PAPER.read_text().splitlines(keepends=True) if line.startswith("#"))
    for words in ("2402.05369", "Figure 2", "github.com/thu-ml/Noise-Contrastive-Alignment", "cbb9248", "digitised",
                  "Accuracy", "beta (log pi - log mu)"):  # fmt: skip
        assert words in head


@pytest.mark.parametrize("damage", ["no column", "no number", "no rows", "no file"])
def test_other_files_than_the_published_curves_are_refused(damage, run, tmp_path) -> None:
    """A file without the columns, without numbers, empty or absent: one line, and no figure."""
    folder = write_results(tmp_path / "results")
    path = tmp_path / "paper.csv"
    text = PAPER.read_text()
    if damage == "no column":
        path.write_text(text.replace("nca_rejected", "nca_r"))
    elif damage == "no number":
        path.write_text(text.replace("-0.118", "minus"))
    elif damage == "no rows":
        path.write_text("".join(line for line in text.splitlines(keepends=True) if not line[0].isdigit()))
    words = ("--trend", folder / "trend.jsonl", "--out", tmp_path / "figure")
    assert str(path) in run(figures.main, *words, "--paper", path).refusal
    assert not list(tmp_path.glob("figure.*"))


def test_no_records(run, tmp_path) -> None:
    """An empty trend gives no figure: one line."""
    (tmp_path / "trend.jsonl").write_text("")
    words = ("--trend", tmp_path / "trend.jsonl", "--out", tmp_path / "figure")
    assert "no records" in run(figures.main, *words).refusal


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def trend_lines(values: dict[int, tuple[float, float]]) -> list[dict[str, Any]]:
    """Records of a run's own trend.jsonl, which do not say what run it is."""
    return [
        {"step": step, "split": "heldout", "beta": 0.5, **{side: {"r": r, "log_ratio": 2 * r} for side, r in
         zip(("chosen", "rejected"), sides, strict=True)}} for step, sides in values.items()
    ]  # fmt: skip


def write_run(
    folder: Path, method: str, recipe: str, seed: int, values: dict[int, tuple[float, float]], beta: float = 0.5
) -> Path:
    folder.mkdir(parents=True)
    write_lines(folder / "trend.jsonl", trend_lines(values))
    settings = {"method": method, "recipe_name": recipe, "recipe": {"seed": seed, "beta": beta}}
    (folder / "plan.json").write_text(json.dumps({"settings": settings}))
    return folder


def trainer_log(prefix: str, values: dict[int, tuple[float, float]]) -> list[dict[str, float]]:
    """What a Trainer logs: other entries between."""
    entries = []
    for step, (chosen, rejected) in values.items():
        logged = {f"{prefix}rewards/chosen": chosen, f"{prefix}rewards/rejected": rejected}
        entries += [{"step": step, "loss": 0.5}, {"step": step, **logged}]
    return entries


VALUES = {0: (0.0, 0.0), 10: (-0.25, -0.5), 20: (-0.5, -1.5)}
HALF = {step: (chosen / 2, rejected / 2) for step, (chosen, rejected) in VALUES.items()}


def test_any_runs_beside_each_other(run, tmp_path) -> None:
    """Two seeds of a run, a Trainer's state and a CSV in one figure: each value is that of its source, seeds are one
    line, and the published curves can be laid over all."""
    runs = [write_run(tmp_path / f"seed {s}", "nca", "hard", s, v) for s, v in ((0, VALUES), (1, HALF))]
    trl = tmp_path / "theirs" / "checkpoint-20"
    trl.mkdir(parents=True)
    log = trainer_log("", HALF) + trainer_log("eval_", VALUES)  # held-out ones are taken where they are there
    (trl / "trainer_state.json").write_text(json.dumps({"log_history": log, "max_steps": 40}))
    table = tmp_path / "third.csv"
    table.write_text("# from elsewhere\nstep,method,chosen,rejected\n0,dpo,0,0\n20,dpo,-0.75,-2\n")
    words = ("trend", *runs, trl.parent, table, "--out", tmp_path / "figure.v2", "--paper", PAPER)
    assert run(figures.main, *words).code == 0
    found = rows_of(tmp_path / "figure.v2.csv")
    values = {(r["method"], r["seed"], float(r["step"])): (float(r["chosen"]), float(r["rejected"])) for r in found}
    expected = {("NCA, hard", "0", s): v for s, v in VALUES.items()}
    expected |= {("NCA, hard", "1", s): v for s, v in HALF.items()}
    expected |= {("theirs", "0", s): v for s, v in VALUES.items()}
    expected |= {("DPO (third)", "0", 0): (0, 0), ("DPO (third)", "0", 20): (-0.75, -2)}
    assert values == expected
    shares = {r["method"]: float(r["share_of_training"]) for r in found if float(r["step"]) == 20}
    assert shares == {"NCA, hard": 1, "theirs": 0.5, "DPO (third)": 1}  # the Trainer's run was to go on to step 40
    svg = (tmp_path / "figure.v2.svg").read_text()
    for label in ("NCA, hard", "theirs", "DPO (third)", "DPO, paper (7B)", "share of training"):
        assert f"<!-- {label} -->" in svg
    assert "doubled" in svg
    assert (tmp_path / "figure.v2.png").stat().st_size > 10_000


def test_a_run_of_trl(run, policies, tmp_path) -> None:
    """A real DPO run of TRL: its directory is a source, and the figure has the rewards that TRL logged on held-out
    rows, from the last checkpoint."""
    trl = pytest.importorskip("trl")
    pairs = Dataset.from_list([{"prompt": "How many pens", "chosen": " are left?", "rejected": " small"}] * 8)
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=4, max_steps=4, logging_steps=1, save_steps=2,
        eval_strategy="steps", eval_steps=2, learning_rate=1e-3, report_to=[], use_cpu=True, bf16=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        AutoModelForCausalLM.from_pretrained(policies[0]), args=settings, train_dataset=pairs, eval_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(policies[0]),
    )  # fmt: skip
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_rewards/chosen" in entry]
    assert run(figures.main, "trend", tmp_path / "theirs", "--out", tmp_path / "figure").code == 0
    found = [[float(row[key]) for key in ("step", *curves.SIDES)] for row in rows_of(tmp_path / "figure.csv")]
    expected = [[entry[key] for key in ("step", "eval_rewards/chosen", "eval_rewards/rejected")] for entry in logged]
    assert numpy.array(found) == pytest.approx(numpy.array(expected), abs=1e-6)
    assert [point[0] for point in found] == [2, 4]
    assert found[-1][1] != 0


def test_training_batches_are_said_to_be_such(run, tmp_path) -> None:
    """A Trainer without held-out logs gives those of its training batches, and the figure says so."""
    (tmp_path / "theirs").mkdir()
    state = {"log_history": trainer_log("", VALUES), "max_steps": 20}
    (tmp_path / "theirs" / "trainer_state.json").write_text(json.dumps(state))
    assert run(figures.main, "trend", tmp_path / "theirs", "--out", tmp_path / "figure").code == 0
    assert {row["method"] for row in rows_of(tmp_path / "figure.csv")} == {"theirs, training batches"}
    assert "<!-- step -->" in (tmp_path / "figure.svg").read_text()


def test_released_code_s_logs(run, tmp_path) -> None:
    """The paper's released trainer for K = 4 logs rewards/A0 to A3: A0 is chosen, the mean of the others rejected, so
    that chosen - rejected is the margin that it logs as well."""
    (tmp_path / "theirs").mkdir()
    entry = {
        "step": 5,
        "eval_rewards/A0": 0.5,
        "eval_rewards/A1": 0.25,
        "eval_rewards/A2": -1.0,
        "eval_rewards/A3": -3.0,
    }
    state = {"log_history": [entry, {**entry, "step": 10, "eval_rewards/A0": 1.0}], "max_steps": 10}
    (tmp_path / "theirs" / "trainer_state.json").write_text(json.dumps(state))
    assert run(figures.main, "trend", tmp_path / "theirs", "--out", tmp_path / "figure").code == 0
    found = [(float(row["chosen"]), float(row["rejected"])) for row in rows_of(tmp_path / "figure.csv")]
    assert found == [(0.5, -1.25), (1.0, -1.25)]


def test_a_figure_reads_its_own_data(run, tmp_path) -> None:
    """The CSV of a figure of runs is a source again, with the same numbers."""
    folder = write_results(tmp_path / "results")
    assert run(figures.main, "trend", folder / "trend.jsonl", "--out", tmp_path / "one").code == 2  # 16 lines
    folder = write_results(tmp_path / "few", without=[f"{m}-{r}" for m in METHODS[:5] for r in REGIMES])
    assert run(figures.main, "trend", folder, "--out", tmp_path / "one").code == 0
    assert run(figures.main, "trend", tmp_path / "one.csv", "--out", tmp_path / "two").code == 0
    numbers = [[(r["seed"], r["step"], r["chosen"], r["rejected"]) for r in rows_of(tmp_path / name)]
               for name in ("one.csv", "two.csv")]  # fmt: skip
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) == 3 * 2 * 3 * len(STEPS)


def test_two_runs_of_one_name_are_told_apart(run, tmp_path) -> None:
    """Two runs of a method, recipe and seed (other settings) are two lines named by where they lie, never one mean; the
    same source named twice is refused."""
    one, two = (write_run(tmp_path / n, "nca", "hard", 0, v) for n, v in (("beta-1", VALUES), ("beta-2", HALF)))
    assert run(figures.main, "trend", one, two, "--out", tmp_path / "figure").code == 0
    assert {row["method"] for row in rows_of(tmp_path / "figure.csv")} == {f"NCA, hard ({path})" for path in (one, two)}
    # Another seed does not make it a seed of the other: the settings differ.
    three = write_run(tmp_path / "beta-3", "nca", "hard", 1, HALF, beta=0.1)
    assert run(figures.main, "trend", one, three, "--out", tmp_path / "figure").code == 0
    assert len({row["method"] for row in rows_of(tmp_path / "figure.csv")}) == 2
    assert "named twice" in run(figures.main, "trend", one, one, "--out", tmp_path / "other").refusal


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "step,chosen,rejected\n1,2,3\n", "row 1"),
        ("a.csv", "step,method,chosen,rejected\n1,dpo,x,3\n", "row 1"),
        ("a.csv", "step,method,chosen,rejected\n1,dpo,nan,3\n", "not finite"),
        ("a.csv", "step,method,chosen,rejected\n", "no rows"),
        ("trainer_state.json", "{}", "no log_history"),
        ("trainer_state.json", '{"log_history": [{"step": 1, "loss": 2}]}', "no rewards/chosen"),
        (
            "trainer_state.json",
            '{"log_history": [{"step": 1, "rewards/chosen": "a", "rewards/rejected": 1}]}',
            "convert",
        ),
        ("trend.jsonl", '{"step": 1}\n', "trend.jsonl:1"),
        ("trend.jsonl", "", "no records"),
        ("other.txt", "", "neither trend.jsonl nor trainer_state.json"),
    ],
)
def test_other_sources_are_refused(name, text, words, run, tmp_path) -> None:
    """One line that names the file, and no figure."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(text)
    source = tmp_path / "run" / name if name != "other.txt" else tmp_path / "run"
    refusal = run(figures.main, "trend", source, "--out", tmp_path / "figure").refusal
    assert words in refusal
    assert str(tmp_path / "run") in refusal
    assert not list(tmp_path.glob("figure.*"))


def test_ranks_are_the_records(run, tmp_path) -> None:
    """Each of the K responses over training: the CSV is the mean over seeds by rank, by pandas; K may differ."""
    folder = tmp_path / "results"
    folder.mkdir()
    records = [{"seed": seed, "policy": f"{m}-hard", "method": m, "regime": "hard", "step": step, "split": "heldout",
                "chosen": {}, "rejected": {}, "ranks": [{"rank": rank, "r": number(m, seed, step, rank)}
                                                         for rank in range(1, k + 1)]}
               for m, k in (("nca", 4), ("dpo", 2)) for seed in (0, 1) for step in STEPS]  # fmt: skip
    write_lines(folder / "trend.jsonl", records)
    assert run(figures.main, "ranks", folder, "--out", tmp_path / "figure").code == 0
    frame = pandas.DataFrame([{**record, **rank} for record in records for rank in record["ranks"]])
    expected = frame.groupby(["method", "rank", "step"]).r.mean()
    found = {(r["method"], int(r["rank"]), round(float(r["share_of_training"]) * max(STEPS))): float(r["mean"])
             for r in rows_of(tmp_path / "figure.csv")}  # fmt: skip
    assert found == pytest.approx(expected.to_dict(), abs=1e-6)
    svg = (tmp_path / "figure.svg").read_text()
    for label in ("NCA, hard", "DPO, hard", "rank 1 (best)", "rank 4"):
        assert f"<!-- {label} -->" in svg


def write_ablation(folder: Path) -> Path:
    """Records of a grid over alpha and beta, of K = 2, 3 and of the plain policies (K = 4, and DPO's 2)."""
    names = [f"{m}-hard-a{a:g}-b{b:g}" for m in ("nca", "infonca") for a in (0.3, 1.0) for b in (0.1, 0.5)]
    names += ["dpo-hard-b0.1", "dpo-hard-b0.5", "nca-hard-k2", "nca-hard-k3", "nca-hard", "dpo-hard", "mu"]
    folder.mkdir()
    scores, trend = [], []
    for name in names:
        for seed in (0, 1, 2):
            value = number("score", name, seed)
            scores.append({"scale": "tiny", "seed": seed, "policy": name, "decoding": "sampled", "benchmark": "all",
                           "metric": "reward", "n": 9, "value": value, "low": value - 1, "high": value + 1,
                           "judge": "truth", "manifest": "0"})  # fmt: skip
            trend.append({"seed": seed, "policy": name, "step": 5, "split": "heldout", "kl": number("kl", name, seed)})
    write_lines(folder / "scores.jsonl", scores)
    write_lines(folder / "trend.jsonl", trend)
    write_lines(folder / "manifests.jsonl", [])
    return folder


def test_score_against_kl(run, tmp_path) -> None:
    """Every point of the grid over alpha and beta, with the mean and t interval of score and KL over seeds, by scipy;
    nothing else."""
    folder = write_ablation(tmp_path / "grid")
    assert run(figures.main, "kl", folder, "--out", tmp_path / "figure").code == 0
    rows = rows_of(tmp_path / "figure.csv")
    assert len(rows) == 10
    for row in rows:
        alpha = f"-a{float(row['alpha']):g}" if row["alpha"] else ""
        name = f"{row['method']}-{row['regime']}{alpha}-b{float(row['beta']):g}"
        for kind in ("score", "kl"):
            expected = student([number(kind, name, seed) for seed in (0, 1, 2)])
            assert [float(row[f"{kind}{end}"]) for end in ("", "_low", "_high")] == pytest.approx(expected, abs=1e-5)
    svg = (tmp_path / "figure.svg").read_text()
    for label in ("NCA, alpha 0.3", "InfoNCA, alpha 1", "DPO", "KL(pi || mu), nats a response"):
        assert f"<!-- {label} -->" in svg


def test_score_against_k(run, tmp_path) -> None:
    """K = 2 and 3 by their own names, K = 4 from the plain policy; methods without a run over K are not there."""
    folder = write_ablation(tmp_path / "grid")
    assert run(figures.main, "responses", folder, "--out", tmp_path / "figure").code == 0
    found = {int(row["K"]): float(row["score"]) for row in rows_of(tmp_path / "figure.csv")}
    names = {2: "nca-hard-k2", 3: "nca-hard-k3", 4: "nca-hard"}
    expected = {k: sum(number("score", name, seed) for seed in (0, 1, 2)) / 3 for k, name in names.items()}
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["kl", "responses"])
def test_no_ablation_no_figure(kind, run, tmp_path) -> None:
    """A results folder without an ablation is refused, in one line."""
    folder = write_results(tmp_path / "results", seeds=[0])
    assert "run the ablation" in run(figures.main, kind, folder, "--out", tmp_path / "figure").refusal
    assert not list(tmp_path.glob("figure.*"))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("nca-hard-a0.5-b1", ("nca", "hard", "0.5", "1", None)),
        ("nca-pair-beta0.003", ("nca-pair", None, None, "0.003", None)),
        ("nca-mistral-7b-K3", ("nca", "mistral-7b", None, None, "3")),
        ("infonca-alpha1e-3-beta0.01", ("infonca", None, "1e-3", "0.01", None)),
        ("dpo_x3-gentle", ("dpo_x3", "gentle", None, None, None)),
        ("mu", None),
        ("sft-hard-b1", None),
    ],
)
def test_names_of_policies(policy, expected) -> None:
    """What a policy's name says was varied."""
    matched = points.POLICY.fullmatch(policy)
    assert (matched and matched.groups()) == expected


def test_told_apart_in_grey() -> None:
    """Methods differ in colour, and two whose greys are close differ in dashes or marker; ranks darken in order."""
    looks = list(drawing.STYLES.values())
    assert len({color for color, *_ in looks}) == len(looks)
    assert len({(str(dashes), marker) for _, dashes, marker in looks}) == len(looks)
    greys = [numpy.dot(matplotlib.colormaps["cividis"](0.85 * i / 3)[:3], (0.299, 0.587, 0.114)) for i in range(4)]
    assert all(later - earlier > 0.1 for earlier, later in itertools.pairwise(greys))
