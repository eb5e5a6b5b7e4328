"""The report of one scale: a single HTML file that opens from disk, without a server or a network.

    python -m eval.report --results results/tiny --out results/tiny/report.html

It shows what lies in RESULTS and in the folders below it: every .md file (claims, tables), the likelihood trend as
plots to choose from, all score records and all manifests; and the registry of tables and figures, where it is there
(RESULTS/../registry.yaml). A number in a table leads to its records, and a record to its manifest and command.
Everything is embedded; scripts run from one hash-listed block only, and all text of records is shown as text.
"""

import argparse
import base64
import hashlib
import itertools
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from data_prep.files import InputError, run_command, sha256_file, to_json, write_text
from eval.curves import QUANTITIES, read_paper
from eval.drawing import STYLES
from eval.provenance import Links, Records, folders, links
from eval.records import METHODS, REGIMES

PAGE = Path(__file__).with_name("page")
PAPER = Path(__file__).resolve().parents[1] / "results" / "paper" / "figure2_likelihood.csv"
FIRST = ("claims.md", "tables.md")  # in this order; then the others by name
NOTHING = ("", "-", "not run")  # cells behind which there is no record


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
