"""CITATION.cff is of the Citation File Format, and names the paper that the README names."""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_citation() -> None:
    """The fields that version 1.2.0 requires are there; paper and authors are those of the README's first lines."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert all(cited[key] for key in ("message", "title", "authors"))
    paper, readme = cited["preferred-citation"], " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert all(paper[key] for key in ("type", "title", "authors", "year"))
    assert paper["title"] in readme
    assert paper["url"] in readme
    assert ", ".join(author["family-names"] for author in paper["authors"]) in readme
