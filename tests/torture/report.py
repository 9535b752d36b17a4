"""What a part of the suite hands back."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """The sums of one run of one part."""

    part: str
    seed: int
    rounds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """What was done and what was seen."""
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return one line, and one for each violation."""
        counts = ", ".join(f"{name} {n:,}" for name, n in sorted(self.counts.items()))
        line = f"{self.part}: {self.rounds:,} rounds (seed {self.seed}); {counts}"
        return "\n".join([line, *(f"  VIOLATION {text}" for text in self.violations)])
