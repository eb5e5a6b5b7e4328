"""The report of one scale: a single HTML file that opens from disk, without a server or a network.

    python -m eval.report --results results/tiny --out results/tiny/report.html

It shows what lies in RESULTS and in the folders below it: every .md file (claims, tables), the likelihood trend as
plots to choose from, all score records and all manifests; and the registry of tables and figures, where it is there
(RESULTS/../registry.yaml). A number in a table leads to its records, and a record to its manifest and command.
Everything is embedded; scripts run from one hash-listed block only, and all text of records is shown as text.
"""

import argparse
import base64
import csv
import dataclasses
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from data_prep.files import InputError, read_jsonl, run_command, sha256_file, to_json, write_text
from eval import claims, tables
from eval.curves import QUANTITIES, read_paper
from eval.drawing import STYLES
from eval.records import METHODS, REGIMES, Results, read_scores

PAGE = Path(__file__).with_name("page")
PAPER = Path(__file__).resolve().parents[1] / "results" / "paper" / "figure2_likelihood.csv"
FIRST = ("claims.md", "tables.md")  # in this order; then the others by name
NOTHING = ("", "-", "not run")  # cells behind which there is no record
# References of a cell, from the heading above its table, the number of its row in the file, the row and the column.
Links = Callable[[str, int, dict[str, str], str], list[str]]


class Traced(dict):
    """A look-up that notes which of its keys were asked for."""

    def __init__(self, items: dict[Any, Any]):
        """items: what is looked up."""
        super().__init__(items)
        self.asked: list[Any] = []

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dict."""
        self.asked += [key] * (key in self)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.asked.append(key)
        return super().__getitem__(key)


@dataclasses.dataclass
class Records:
    """All records of the folders, numbered; a reference is "s3" (score), "t5" (trend of one run) or "m" + hash."""

    scores: list[dict[str, Any]]
    trend: list[dict[str, Any]]  # one entry for each run and split, with its values over the steps
    manifests: list[dict[str, Any]]

    @classmethod
    def read(cls, root: Path) -> "Records":
        """Read scores.jsonl, trend.jsonl and manifests.jsonl of `root` and the folders below it."""
        found = cls([], [], [])
        for folder in folders(root):
            name = folder.relative_to(root).as_posix()
            if (folder / "scores.jsonl").exists():
                for line, score in enumerate(read_scores(folder / "scores.jsonl"), start=1):
                    found.scores.append({"folder": name, "line": line, **dataclasses.asdict(score)})
            if (folder / "trend.jsonl").exists():
                found.trend += trend_of(folder / "trend.jsonl", name)
            if (folder / "manifests.jsonl").exists():
                for _, record in read_jsonl(folder / "manifests.jsonl"):
                    # As text: JavaScript would write 1.0 as 1, and the hash is that of the text.
                    identity = to_json(record.get("identity", {}), indent=1)
                    found.manifests.append({"folder": name, **record, "identity": identity})
        return found

    def tracer(self, folder: str, results: Results) -> Callable[[Callable[[Results], Any]], list[str]]:
        """A function that says which records a computation on `results` reads."""
        traced = dataclasses.replace(
            results, scores=Traced(results.scores), ends=Traced(results.ends), work=Traced(results.work)
        )
        scores: dict[tuple[str, ...], list[str]] = {}
        for i, score in enumerate(self.scores):
            if score["folder"] == folder:
                key = tuple(score[name] for name in ("policy", "decoding", "benchmark", "metric"))
                scores.setdefault(key, []).append(f"s{i}")
        runs: dict[str, list[str]] = {}
        for i, run in enumerate(self.trend):
            if run["folder"] == folder and run["split"] == "heldout":
                runs.setdefault(run["policy"], []).append(f"t{i}")

        def trace(compute: Callable[[Results], Any]) -> list[str]:
            for looked_up in (traced.scores, traced.ends, traced.work):
                looked_up.asked.clear()
            compute(traced)
            found = [reference for key in traced.scores.asked for reference in scores[key]]
            found += [reference for key in (*traced.ends.asked, *traced.work.asked) for reference in runs.get(key, [])]
            return list(dict.fromkeys(found))

        return trace


def folders(root: Path) -> list[Path]:
    """The folder and those below it."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; name one with records, such as results/tiny")
    return [root, *sorted(path for path in root.rglob("*") if path.is_dir())]


def trend_of(path: Path, folder: str) -> list[dict[str, Any]]:
    """The records of a trend.jsonl, as one entry for each run and split: lists of values over its steps."""
    runs: dict[tuple[str, int, str], dict[str, Any]] = {}
    for line, record in read_jsonl(path):
        try:
            names = {key: record[key] for key in ("policy", "method", "regime", "seed", "split", "manifest")}
            run = runs.setdefault(
                (names["policy"], names["seed"], names["split"]),
                {"folder": folder, **names, "beta": record.get("beta"), "lines": [], "steps": [], "kl": [],
                 "accuracy": [], "prompts": record.get("prompts"), "series": {}},
            )  # fmt: skip
            run["lines"].append(line)
            run["steps"].append(record["step"])
            run["kl"].append(record.get("kl"))
            run["accuracy"].append(record.get("accuracy"))
            sides = {"chosen": record["chosen"], "rejected": record["rejected"]}
            sides |= {f"rank {found['rank']}": found for found in record.get("ranks", [])}
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}:{line}: not a trend record ({error}); collect again") from None
        for side, values in sides.items():
            series = run["series"].setdefault(side, {})
            for quantity in QUANTITIES:
                if quantity in values:
                    series.setdefault(quantity, []).append(values[quantity])
    return list(runs.values())


def links(folder: Path, path: Path, records: Records, root: Path) -> Links:
    """What leads from a cell of a Markdown file's tables to its records: for tables.md and claims.md what its cell
    was computed from, for another table the manifests and records that the .csv beside it names."""
    name = folder.relative_to(root).as_posix()
    if path.name in ("tables.md", "claims.md") and (folder / "scores.jsonl").exists():
        trace = records.tracer(name, Results.read(folder))
        return (table_links if path.name == "tables.md" else claim_links)(trace)
    if path.with_suffix(".csv").exists():
        with open(path.with_suffix(".csv"), newline="", encoding="utf-8") as file:
            return csv_links(list(csv.DictReader(file)), name, records)
    return lambda *_: []


def table_links(trace: Callable[[Callable[[Results], Any]], list[str]]) -> Links:
    """References of eval.tables' cells."""

    def find(heading: str, number: int, row: dict[str, str], column: str) -> list[str]:
        regime = next((regime for regime in REGIMES if regime in heading.lower()), "")
        policy = {label: policy for policy, label in tables.policies(regime).items()}.get(row.get("method"))
        if policy is None or column in ("method", "K"):
            return []
        cells = {**tables.QUALITY, **tables.TASKS}
        if column in cells:
            return trace(lambda results: cells[column][0](results, policy))
        return trace(lambda results: results.work.get(policy))

    return find


def claim_links(trace: Callable[[Callable[[Results], Any]], list[str]]) -> Links:
    """References of eval.claims' cells: the measured value, its seeds and the verdict."""
    known = {f"{claim.text} ({'>' if claim.above else '<'} {claim.threshold:g})": claim for claim in claims.CLAIMS}

    def find(heading: str, number: int, row: dict[str, str], column: str) -> list[str]:
        if column in ("claim", "regime") or row.get("claim") not in known:
            return []
        return trace(lambda results: known[row["claim"]].quantity(results, row["regime"]))

    return find


def csv_links(rows: list[dict[str, str]], folder: str, records: Records) -> Links:
    """References of a table whose CSV has the same rows, in the same order, with `policy` and `manifests`."""

    def find(heading: str, number: int, row: dict[str, str], column: str) -> list[str]:
        if column != "ours" or number >= len(rows):
            return []
        found = rows[number]
        named = set((found.get("manifests") or "").split())
        wanted = [
            f"s{i}"
            for i, score in enumerate(records.scores)
            if score["folder"] == folder and score["policy"] == found.get("policy") and score["manifest"] in named
        ]
        return wanted or [f"m{name}" for name in sorted(named)]

    return find


def render(text: str, find: Links) -> Markup:
    """Markdown to HTML: raw HTML in it is shown as text, pictures are left out, cells of tables get their
    references."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = markdown.parse(text)
    heading, number, head, cells = "", 0, [], []
    for token, after in itertools.pairwise(tokens):
        if token.type == "heading_open":
            heading = after.content
        elif token.type == "thead_open":
            head = []
        elif token.type == "th_open":
            head.append(plain(after))
        elif token.type == "tr_open":
            cells = []
        elif token.type == "td_open":
            cells.append((token, plain(after)))
        elif token.type == "tr_close" and cells:
            row = dict(zip(head, (text for _, text in cells), strict=False))
            for (cell, text), column in zip(cells, head, strict=False):
                references = [] if text in NOTHING else find(heading, number, row, column)
                if references:
                    cell.attrSet("data-records", " ".join(references))
            number += 1
    return Markup(markdown.renderer.render(tokens, markdown.options, {}))


def plain(inline: Token) -> str:
    """The text of a cell."""
    return "".join(child.content for child in inline.children or [])


def documents(root: Path, records: Records) -> list[dict[str, Any]]:
    """Every .md file below `root`, as HTML."""
    paths = [path for folder in folders(root) for path in sorted(folder.glob("*.md"))]
    order = {name: place for place, name in enumerate(FIRST)}
    paths.sort(key=lambda path: (path.parent != root, order.get(path.name, len(FIRST)), path.as_posix()))
    found = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        html = render(path.read_text(encoding="utf-8"), links(path.parent, path, records, root))
        found.append({"name": name, "id": "doc-" + name.replace("/", "-").removesuffix(".md"), "html": html})
    return found


def read_registry(path: Path, scale: str) -> list[dict[str, Any]]:
    """The tables and figures of results/registry.yaml, with the status at this scale and the whole entry as text;
    empty where there is no registry. eval.registry checks it, this only shows it."""
    if not path.exists():
        return []
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    found = []
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        if isinstance(entry, dict):
            status = entry.get("status")
            whole = yaml.safe_dump(entry, sort_keys=False, allow_unicode=True, width=100)
            found.append({
                "name": name, "of": entry.get("of", "-"), "title": entry.get("title", "-"),
                "status": status.get(scale, "-") if isinstance(status, dict) else status or "-",
                "command": entry.get("command") or "-", "whole": whole,
            })  # fmt: skip
    return found


def digests(root: Path) -> list[tuple[str, str]]:
    """The files that the report is made from."""
    paths = [path for folder in folders(root) for path in sorted(folder.iterdir()) if path.suffix in (".jsonl", ".md")]
    return [(path.relative_to(root).as_posix(), sha256_file(path)) for path in paths]


def page(root: Path, scale: str, records: Records) -> str:
    """The whole HTML file."""
    paper = read_paper(PAPER) if PAPER.exists() else {}
    data = {
        "scores": records.scores, "trend": records.trend, "manifests": records.manifests, "methods": METHODS,
        "colors": {method: look[0] for method, look in STYLES.items()}, "regimes": REGIMES, "units": QUANTITIES,
        "dashes": {m: [] if look[1] == "solid" else [2 * part for part in look[1][1]] for m, look in STYLES.items()},
        "paper": {"/".join(key): points for key, points in paper.items()},
    }  # fmt: skip
    # In a script block `<` could end the block; in JSON it may be written so.
    embedded = to_json(data, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    script = (PAGE / "report.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html").render(
        scale=scale, documents=documents(root, records), registry=read_registry(root.parent / "registry.yaml", scale),
        digests=digests(root), data=Markup(embedded), script=Markup(script), counts=len(records.scores),
        seeds=sorted({score["seed"] for score in records.scores} | {run["seed"] for run in records.trend}),
        style=Markup((PAGE / "report.css").read_text(encoding="utf-8")),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__.split("\n")[0])
    parser.add_argument("--results", required=True, type=Path, help="folder of one scale, such as results/tiny")
    parser.add_argument("--out", required=True, type=Path, help="the .html file")
    arguments = parser.parse_args()
    root = arguments.results
    records = Records.read(root)
    if not records.scores and not records.trend:
        raise InputError(f"{root}: no scores.jsonl and no trend.jsonl with records, here or below; nothing to report")
    scales = sorted({score["scale"] for score in records.scores}) or [root.resolve().name]
    if len(scales) > 1:
        raise InputError(f"{root}: records of {' and '.join(scales)}; a report shows one scale")
    write_text(arguments.out, page(root, scales[0], records))
    print(f"{arguments.out}: written ({len(records.scores)} scores, {len(records.manifests)} manifests)")


if __name__ == "__main__":
    run_command(main)
