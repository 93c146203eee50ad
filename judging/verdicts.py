"""What the numbers say: whether a claim of the paper holds in them, and whether the metrics can be trusted.

A record is one row of one table, measured with one seed: its numbers, by metric, each a value and its protocol.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from judging.world import World

TIMELESS = ("shuffled frames", "a repeated frame", "half speed")  # only clips can tell: every frame is real


@dataclass(frozen=True)
class Row:
    name: str
    what: str  # what stands in this row, a clause
    measure: Callable[[World], dict[str, dict]] | None  # None: quoted from the paper, not reproduced
    paper: str = ""  # the paper's numbers, where it has this row


@dataclass(frozen=True)
class Claim:
    """In `table`, row `better` has the lower `metric`; or, with equal, the two do not differ."""

    table: str
    metric: str
    better: str
    worse: str
    paper: str
    equal: bool = False
    seen: str = ""  # of an ordering: a number that a person can follow, lower where a row is better


@dataclass
class Verdict:
    claim: Claim
    differences: list[float]  # worse minus better, one a seed
    floor: float  # of an equivalence: how far real clips are from other real clips
    holds: bool
    seen: list[float] = field(default_factory=list)  # the same differences in what a person can follow

    @property
    def word(self) -> str:
        if len(self.differences) < 3:
            return "fewer than 3 seeds, not judged"
        if self.holds and self.seen and max(self.seen) < 0:
            return "open: the two numbers disagree"
        return "holds" if self.holds else "**fails**"

    @property
    def seen_beside(self) -> str:
        """Of the second number: by how much the better row is below the other."""
        if not self.seen:
            return ""
        return f"{self.claim.seen} {statistics.fmean(self.seen):+.2g} ± {deviation(self.seen):.2g}"

    def __str__(self) -> str:
        c, mean, spread = self.claim, statistics.fmean(self.differences), deviation(self.differences)
        verdict = self.word
        if c.equal:
            said = f"{c.better} and {c.worse} differ by {mean:+.3g} ± {spread:.2g} in {c.metric}"
            return f"{said}; real clips differ from real ones by {self.floor:.3g} (paper: {c.paper}): {verdict}"
        said = f"{c.better} is below {c.worse} in {c.metric} by {mean:.3g} ± {spread:.2g}"
        if self.seen:
            said += f", in {c.seen} by {statistics.fmean(self.seen):.2g} ± {deviation(self.seen):.2g}"
        return f"{said} (paper: {c.paper}): {verdict}"


def deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def judge(records: list[dict], claims: Sequence[Claim]) -> list[Verdict]:
    """An ordering holds when the paired difference has one sign in all seeds and exceeds twice its standard error; an
    equivalence, when the mean difference is smaller than the distance of real clips from other real clips. An ordering
    that holds is open nevertheless where the number that a person can follow has the other sign in all seeds."""
    verdicts = []
    for claim in claims:
        better, worse = (by_seed(records, claim.table, row, claim.metric) for row in (claim.better, claim.worse))
        seeds = sorted(set(better) & set(worse))
        if not seeds:
            continue
        differences = [worse[seed] - better[seed] for seed in seeds]
        mean, error = statistics.fmean(differences), deviation(differences) / len(seeds) ** 0.5
        floors = by_seed(records, "conditional" if claim.table == "alpha" else claim.table, "real", claim.metric)
        floor = statistics.fmean(floors.values()) if floors else 0.0
        holds = len(seeds) >= 3 and (abs(mean) < floor if claim.equal else min(differences) > 0 and mean > 2 * error)
        better, worse = (by_seed(records, claim.table, row, claim.seen) for row in (claim.better, claim.worse))
        seen = [worse[seed] - better[seed] for seed in seeds if seed in better and seed in worse]
        verdicts.append(Verdict(claim, differences, floor, holds, seen))
    return verdicts


def by_seed(records: list[dict], table: str, row: str, metric: str) -> dict[int, float]:
    found = [r for r in records if (r["table"], r["row"]) == (table, row) and metric in r["numbers"]]
    return {r["seed"]: r["numbers"][metric]["value"] for r in found}


def self_checks(records: list[dict]) -> list[tuple[str, bool]]:
    """What the metrics must do on sets whose order is known, by more than the spread over the seeds, and what only time
    tells by a wide margin; and the size of their bias."""

    def values(row: str, metric: str) -> list[float]:
        return list(by_seed(records, "checks", row, metric).values())

    def above(worse: str, better: str, metric: str) -> bool:
        differences = [a - b for a, b in zip(values(worse, metric), values(better, metric), strict=False)]
        return bool(differences) and min(differences) > 0 and statistics.fmean(differences) > deviation(differences)

    found: list[tuple[str, bool]] = []
    for metric in ("toy-FVD", "toy-FID", "FVD", "FID"):
        floors = values("real against real", metric)
        if not floors:
            continue
        itself, floor = values("real against itself", metric), statistics.fmean(floors)
        found.append((f"{metric} of a set against itself is 0", all(abs(v) < 1e-3 for v in itself)))
        for worse, better in (("more noise", "little noise"), ("little noise", "real against real"),
                              ("blur", "real against real"), ("fewer cars", "real against real")):
            found.append((f"{worse} raises {metric} above {better}", above(worse, better, metric)))
        of_clips = metric.endswith("FVD")
        for row in (*TIMELESS, "jitter of 5 levels") if of_clips else TIMELESS:
            times = statistics.fmean(values(row, metric) or [math.nan]) / floor
            margin = "at least 10" if of_clips else "at most 2"
            found.append((f"{row}: {metric} is {times:.2g} times that of real clips ({margin})",
                          times >= 10 if of_clips else times <= 2))
        half = statistics.fmean(values("real, half as many", metric) or [0.0])
        bias = f"{floor:.3g} at the sample count used, {half:.3g} at half of it"
        found.append((f"{metric} of real against other real clips, its bias, is {bias}", True))
    return found
