"""What a report is built of. Numbers stay numbers in here; render.py makes them text."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from sdpo_eval.canvas import NORMAL_95, Figure

LONGEST_CELL = 200  # characters of data shown in a table or a figure
MOST_UNBROKEN = 18  # characters of a word for which a column makes room


def write_number(value: float) -> str:
    """Write a float: 0.6931, −12.3, 2.1 × 10⁻⁵."""
    if 0 < abs(value) < 5e-4:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.replace('-', '−')} × 10{str(int(exponent)).translate(_RAISED)}"
    return f"{value:,.{4 if abs(value) < 10 else 1}f}".replace("-", "−")


_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error, and how many observations are behind it (None: it is no mean of any)."""

    value: float
    stderr: float | None = None
    n: int | None = None
    digits: int = 1
    signed: bool = False
    ends: tuple[float, float] | None = None
    """Of the 95 % interval, where it is not the normal distribution's."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of 95 %, by the normal distribution if nothing else is known; None where there is no standard error."""
        if self.ends:
            return self.ends
        if self.stderr is None:
            return None
        return self.value - NORMAL_95 * self.stderr, self.value + NORMAL_95 * self.stderr

    @property
    def interval_shown(self) -> str:
        ends = self.interval
        return "unknown" if ends is None else f"[{', '.join(self._written(end) for end in ends)}]"

    @property
    def number(self) -> str:
        """With its standard error; or with its interval, where that is not the normal distribution's."""
        if self.ends:
            return f"{self._written(self.value)} {self.interval_shown}"
        return self._written(self.value) + ("" if self.stderr is None else f" ± {self.stderr:,.{self.digits}f}")

    def _written(self, value: float) -> str:
        return f"{value:{'+' if self.signed else ''},.{self.digits}f}".replace("-", "−")

    def __str__(self) -> str:
        return self.number if self.n is None else f"{self.number} (n = {self.n:,})"


@dataclass(frozen=True)
class Prose:
    kind: ClassVar = "prose"
    text: str
    loud: bool = False
    """Stands out: what a reader must not miss."""
    lead: bool = False
    """Set large: the answer itself."""


@dataclass(frozen=True)
class Heading:
    """Begins a part of a section."""

    kind: ClassVar = "heading"
    text: str


@dataclass(frozen=True)
class Missing:
    """What is not there yet, and the command that adds it."""

    kind: ClassVar = "missing"
    text: str
    command: str


@dataclass(frozen=True)
class Table:
    kind: ClassVar = "table"
    name: str
    title: str
    rows: list[dict[str, Any]]
    """Cells are str, int, float, None or Estimate; the keys, `_` as blanks, are the heads."""
    units: dict[str, str] = field(default_factory=dict)
    folded: bool = False
    """Shown closed: for whoever looks closer."""

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def is_numeric(self, column: str) -> bool:
        return any(isinstance(row.get(column), int | float | Estimate) for row in self.rows)

    def longest_word(self, column: str) -> int:
        """Of the texts in a column, characters: cells narrower than this would break it; at most MOST_UNBROKEN."""
        cells = [cell[:LONGEST_CELL] for row in self.rows if isinstance(cell := row.get(column), str)]
        texts = [column.replace("_", " "), *cells]
        return min(MOST_UNBROKEN, max(len(word) for text in texts for word in text.split() or [""]))


@dataclass(frozen=True)
class Drawing:
    kind: ClassVar = "drawing"
    name: str
    draw: Callable[[], Figure]
    """Draws when the page is written; Markdown and JSON do without."""


@dataclass(frozen=True)
class Quotes:
    """Pairs of the data, word for word."""

    kind: ClassVar = "quotes"
    title: str
    pairs: list[dict[str, Any]]


@dataclass(frozen=True)
class Listing:
    """Text that is read line by line: commands, settings, checksums."""

    kind: ClassVar = "listing"
    title: str
    text: str
    folded: bool = True


Block = Prose | Heading | Missing | Table | Drawing | Quotes | Listing


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    blocks: list[Block]
