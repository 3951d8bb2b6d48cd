"""How often intervals hold what they should, as docs/comparing.md tells it: `python tests/results/coverage.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fedfuse.results.statistics import Method, all_pairs, mean_interval

SEEDS = (2, 3, 5, 10)
Law = Callable[[np.random.Generator, int], np.ndarray]


def _normal(draw: np.random.Generator, n: int) -> np.ndarray:
    return draw.normal(0.6, 0.02, n)


def _tied(draw: np.random.Generator, n: int) -> np.ndarray:
    return np.round(draw.normal(0.605, 0.003, n), 2)


def _skewed(draw: np.random.Generator, n: int) -> np.ndarray:
    return draw.lognormal(math.log(0.02), 1.0, n)


def _collapsing(draw: np.random.Generator, n: int) -> np.ndarray:
    return np.where(draw.random(n) < 0.2, 0.1, draw.normal(0.6, 0.003, n))


LAWS: dict[str, tuple[Law, float, Method, int]] = {
    "normal, σ = 2 points": (_normal, 0.6, "t", 2000),
    "the same, bootstrap": (_normal, 0.6, "bootstrap", 300),
    "σ = 0.3 points, scored on 100 examples (ties)": (_tied, 0.605, "t", 2000),
    "log-normal (σ = 1) about 2 %": (_skewed, 0.02 * math.exp(0.5), "t", 2000),
    "σ = 0.3 points, and one seed in five collapses to chance": (_collapsing, 0.2 * 0.1 + 0.8 * 0.6, "t", 2000),
}


def held(law: Law, truth: float, method: Method, draws: int, seeds: int) -> float:
    """Share of draws whose 95 % interval has the true mean in it; an interval without length has it by hitting it."""
    draw = np.random.default_rng(seeds)
    hits = 0
    for _ in range(draws):
        values = law(draw, seeds)
        found = mean_interval(list(values), method)
        low, high = found.low, found.high
        hits += low is not None and high is not None and low - 1e-12 <= truth <= high + 1e-12
    return hits / draws


def told_apart(strategies: int, seeds: int, draws: int, sigma: float = 0.02, collapse: float = 0.0) -> float:
    """Share of draws in which the Holm-adjusted t-test tells any two of strategies apart that are truly alike."""
    draw = np.random.default_rng([strategies, seeds])
    found = 0
    for _ in range(draws):
        values = draw.normal(0.6, sigma, (strategies, seeds))
        values = np.where(draw.random(values.shape) < collapse, 0.1, values)
        scores = {f"s{i}": dict(enumerate(row)) for i, row in enumerate(values)}
        found += any(pair.t_holm < 0.05 for pair in all_pairs(scores).values())
    return found / draws


if __name__ == "__main__":
    print("| values over seeds | " + " | ".join(map(str, SEEDS)) + " |")
    for name, (law, truth, method, draws) in LAWS.items():
        shares = (held(law, truth, method, draws, seeds) for seeds in SEEDS)
        print(f"| {name} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |", flush=True)
    for strategies, draws in ((2, 400), (3, 400), (10, 250)):
        shares = (told_apart(strategies, seeds, draws) for seeds in SEEDS)
        print(f"{strategies} strategies that are alike:", *(f"{100 * share:.0f} %" for share in shares), flush=True)
    collapsed = told_apart(10, 2, 250, sigma=0.003, collapse=0.15)
    print(f"10 strategies, 2 seeds, σ = 0.3 points, 15 % of runs collapse: {100 * collapsed:.0f} %")
