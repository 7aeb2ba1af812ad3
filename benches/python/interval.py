"""Medians of paired ratios and their distribution-free 95 % interval, as in `benches/src/stats.rs`."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb
from statistics import median


@dataclass(frozen=True)
class Ratio:
    """A median paired ratio; `low` and `high` are None when there are too few rounds for an interval."""

    median: float
    low: float | None
    high: float | None

    def show(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.median:.3f} [too few rounds]"
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def at_most(self, bar: float) -> str:
        """Whether the whole interval lies at or below the bar."""
        if self.low is None or self.high is None:
            return "open"
        if self.high <= bar:
            return "met"
        return "not met" if self.low > bar else "open"


def rank(rounds: int) -> int | None:
    """The j of the j-th smallest and j-th largest value that bound the median at 95 %; None below six rounds."""
    below, best = 0.0, None
    for j in range(1, rounds // 2 + 1):
        below += comb(rounds, j - 1) / 2**rounds
        if 2 * below > 0.05:
            break
        best = j
    return best


def paired(ours: list[float], theirs: list[float]) -> Ratio:
    """The ratio ours / theirs, round by round."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    j = rank(len(ratios))
    if j is None:
        return Ratio(median(ratios), None, None)
    return Ratio(median(ratios), ratios[j - 1], ratios[-j])


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, ceil(len(ranked) * share) - 1)]
