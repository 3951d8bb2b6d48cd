"""What the page says under its tables and figures, and the line of a run's digest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedfuse.errors import listed, one_line

SPREAD = "Spread: standard deviation over clients of personal accuracy, in points, mean over seeds."
RANK = "Rank: 1 is highest, averaged over the {seeds} that every strategy has."
FAILED = "Failed: replies that raised, timed out or were refused; * marks runs where a client was left out of a round."
INTERVALS = (
    "95 % intervals of the mean over seeds, in per cent. t: Student, n − 1 degrees of freedom; what ± "
    "means elsewhere; too narrow where values over seeds are far from normal, as where one seed in five "
    "collapses. Bootstrap: percentiles of 9,999 resampled means; with few seeds it is too narrow,"
    " since it cannot reach beyond the lowest and the highest seed. Both are of what a seed changes, on this data"
    " set: all seeds share the official test split, and how another one would come out is not in them."
)
BEST = "The largest value over evaluated rounds, chosen by looking at test data: not the result."
TARGETS = (
    "The first evaluated round at or above the target. Targets are 80, 90 and 95 % of the best run's "
    "last value, in whole per cent. Means are over the runs that reached it, so read them beside how "
    "many did. MB: set-up and training, up and down."
)
TESTS = (
    "Differences in points with the 95 % t interval of the paired differences; n counts seeds that both"
    " have. Holm's correction counts all pairs on one test set."
)
RUNS = "MB: set-up and training, up and down. Seconds: the rounds, without the start. Equal digests mean equal bits."
BAND = "Line: mean over seeds; band: lowest to highest seed; thin and dashed: an unfinished run."
SWEPT = (
    "After the last round. Dot: mean over seeds; upright: its 95 % t interval, within 0 to 100 %; dotted "
    "line: a strategy that has no such key."
)
BYTES = (
    "Payload of set-up and training, up and down, all clients. Dot: last round; grey steps: the Pareto "
    "front of last rounds; dotted line: sends nothing."
)
CLIENTS = (
    "All clients of all seeds. Thin: their range; bar: 10 to 90 %; dark: quartiles; ink: median; tick: "
    "mean over seeds of each seed's lowest tenth."
)
TIME = "Of a run's rounds, without its start; mean over runs, on the machines named below."
LESSON = " evaluate: with taking in the newest lesson, most often by training on it, before clients are scored."
BRACKETS = " In brackets: of a strategy that has unfinished runs alone."
SIMILARITY = "Row i, column j: how much client i is given of client j."


def worded(metric: str) -> str:
    """A metric's name in words: `bits_per_byte/global` is "bits per byte, global"."""
    return metric.replace("/", ", ").replace("_", " ")


def digest_line(summary: Mapping[str, Any]) -> str:
    """Say a run's digest, or whose part of it is missing."""
    digest, missing = summary.get("digest"), summary.get("digest_missing")
    if digest is not None or not isinstance(missing, list) or not missing:
        return f"digest {one_line(digest, 100)}"
    return f"digest none: the last evaluation had no answer of client {one_line(listed(missing), 200)}"
