"""What a comparison says, and the table of all of them."""

import json
import os
import platform
import shutil
import sqlite3
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Row:
    """One line of the table.

    Attributes:
        name: As given to ``bench/run.sh``.
        what: What is compared with what.
        ours: Our figure in each round.
        reference: The reference's figure in each round; empty where only a limit counts.
        unit: Of both.
        target: ``>= x`` or ``<= x``, of the ratio, or of our figure without a reference; empty
            for a figure that is only reported.
        cpu_us: Our processor time per message in each round, in microseconds.
        rss_mb: Our resident memory at the end of each round.
        notes: What a reader must know, such as which server was used.
    """

    name: str
    what: str
    unit: str
    target: str
    ours: list[float] = field(default_factory=list)
    reference: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Ours ÷ reference, round by round."""
        return (
            [a / b for a, b in zip(self.ours, self.reference, strict=True)]
            if self.reference
            else []
        )

    @property
    def judged(self) -> float:
        """The median that the target speaks of."""
        return statistics.median(self.ratios or self.ours)

    @property
    def holds(self) -> bool:
        """Whether the target is met."""
        if not self.target:
            return True
        operator, limit = self.target.split()
        return self.judged >= float(limit) if operator == ">=" else self.judged <= float(limit)


@dataclass
class Sheet:
    """A table of its own, ready for docs/performance.md.

    Attributes:
        name: As given to ``bench/run.sh``.
        what: What a reader must know.
        heads: Of the columns.
        lines: Cells.
    """

    name: str
    what: str
    heads: list[str]
    lines: list[list[str]]

    holds = True
    """It has no target."""

    def __str__(self) -> str:
        """Return it as Markdown."""
        made = [self.heads, ["---"] * len(self.heads), *self.lines]
        return "\n".join([f"{self.name}: {self.what}", "", *(f"| {' | '.join(m)} |" for m in made)])


def _number(value: float) -> str:
    for limit, digits in ((100, 0), (10, 1), (0, 3)):
        if abs(value) >= limit:
            return f"{value:,.{digits}f}"
    return f"{value:.3f}"


def figure(values: Sequence[float]) -> str:
    """Return the median, and lowest and highest where there are several."""
    spread = f" ({_spread(values)})" if len(values) > 1 else ""
    return f"{_number(statistics.median(values))}{spread}"


def _median(values: Sequence[float]) -> str:
    return _number(statistics.median(values)) if values else "-"


def _verdict(row: Row) -> str:
    if not row.target:
        return "-"
    return "yes" if row.holds else "NO"


def _spread(values: Sequence[float]) -> str:
    return f"{_number(min(values))} … {_number(max(values))}"


def table(rows: Sequence[Row | Sheet]) -> str:
    """Return the table of the rows as Markdown, and behind it the tables of their own.

    Parts of one become one again.
    """
    merged: dict[tuple[str, ...], Sheet] = {}
    for row in rows:
        if isinstance(row, Sheet):
            key = (row.name, row.what, *row.heads)
            known = merged.setdefault(key, replace(row, lines=[]))
            known.lines += row.lines
    sheets = [str(sheet) for sheet in merged.values()]
    judged = [row for row in rows if isinstance(row, Row)]
    return "\n\n".join([*([_table(judged)] if judged else []), *sheets])


def _table(rows: Iterable[Row]) -> str:
    lines = [
        "| name | ours (min … max) | reference | ratio (min … max) | target | ok | CPU µs | MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for row in rows:
        ratios = row.ratios
        cells = [
            row.name,
            f"{_median(row.ours)} {row.unit} ({_spread(row.ours)})",
            _median(row.reference),
            f"{_median(ratios)} ({_spread(ratios)})" if ratios else "-",
            row.target or "-",
            _verdict(row),
            _median(row.cpu_us),
            _median(row.rss_mb),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        notes += [f"- **{row.name}**: {row.what}", *(f"  - {note}" for note in row.notes)]
    return "\n".join([*lines, "", *notes])


def machine() -> dict[str, object]:
    """Return what the figures depend on beside the code."""
    broker = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    version = ""
    if broker is not None:
        asked = subprocess.run([broker, "-h"], check=False, capture_output=True, text=True)  # noqa: S603 - a fixed command
        version = asked.stdout.partition("\n")[0]
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "broker": version,
        "load_before": os.getloadavg()[0],
    }


def save(rows: Iterable[Row | Sheet], about: Mapping[str, object]) -> Path:
    """Write the figures, and what they depend on, as JSON; return where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / time.strftime("%Y%m%dT%H%M%SZ.json", time.gmtime())
    document = {"machine": dict(about), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
