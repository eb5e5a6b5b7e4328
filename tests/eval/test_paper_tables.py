"""eval.tables --table: ours beside the paper's values; every cell is a record, a published value, or `not run`."""

import csv
import itertools
import json
import math
import os
import random
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas
import pytest
from synthetic import number, student, write_lines

from eval import tables

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "results" / "paper"
# The columns of the paper's Table 3, and the metric that stands for each.
TASKS = {
    "bbh": "substring", "leetcode": "pass@1", "humaneval": "pass@1", "gsm_plus": "math_verify", "math": "math_verify",
    "theoremqa": "answer", "svamp": "math_verify", "asdiv": "math_verify",
}  # fmt: skip
TABLE2 = {"mt_bench": "score", "alpaca_eval_1": "win_rate", "vs_dpo": "win_rate"}
Records = list[dict[str, Any]]


def record(policy: str, benchmark: str, metric: str, **other: Any) -> dict[str, Any]:
    value = random.Random(f"{policy}/{benchmark}/{other.get('seed')}").random()
    return {
        "scale": "mistral-7b", "seed": 42, "policy": policy, "decoding": "sampled", "benchmark": benchmark,
        "metric": metric, "n": 80, "value": value, "low": value - 0.1, "high": value + 0.2, "judge": "gpt-4-0613",
        "manifest": f"{policy} {benchmark}", **other,
    }  # fmt: skip


def table2_records(**other: Any) -> Records:
    policies = ("mu", "kto", "ipo", "dpo", "dpo-x3", "dpo-x6", "infonca", "nca", "nca-pair")
    return [record(p, b, m, **other) for p in policies for b, m in TABLE2.items() if (p, b) != ("dpo", "vs_dpo")]


def table3_records() -> Records:
    found = [record(p, b, m) for p in ("sft", "dpo", "nca") for b, m in {**TASKS, "gsm8k": "flexible-extract"}.items()]
    for item in found:
        item |= {"decoding": "sampled" if item["benchmark"] == "humaneval" else "greedy", "judge": item["benchmark"]}
    return found


def make(run: Callable[..., Any], folder: Path, table: str, scale: str, records: Records) -> list[dict[str, str]]:
    """The lines of the CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "scores.jsonl", records)
    assert run(tables.main, "--table", table, "--scale", scale, "--results", folder).code == 0
    with open(folder / f"{table}.csv", newline="") as file:
        return list(csv.DictReader(file))


def markdown_rows(text: str) -> list[list[str]]:
    """The lines of all tables in a Markdown text, heads left out."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] not in ("benchmark", "method") and not set(row[0]) <= set(":-")]


def latex_rows(text: str) -> list[list[str]]:
    """The lines between the rules of all tabulars, without escapes."""
    bodies = re.findall(r"\\midrule\n(.*?)\\bottomrule", text, re.S)
    return [
        [cell.replace("\\%", "%").replace("\\_", "_").strip() for cell in line.removesuffix(r"\\").split(" & ")]
        for body in bodies for line in body.strip().splitlines()
    ]  # fmt: skip


def published(name: str) -> dict[tuple[str, str, str], tuple[float, str]]:
    frame = pandas.read_csv(PAPER / f"{name}.csv", comment="#")
    return {(r.base, r.method, r.benchmark): (r.value, r.status) for r in frame.itertuples()}


def test_table2_is_the_records_beside_the_paper(run, tmp_path) -> None:
    """At the paper's scale each line has the record, the paper's value with its status, and their difference."""
    records = table2_records()
    lines = make(run, tmp_path, "table2", "mistral-7b", records)
    paper = published("table2")
    by_key = {(item["policy"], item["benchmark"]): item for item in records}
    names = {"MT-Bench": "mt_bench", "AlpacaEval 1, %": "alpaca_eval_1", "wins against DPO, %": "vs_dpo"}
    seen, shown = 0, markdown_rows((tmp_path / "table2.md").read_text())
    for line, cells in zip(lines, shown, strict=True):
        benchmark = names[line["benchmark"]]
        factor, digits = (1, 2) if benchmark == "mt_bench" else (100, 2 if benchmark == "alpaca_eval_1" else 1)
        found = by_key.get((line["policy"], benchmark))
        known = paper.get(("Mistral-7B", line["policy"].replace("-", "_"), benchmark))
        if found is None:
            assert line["status"] == ("itself" if line["policy"] == "dpo" else "not run")
            continue
        value, low, high = (factor * found[key] for key in ("value", "low", "high"))
        assert [float(line[key]) for key in ("ours", "ours_low", "ours_high")] == pytest.approx(
            [value, low, high], abs=1e-6
        )
        assert cells[3:5] == [f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]", "80"]
        assert line["manifests"] == found["manifest"]
        if known is None:
            assert cells[2] == cells[5] == "-"
            assert line["difference"] == ""
            continue
        seen += 1
        assert line["paper_status"] == known[1]
        assert float(cells[2].partition(" ")[0]) == known[0]
        assert cells[2].endswith(f"({known[1]})")
        differences = [float(line[key]) for key in ("difference", "difference_low", "difference_high")]
        assert differences == pytest.approx([value - known[0], low - known[0], high - known[0]], abs=1e-5)
        assert cells[5].startswith(f"{value - known[0]:.{digits}f} [")
    assert seen == len(paper) - 1  # DPO against itself


def test_without_a_record_its_line_is_not_run(run, tmp_path) -> None:
    """Take any one record away: its line says `not run`, has no number of ours, and no other line changes."""
    records = table2_records()
    whole = make(run, tmp_path, "table2", "mistral-7b", records)
    for gone in (0, 7, len(records) - 1):
        lines = make(run, tmp_path, "table2", "mistral-7b", records[:gone] + records[gone + 1 :])
        changed = [(a, b) for a, b in zip(whole, lines, strict=True) if a != b]
        assert [a["manifests"] for a, _ in changed] == [records[gone]["manifest"]]
        after = changed[0][1]
        assert after["status"] == "not run"
        assert not any(after[key] for key in ("ours", "ours_low", "ours_high", "n", "difference", "manifests"))
        cells = [row for row in markdown_rows((tmp_path / "table2.md").read_text()) if row[3] == "not run"]
        assert len(cells) == 1 + sum(line["status"] == "not run" for line in whole)
    assert [line["status"] for line in make(run, tmp_path / "none", "table2", "mistral-7b", [])].count("measured") == 0


@pytest.mark.parametrize(
    ("benchmark", "judge", "first"),
    [
        ("mt_bench", "gpt-4-1106-preview", True),  # one record of a column
        ("vs_dpo", "alpaca_eval_gpt4 by gpt-4o", True),
        ("mt_bench", "gpt-4-1106-preview", False),  # a whole column
        ("alpaca_eval_1", "alpaca_eval_gpt4 by gpt-4o", False),
    ],
)
def test_a_table_has_one_judge(run, tmp_path, benchmark: str, judge: str, first: bool) -> None:
    """One record by another judge, or one benchmark by another model: refused in one line, nothing is written."""
    records = table2_records()
    own = [item for item in records if item["benchmark"] == benchmark]
    for item in own[:1] if first else own:
        item["judge"] = judge
    write_lines(tmp_path / "scores.jsonl", records)
    refusal = run(tables.main, "--table", "table2", "--scale", "mistral-7b", "--results", tmp_path).refusal
    assert judge.rpartition(" ")[2] in refusal
    assert "gpt-4-0613" in refusal
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]


def test_one_model_through_two_programs_is_one_judge(run, tmp_path) -> None:
    """MT-Bench and AlpacaEval asked the same model; comparisons that needed no call have no judge."""
    records = table2_records()
    for item in records:
        if item["benchmark"] != "mt_bench":
            item["judge"] = "alpaca_eval_gpt4 by gpt-4-0613"
        if item["policy"] == "kto" and item["benchmark"] == "vs_dpo":
            item["judge"] = "alpaca_eval_gpt4 by nobody: all answers are equal"
    assert make(run, tmp_path, "table2", "mistral-7b", records)


def test_no_difference_between_scales(run, tmp_path) -> None:
    """At the tiny scale the paper stands beside for orientation: no difference, said so; and records of two scales are
    no table."""
    records = []
    for policy in ("mu", "nca-hard", "dpo-hard", "nca-gentle"):
        for seed in (0, 1, 2):
            records += [record(policy, b, m, scale="tiny", seed=seed, judge="truth") for b, m in TABLE2.items()]
    lines = make(run, tmp_path, "table2", "tiny", records)
    assert {line["difference"] for line in lines} == {""}
    text = (tmp_path / "table2.md").read_text()
    assert "less paper" not in text
    assert "No difference is formed between scales" in text
    (line,) = [x for x in lines if x["policy"] == "nca-hard" and x["benchmark"] == "MT-Bench"]
    value, low, high = student(
        [x["value"] for x in records if (x["policy"], x["benchmark"]) == ("nca-hard", "mt_bench")]
    )
    assert [float(line[key]) for key in ("ours", "ours_low", "ours_high")] == pytest.approx(
        [value, low, high], abs=1e-6
    )
    assert line["seeds"] == "3"
    records[0]["scale"] = "mistral-7b"
    write_lines(tmp_path / "scores.jsonl", records)
    refusal = run(tables.main, "--table", "table2", "--scale", "tiny", "--results", tmp_path).refusal
    assert "mistral-7b" in refusal


def test_table3_average(run, tmp_path) -> None:
    """The average is that of the paper's eight tasks, without GSM8K, and is not run where one of them is not."""
    records = table3_records()
    lines = make(run, tmp_path, "table3", "mistral-7b", records)
    for policy in ("sft", "dpo", "nca"):
        eight = [100 * item["value"] for item in records if item["policy"] == policy and item["benchmark"] in TASKS]
        (line,) = [x for x in lines if x["policy"] == policy and x["benchmark"].startswith("average")]
        assert float(line["ours"]) == pytest.approx(math.fsum(eight) / 8, abs=1e-5)
        assert float(line["difference"]) == pytest.approx(
            math.fsum(eight) / 8 - published("table3")["Mistral-7B", policy, "average"][0], abs=1e-5
        )
    lines = make(run, tmp_path, "table3", "mistral-7b", [x for x in records if x["manifest"] != "nca svamp"])
    found = {x["policy"]: x["status"] for x in lines if x["benchmark"].startswith("average")}
    assert found == {"sft": "measured", "dpo": "measured", "nca": "not run"}


def test_latex_is_the_markdown(run, tmp_path) -> None:
    """The LaTeX tables have booktabs' rules, as many columns in each line as declared, and the Markdown's cells."""
    for table, scale, records in (
        ("table2", "mistral-7b", table2_records()), ("table3", "mistral-7b", table3_records()), ("figure6", "tiny", []),
        ("table2", "tiny", []),
    ):  # fmt: skip
        folder = tmp_path / f"{table} {scale}"
        make(run, folder, table, scale, records)
        text, marked = ((folder / f"{table}.{ending}").read_text() for ending in ("tex", "md"))
        rows = latex_rows(text)
        assert rows == markdown_rows(marked)
        columns = re.findall(r"\\begin\{tabular\}\{(l+)\}", text)
        assert {len(row) for row in rows} == {len(found) for found in columns}
        assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == len(columns)
        assert not re.search(r"(?<!\\)[%_&#$](?! )", re.sub(r"^%.*$|label\{[^}]*\}", "", text, flags=re.M))


def test_grid_lines_are_records(run, tmp_path) -> None:
    """Figure 4 and 6 at the tiny scale: the score with its interval over seeds, and KL and log-ratios of the last
    held-out record; the names say K, alpha and beta; the paper's points are unknown."""
    pattern = re.compile(r"(\w+)-hard-(?:k(\d)|a([\d.]+)-b([\d.]+))")
    for figure, count in (("figure4", 6), ("figure6", 16)):
        folder = tmp_path / figure
        policies = [line["policy"] for line in make(run, folder, figure, "tiny", [])]
        assert len(set(policies)) == count
        records = [record(p, "all", "reward", scale="tiny", seed=s, judge="truth") for p in policies for s in (0, 1)]
        trend = [
            {"policy": p, "seed": s, "step": step, "split": split, "kl": number(p, s, step, split, "kl"),
             **{side: {"log_ratio": number(p, s, step, split, side)} for side in ("chosen", "rejected")}}
            for p in policies for s in (0, 1) for step in (0, 7) for split in ("heldout", "train")
        ]  # fmt: skip
        folder.mkdir(exist_ok=True)
        write_lines(folder / "trend.jsonl", trend)
        for line in make(run, folder, figure, "tiny", records):
            policy = line["policy"]
            method, k, alpha, beta = pattern.fullmatch(policy).groups()
            assert line["K"] == (k or ("2" if method in ("dpo", "nca_pair") else "4"))
            assert (line["alpha"], line["beta"]) == ((alpha, beta) if alpha else ("1", "0.5"))
            scores = [x["value"] for x in records if x["policy"] == policy]
            found = [float(line[key]) for key in ("ours", "ours_low", "ours_high")]
            assert found == pytest.approx(student(scores), abs=1e-6)
            for name, key in (("KL(pi, mu)", "kl"), ("chosen", "chosen"), ("rejected", "rejected")):
                ends = [number(policy, s, 7, "heldout", key) for s in (0, 1)]
                found = [float(line[f"{name}{which}"]) for which in ("", "_low", "_high")]
                assert found == pytest.approx(student(ends), abs=1e-6)
            assert (line["paper"], line["paper_status"]) == ("", "unknown")


def dry_run(part: str) -> Iterable[tuple[str, list[str]]]:
    """Name and words of each run that scripts/train_mistral7b.sh would make."""
    done = subprocess.run(
        ["bash", "scripts/train_mistral7b.sh", "--dry-run", part], cwd=ROOT, env={**os.environ, "PYTHON": "echo"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line]
    return [(name.removeprefix("# "), words.split()) for name, words in zip(lines[::2], lines[1::2], strict=True)]


def test_grids_of_the_paper_scale_are_the_runs_of_its_script() -> None:
    """The grid of a table names exactly the runs that scripts/train_mistral7b.sh makes, with their method, alpha, beta
    and K."""
    from eval.grids import figure4, figure6

    made = dict(dry_run("figure6"))
    points = {point.run: point for point in figure6("mistral-7b")}
    assert set(points) == set(made)
    for name, words in made.items():
        option = dict(itertools.pairwise(words))
        point = points[name]
        assert option["-m"] == f"train.{point.method}"
        assert float(option["--beta"]) == point.beta
        assert float(option.get("--alpha", 0)) == point.alpha
        assert Path(option["--recipe"]).stem == point.data
    made = {**dict(dry_run("figure4")), **dict(dry_run("table2"))}
    for point in figure4("mistral-7b"):
        option = dict(itertools.pairwise(made[point.run]))
        assert option["-m"] == f"train.{point.method}"
        assert option.get("--rows", "K4.").find(f"K{point.k}") >= 0


def test_published_values_hold_together() -> None:
    """What is known of the unverified cells: whole rows of Table 3 average to the secondary average, code and
    TheoremQA are shares of their numbers of questions, wins are shares of 160. And Eurus's averages are its rows'."""
    third = published("table3")
    for base in ("Mistral-7B", "Mixtral-8x7B"):
        for method in ("sft", "dpo", "nca"):
            row = [third[base, method, task][0] for task in TASKS]
            average, status = third[base, method, "average"]
            assert status == "secondary"
            if not any(map(math.isnan, row)):
                assert abs(math.fsum(row) / 8 - average) < 0.051
            for task, n in (("humaneval", 164), ("leetcode", 180), ("theoremqa", 800)):
                value, shares = third[base, method, task][0], [100 * k / n for k in range(n + 1)]
                # 46 of 164 is 28.05, printed as 28.1
                assert math.isnan(value) or min(abs(share - value) for share in shares) < 0.052
    second = published("table2")
    assert {status for _, status in second.values()} == {"unverified"}
    wins = [value for (_, _, benchmark), (value, _) in second.items() if benchmark == "vs_dpo"]
    assert all(min(abs(100 * k / 160 - value) for k in range(161)) < 0.051 for value in wins)
    assert len(second) == 8 * 2 + 5  # KTO and IPO have no wins against DPO
    eurus = pandas.read_csv(PAPER / "eurus_benchmarks.csv", comment="#").pivot(
        index="model", columns="benchmark", values="value"
    )
    eurus = eurus.dropna(subset=["Avg"])
    twelve = eurus.drop(columns=["Avg", "MMLU", "MT-Bench"]).mean(axis=1)
    assert (twelve - eurus.Avg).abs().max() < 0.06


def test_bad_arguments(run, tmp_path) -> None:
    """One line each: a table without a scale, neither form, a scale that the paper's table has not, a record twice."""
    words = ("--results", tmp_path)
    assert "--scale" in run(tables.main, "--table", "table2").refusal
    assert "--results" in run(tables.main).refusal
    assert "Mistral-7B alone" in run(tables.main, "--table", "figure4", "--scale", "mixtral-8x7b", *words).refusal
    records = table2_records()
    write_lines(tmp_path / "scores.jsonl", [*records, records[0]])
    assert "two records of mu" in run(tables.main, "--table", "table2", "--scale", "mistral-7b", *words).refusal
    (tmp_path / "scores.jsonl").write_text(json.dumps({**records[0], "value": "x"}) + "\n")
    assert "scores.jsonl:1" in run(tables.main, "--table", "table2", "--scale", "mistral-7b", *words).refusal
