"""Rows of the suite's table: ours, the rival's, how many times better, the target, the limit, the share of it."""

import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import common

HEADER = ("part", "what", "ours", "rival", "ratio", "target", "limit", "share")
_COMPARE: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


@dataclass(frozen=True)
class Target:
    """What a row should reach: `of` is `ratio` (times the rival) or `ours`, in the row's unit."""

    of: str
    compare: str
    value: float

    def text(self, unit: str) -> str:
        """As `>= 1.40x` or `< 4.00 GB`."""
        return (
            f"{self.compare} {self.value:.2f}x" if self.of == "ratio" else f"{self.compare} {number(self.value, unit)}"
        )


@dataclass(frozen=True)
class TableRow:
    """One line of the table; each list has one value a round, those of a round taken side by side.

    Attributes:
        part: of the suite.
        name: what was measured.
        unit: `s`, `chips/s`, `GB`, `%` ...
        ours: values.
        rival: the rival's, as many; empty where there is none.
        limit: the physical limit in the same unit, as many or one; empty where none is known.
        less: whether less is better.
        target: to be met.
    """

    part: str
    name: str
    unit: str
    ours: Sequence[float]
    rival: Sequence[float] = ()
    limit: Sequence[float] = ()
    less: bool = False
    target: Target | None = None

    def ratio(self) -> dict[str, float] | None:
        """How many times better than the rival, round by round: above 1 ours is ahead."""
        return self._better(self.ours, self.rival) if self.rival else None

    def share(self) -> dict[str, float] | None:
        """Of the limit: 1 is as good as can be."""
        limit = list(self.limit) * (len(self.ours) if len(self.limit) == 1 else 1)
        return self._better(self.ours, limit) if limit else None

    def met(self) -> bool | None:
        """Whether the target is met; None without a target, or without what it speaks of."""
        if self.target is None:
            return None
        ratio = self.ratio()
        if self.target.of == "ratio" and ratio is None:
            return None
        value = ratio["median"] if self.target.of == "ratio" and ratio else statistics.median(self.ours)
        return _COMPARE[self.target.compare](value, self.target.value)

    def cells(self) -> list[str]:
        """The line's cells, in `HEADER`'s order."""
        ratio, share, met = self.ratio(), self.share(), self.met()
        target = "" if self.target is None else self.target.text(self.unit)
        if met is not None:
            target += ", met" if met else ", MISSED"
        return [
            self.part,
            self.name,
            spans(self.ours, self.unit),
            spans(self.rival, self.unit),
            "" if ratio is None else f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})",
            target,
            number(statistics.median(self.limit), self.unit) if self.limit else "",
            "" if share is None else f"{share['median']:.0%}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything in the row, with the spread of each."""
        values = {"ours": self.ours, "rival": self.rival, "limit": self.limit}
        return {
            "part": self.part,
            "name": self.name,
            "unit": self.unit,
            "less_is_better": self.less,
            **{name: common.spread(found) if found else None for name, found in values.items()},
            "ratio": self.ratio(),
            "share_of_limit": self.share(),
            "target": None if self.target is None else self.target.text(self.unit),
            "met": self.met(),
            "rounds": {name: list(found) for name, found in values.items()},
        }

    def _better(self, ours: Sequence[float], other: Sequence[float]) -> dict[str, float]:
        """Spread of how many times `ours` is better than `other`, round by round."""
        pairs = zip(ours, other, strict=True)
        return common.spread([b / a if self.less else a / b for a, b in pairs])


def number(value: float, unit: str) -> str:
    """Three digits and the unit."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}"


def spans(values: Sequence[float], unit: str) -> str:
    """The median, and in brackets the smallest and the largest where there are several."""
    if not values:
        return ""
    found = common.spread(values)
    if len(values) == 1:
        return number(found["median"], unit)
    low, high = (number(found[name], "").strip() for name in ("min", "max"))
    return f"{number(found['median'], unit)} ({low}-{high})"


def show(rows: Sequence[TableRow]) -> None:
    """Print the table."""
    common.print_table(HEADER, [row.cells() for row in rows])
