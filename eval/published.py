"""The paper's figures in results/paper/*.csv: comment lines (#), then one value a line with its status."""

import csv
import dataclasses
from pathlib import Path

from data_prep.files import InputError

FOLDER = Path(__file__).resolve().parent.parent / "results" / "paper"
# How sure a value is. An unverified one is never a target, and is shown with that word wherever it appears.
STATUSES = {
    "verified": "read in a primary source",
    "secondary": "read in somebody else's note, review or follow-up",
    "derived": "digitised from a figure, or worked out from verified figures",
    "unverified": "believed, in no source at hand; never a target",
    "unknown": "in no source at hand",
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A value of the paper, as it is written there; the empty text where its status is `unknown`."""

    text: str
    status: str
    source: str

    @property
    def value(self) -> float | None:
        """The number, if it is known."""
        return float(self.text) if self.text else None

    def show(self) -> str:
        """The value with its status."""
        return f"{self.text} ({self.status})" if self.text else self.status


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a file of results/paper/; InputError where it is absent or has no rows."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; the published figures are in results/paper/")
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    if not rows:
        raise InputError(f"{path}: no rows; restore it from the repository")
    return rows


def read_table(name: str) -> dict[tuple[str, str, str], Published]:
    """table2.csv or table3.csv: (base model, method, benchmark) to the value; InputError with file and row."""
    path, found = FOLDER / f"{name}.csv", {}
    for number, row in enumerate(read_csv(path), start=1):
        try:
            key = (row["base"], row["method"], row["benchmark"])
            status, text = row["status"], row["value"]
            if status not in STATUSES or (status == "unknown") != (text == "") or key in found:
                raise ValueError(f"status {status!r}, value {text!r}, or the row stands twice")
            found[key] = Published(text, status, row["source"])
            float(text or 0)
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: row {number}: {error}; restore it from the repository") from None
    return found
