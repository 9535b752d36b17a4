"""The live lines: one a second, for a terminal of 80 columns."""

from demo.ledger import Figures
from lifecycle import SINKS

REPEAT_HEADER_EVERY = 20


def header() -> str:
    """Return the two lines above the figures."""
    groups = "".join(f"   {f' {name} ':-^21}" for name in SINKS)
    columns = f"   {'logged':>10}{'pending':>11}" * len(SINKS)
    return f"{'':28}{groups}\n{'time':>8}{'received':>10}{'spooled':>10}{columns}"


def live_line(elapsed_s: float, figures: Figures) -> str:
    """Return one line of figures."""
    sinks = "".join(f"   {sink.logged:>10}{sink.pending:>11}" for sink in figures.sinks)
    return f"{elapsed_s:>6.0f} s{figures.received:>10}{figures.spooled:>10}{sinks}"
