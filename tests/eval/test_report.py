"""eval.report: one file that opens from disk in a real browser, shows the records, and leads from a cell to them."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from browser import Browser
from PIL import Image
from synthetic import write_lines, write_results

from eval import claims, report, tables

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "results" / "tiny"
NAMES = ("scores.jsonl", "trend.jsonl", "manifests.jsonl", "tables.md", "claims.md", "theory.md")
HOSTILE = '</script><img src=x onerror="window.hacked=1"><!--<b>& \''
Build = Callable[..., Path]


@pytest.fixture
def build(run) -> Build:
    """Write the report of a folder; returns its path."""

    def call(folder: Path) -> Path:
        out = folder.parent / "out" / f"{folder.name}.html"
        done = run(report.main, "--results", folder, "--out", out)
        assert done.code == 0, done.err
        return out

    return call


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """One Chromium for all tests of this file."""
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture
def tiny(build, browser, tmp_path) -> Browser:
    """The report of the committed results, opened from a path with a space and an umlaut."""
    folder = tmp_path / "with a spaß" / "tiny"
    folder.mkdir(parents=True)
    for name in NAMES:
        shutil.copy(TINY / name, folder)
    browser.errors.clear()
    browser.requests.clear()
    browser.open(build(folder))
    return browser


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def drawn(browser: Browser) -> dict[str, list[str]]:
    """Title of each panel to the names of its lines, in order."""
    return browser.value(
        "Object.fromEntries([...document.querySelectorAll('#plots svg')].map(svg => "
        "[svg.querySelector('.title').textContent, [...svg.querySelectorAll('path')].map(path => path.dataset.line)]))"
    )


def only(browser: Browser, name: str, wanted: list[str]) -> None:
    """Click the boxes of a name until exactly the wanted are checked."""
    for value, checked in browser.value(
        f"[...document.querySelectorAll('input[name={name}]')].map(b => [b.value, b.checked])"
    ):
        if checked != (value in wanted):
            browser.click(f"input[name={name}][value={json.dumps(value)}]")


def test_opens_from_disk(tiny) -> None:
    """No console error, no request beside the file itself, and a picture that is not blank."""
    assert tiny.errors == []
    assert len(tiny.requests) == 1
    assert tiny.requests[0].startswith("file://")
    picture = numpy.asarray(Image.open(BytesIO(tiny.screenshot())).convert("RGB"))
    assert 0.02 < (picture.min(-1) < 200).mean() < 0.5
    assert len(numpy.unique(picture.reshape(-1, 3), axis=0)) > 50
    assert list(drawn(tiny)) == ["chosen, gentle", "chosen, hard", "rejected, gentle", "rejected, hard"]


def test_methods_and_seeds_are_chosen(tiny) -> None:
    """A click on a method's box adds its lines (one for each seed and their mean), one on a seed's takes them away."""
    only(tiny, "method", ["dpo"])
    assert set(map(tuple, drawn(tiny).values())) == {("DPO",) * 4}
    only(tiny, "method", ["dpo", "kto"])
    assert set(map(tuple, drawn(tiny).values())) == {("KTO",) * 4 + ("DPO",) * 4}
    only(tiny, "seed", ["1"])
    assert set(map(tuple, drawn(tiny).values())) == {("KTO", "DPO")}
    only(tiny, "method", [])
    assert set(map(tuple, drawn(tiny).values())) == {()}
    assert tiny.errors == []


@pytest.mark.parametrize(
    ("quantity", "tokens", "split", "key"),
    [
        ("log_ratio", "", "heldout", "log_ratio"),
        ("r", "_per_token", "train", "r_per_token"),
        ("logps", "", "train", "logps"),
    ],
)
def test_hover_shows_the_record(quantity, tokens, split, key, tiny) -> None:
    """With one method and seed, the mouse on the last point of a line shows the value that trend.jsonl has there."""
    for selector, value in (("#quantity", quantity), ("#tokens", tokens), ("#split", split)):
        tiny.choose(selector, value)
    only(tiny, "method", ["dpo"])
    only(tiny, "seed", ["2"])
    svg = "document.querySelectorAll('#plots svg')[1]"
    tiny.value(f"{svg}.scrollIntoView({{block: 'center'}})")
    x, y, width, left, top = tiny.value(
        f"(svg => {{ const box = svg.getBoundingClientRect(), d = svg.querySelector('path').getAttribute('d');"
        f"return [...d.split('L').pop().split(' ').map(Number), box.width, box.left, box.top] }})({svg})"
    )
    tiny.move(left + x * width / 460, top + y * width / 460)
    records = [r for r in lines_of(TINY / "trend.jsonl")
               if (r["policy"], r["seed"], r["split"]) == ("dpo-hard", 2, split)]  # fmt: skip
    text = tiny.value("document.querySelector('#tooltip').innerText")
    value = float(re.match(r"DPO: (\S+)", text).group(1))
    assert value == pytest.approx(records[-1]["chosen"][key], rel=1e-4)
    assert f"seed 2, step {records[-1]['step']}, {records[-1]['prompts']} prompts" in text
    assert tiny.errors == []


def test_ranks_and_the_paper(tiny) -> None:
    """By rank there is a panel for each method and regime with four lines; the paper's curves come in r alone."""
    tiny.click("#paper")
    assert not tiny.value("document.querySelector('#paper').checked")  # not in log-ratios
    tiny.choose("#quantity", "r")
    tiny.click("#paper")
    found = drawn(tiny)
    assert "NCA, pairs, paper (7B)" in found["chosen, hard"]
    assert "NCA, pairs, paper (7B)" in tiny.value("document.querySelector('#legend').innerText")
    only(tiny, "method", ["nca", "infonca"])
    only(tiny, "seed", ["0"])
    tiny.choose("#sides", "ranks")
    ranks = ["rank 1 (best)", "rank 2", "rank 3", "rank 4"]
    expected = {f"{m}, {regime}": ranks for regime in ("gentle", "hard") for m in ("InfoNCA", "NCA")}
    assert drawn(tiny) == expected
    assert tiny.errors == []


CELLS = """[...document.querySelectorAll('#doc-ID td')].map(cell => {
  const table = cell.closest('table'), head = [...table.querySelectorAll('th')].map(th => th.textContent);
  const row = [...cell.parentNode.children].map(td => td.textContent);
  return [head[cell.cellIndex], row, cell.textContent, (cell.dataset.records || '').split(' ').filter(x => x)] })"""


def test_every_number_of_the_tables_leads_to_its_records(tiny) -> None:
    """Every measured cell has references, and its number is the mean over them: recomputed from the lines of the
    .jsonl files that the references name."""
    scores, trend = lines_of(TINY / "scores.jsonl"), lines_of(TINY / "trend.jsonl")
    runs = tiny.value("DATA.trend.map(run => run.lines)")
    paths = {"KL(pi, mu)": ["kl"], "chosen": ["chosen", "log_ratio"], "rejected": ["rejected", "log_ratio"],
             "accuracy": ["accuracy"]}  # fmt: skip
    checked = 0
    for column, row, text, references in tiny.value(CELLS.replace("ID", "tables")):
        if column in ("method", "K") or text == "-":
            assert references == []
            continue
        assert len(references) == 3, (column, row)
        if column in ("responses", "tokens"):
            continue
        values = []
        for reference in references:
            if reference[0] == "s":
                values.append(scores[int(reference[1:])]["value"])
            else:
                value: Any = trend[runs[int(reference[1:])][-1] - 1]
                for key in paths[column]:
                    value = value[key]
                values.append(value)
        shown = float(text.split()[0])
        assert shown == pytest.approx(
            sum(values) / 3, abs=0.0051 if len(text.split()[0].split(".")[1]) == 2 else 0.00051
        )
        checked += 1
    assert checked == 2 * (8 * 13 + 7 - 1)  # regimes; methods by columns, mu's own, DPO against itself


def test_from_a_claim_to_its_commands_and_manifests(tiny) -> None:
    """A click on a verdict shows the records behind it with the commands that trained the policies; a manifest's link
    opens it, and its hash is that of its identity, recomputed from the page."""
    cells = tiny.value(CELLS.replace("ID", "claims"))
    claim = "pairwise NCA keeps it higher than DPO (same pairs) (> 0)"
    (index,) = [i for i, (name, row, *_) in enumerate(cells) if name == "verdict" and row[:2] == [claim, "hard"]]
    tiny.value(f"document.querySelectorAll('#doc-claims td')[{index}].id = 'wanted'")
    tiny.click("#wanted")
    text = tiny.value("document.querySelector('#panel').innerText")
    assert "6 records" in text
    for method in ("dpo", "nca_pair"):
        for seed in range(3):
            assert re.search(rf"python -m train.{method} .*--seed {seed} ", text)
    tiny.click("#detail a")
    entry = "document.querySelector('#manifest-list details[open]')"
    identity = json.loads(tiny.wait(f"{entry}?.querySelector('.identity')?.textContent"))
    assert tiny.value("document.querySelector('#panel').hidden")
    canonical = json.dumps(identity, ensure_ascii=False, sort_keys=True)
    (manifest,) = [line for line in lines_of(TINY / "manifests.jsonl") if line["identity"] == identity]
    assert hashlib.sha256(canonical.encode()).hexdigest() == manifest["hash"]
    assert tiny.value(f"{entry}.id") == f"manifest={manifest['hash']}"
    assert manifest["command"] in tiny.value(f"{entry}.innerText")
    assert tiny.errors == []


def test_records_are_filtered(tiny) -> None:
    """The filters leave the records that match, counted here from scores.jsonl."""
    wanted = {"policy": "nca-hard", "metric": "reward", "decoding": "greedy"}
    for name, value in wanted.items():
        tiny.choose(f"#filters select[name={name}]", value)
    expected = [r for r in lines_of(TINY / "scores.jsonl") if all(r[name] == value for name, value in wanted.items())]
    assert tiny.value("document.querySelectorAll('#scores tbody tr').length") == len(expected) > 3
    assert tiny.value("document.querySelector('#found').innerText").startswith(f"{len(expected)} records")


def test_hostile_text_stays_text(build, browser, tmp_path) -> None:
    """Names and texts that would be markup, in every kind of record and in Markdown, are shown and never run: no
    element of theirs, no script, no request."""
    folder = write_results(tmp_path / "tiny")
    for name, fields in (("scores", ("policy", "benchmark", "judge")), ("trend", ("policy", "method", "regime")),
                         ("manifests", ("hash", "stage", "command"))):  # fmt: skip
        lines = lines_of(folder / f"{name}.jsonl")
        write_lines(folder / f"{name}.jsonl", [{**lines[0], **dict.fromkeys(fields, HOSTILE)}, *lines])
    links = "![x](https://example.org/x.png) [y](javascript:window.hacked=1)"
    (folder / "other.md").write_text(f"# {HOSTILE}\n\n| a |\n|---|\n| {HOSTILE} |\n\n{links}\n")
    (tmp_path / "registry.yaml").write_text(yaml.safe_dump({"figure2": {"title": HOSTILE, "status": HOSTILE}}))
    page = build(folder)
    browser.errors.clear()
    browser.requests.clear()
    browser.open(page)
    only(browser, "method", [HOSTILE])
    assert browser.errors == []
    assert len(browser.requests) == 1
    assert browser.value("window.hacked") is None
    assert browser.value("document.querySelectorAll('img, iframe, main b, a[href^=\"javascript\"]').length") == 0
    for place in ("#scores", "#manifest-list", "#methods", "#doc-other", "#registry", "#filters"):
        text = browser.value(f"document.querySelector({place!r}).textContent")
        assert HOSTILE in text, place


def test_tables_of_subfolders_lead_to_their_records(build, tmp_path) -> None:
    """A table whose .csv names policy and manifests leads to the score records of its own folder that its number is
    the mean of, in per cent or not; without such to the manifests; a line without any leads nowhere."""
    folder = write_results(tmp_path / "tiny", seeds=[0])
    below = folder / "table2"
    below.mkdir()
    score = lines_of(folder / "scores.jsonl")[0]
    values = [
        ("nca", "one", 0.25, "abc"),
        ("nca", "one", 0.5, "def"),
        ("nca", "two", 0.75, "abc"),
        ("dpo", "one", 9.0, "g"),
    ]
    write_lines(below / "scores.jsonl", [
        {**score, "policy": policy, "benchmark": benchmark, "value": value, "low": value, "high": value,
         "manifest": manifest} for policy, benchmark, value, manifest in values
    ])  # fmt: skip
    rows = [("NCA", "nca", 37.5, "abc def"), ("DPO", "dpo", 9, "g"), ("IPO", "ipo", 1, "hij"), ("KTO", "kto", "", "")]
    lines = [",".join(map(str, row)) for row in (("method", "policy", "ours", "manifests"), *rows)]
    (below / "table2.csv").write_text("\n".join(lines) + "\n")
    cells = [f"| {row[0]} | 1 | {row[2] or 'not run'} |" for row in rows]
    (below / "table2.md").write_text(
        "\n".join(["# T", "", "| method | paper | ours |", "|---|---|---|", *cells]) + "\n"
    )
    html = build(folder).read_text()
    place = len(lines_of(folder / "scores.jsonl"))
    document = html[html.index('<section id="doc-table2-table2"') :]
    document = document[: document.index("</section>")]
    expected = [f"s{place} s{place + 1}", f"s{place + 3}", "mhij"]
    assert re.findall(r'data-records="([^"]*)"', document) == expected


def test_without_a_record_its_cells_lead_nowhere(build, run, tmp_path) -> None:
    """Policies without records are `not run` in the tables and have no reference, in the claims neither."""
    folder = write_results(tmp_path / "tiny", without=["nca-hard"])
    for command in (tables.main, claims.main):
        assert run(command, "--results", folder).code == 0
    html = build(folder).read_text()
    written = sum((folder / name).read_text().count("| not run ") for name in ("tables.md", "claims.md"))
    assert html.count("<td>not run</td>") == written > 13
    assert not re.search(r"<td[^>]*data-records[^>]*>not run</td>", html)


def test_same_records_same_bytes(build, tmp_path) -> None:
    """Written twice it is the same; another record makes another page."""
    folder = write_results(tmp_path / "tiny")
    first = build(folder).read_bytes()
    assert build(folder).read_bytes() == first
    write_results(folder, without=["kto-hard"])
    assert build(folder).read_bytes() != first


def test_registry_is_shown(build, tmp_path) -> None:
    """Without a registry, with an empty one and with entries there is a page; each entry has its status at the scale
    of the records, and its expected values are there."""
    folder = write_results(tmp_path / "tiny", seeds=[0])
    assert 'id="registry"' not in build(folder).read_text()
    (tmp_path / "registry.yaml").write_text("")
    assert 'id="registry"' not in build(folder).read_text()
    entries = {
        "table2": {"of": "Table 2", "title": "T", "command": "bash scripts/reproduce.sh",
                   "expected": [{"file": "a.csv"}],
                   "status": {"tiny": "partial: no judge", "mistral-7b": "not run: money"}},
        "figure1": {"of": "Figure 1", "title": "D", "expected": [], "status": {"mistral-7b": "not run: a diagram"}},
    }  # fmt: skip
    (tmp_path / "registry.yaml").write_text(yaml.safe_dump(entries))
    html = build(folder).read_text()
    assert "<td>partial: no judge</td><td><code>bash scripts/reproduce.sh</code></td>" in html
    assert "- file: a.csv" in html
    assert "<td>not run: money</td>" not in html


@pytest.mark.parametrize("damage", ["no folder", "empty", "scales", "line", "trend", "registry"])
def test_refusals(damage, run, tmp_path) -> None:
    """One line that names the place; no page."""
    folder, words = tmp_path / "tiny", damage
    if damage != "no folder":
        write_results(folder, seeds=[0])
    if damage == "empty":
        for name in ("scores", "trend", "manifests"):
            (folder / f"{name}.jsonl").unlink()
        words = "nothing to report"
    elif damage == "scales":
        lines = lines_of(folder / "scores.jsonl")
        write_lines(folder / "scores.jsonl", [*lines, {**lines[0], "scale": "mistral-7b"}])
        words = "records of mistral-7b and tiny"
    elif damage == "line":
        with open(folder / "scores.jsonl", "a") as file:
            file.write("{\n")
        words = "scores.jsonl:"
    elif damage == "trend":
        write_lines(folder / "trend.jsonl", [{"step": 1}])
        words = "trend.jsonl:1"
    elif damage == "registry":
        (tmp_path / "registry.yaml").write_text("a: [")
        words = "registry.yaml"
    else:
        words = "no such folder"
    refusal = run(report.main, "--results", folder, "--out", tmp_path / "page.html").refusal
    assert words in refusal
    assert not (tmp_path / "page.html").exists()
