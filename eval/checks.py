"""A known answer: what a scorer must give on an input whose score is known. eval.selftest collects and prints them."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Check:
    """name: scorer and input. expected, found: scores of 0 to 100 (0 to 10 for a judge), or what `name` says."""

    name: str
    expected: float
    found: float

    @property
    def passed(self) -> bool:
        """Whether the scorer gave what is known."""
        return math.isclose(self.expected, self.found, abs_tol=1e-9)
