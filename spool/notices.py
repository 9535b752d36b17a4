"""What a file's owner should log: this package itself logs nothing."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LogNotice:
    """What to log."""

    severity: str
    """A name of logging's levels."""
    message: str
    values: dict[str, object] = field(default_factory=dict)
