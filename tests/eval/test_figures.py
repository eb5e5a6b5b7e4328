"""eval.figures: the curves are the records, the picture shows them, and the published curves are the paper's."""

import csv
from pathlib import Path

import matplotlib.colors
import matplotlib.image
import numpy
import pandas
import pytest
from synthetic import METHODS, REGIMES, STEPS, write_results

from eval import curves, drawing, figures

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
