"""What shared knowledge gives away: attacks on privacy by whoever sees a run's messages, and by nothing else.

`ldia` (label distribution inference, arXiv 2502.08001): a curious server takes the mean of a client's soft labels,
p̂_k = (1/|rows|) Σ softmax z_k(x) over the public rows of the rounds so far, for the client's class prior. It is as good
as the public set is class-balanced, and the earlier the better: what a client has learned from others is not its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fedfuse.core.attacks import distributions


class Seen(NamedTuple):
    """Soft labels that the server was sent: logits, or distributions where all rows are."""

    round: int
    client: int
    rows: Tensor


def label_distributions(seen: Iterable[Seen]) -> dict[tuple[int, int], Tensor]:
    """p̂ of each (round, client), from all that the client had sent by then; in float64, of sum 1."""
    total: dict[int, tuple[Tensor, int]] = {}
    out = {}
    for one in sorted(seen, key=lambda s: (s.round, s.client)):
        rows = one.rows.double()
        soft = rows if distributions(one.rows) else rows.softmax(-1)
        before, count = total.get(one.client, (torch.zeros(rows.shape[-1], dtype=torch.float64), 0))
        total[one.client] = before + soft.sum(0), count + len(rows)
        mean = total[one.client][0] / total[one.client][1]
        out[one.round, one.client] = mean / mean.sum()
    return out


def errors(truth: Tensor, guess: Tensor) -> dict[str, float]:
    """How far a guessed class prior is from the true one: KL(truth ‖ guess), total variation, Chebyshev."""
    p, q = truth.double(), guess.double().clamp_min(1e-12)
    apart = (p - guess).abs()
    return {
        "kl": float(torch.special.xlogy(p, p / q).sum()),
        "tv": float(apart.sum() / 2),
        "chebyshev": float(apart.max()),
    }


def scored(
    estimates: Mapping[tuple[int, int], Tensor], priors: Mapping[int, Tensor]
) -> list[tuple[int, int, str, float]]:
    """Rows (round, client, metric, value): errors of the estimates, and of who has seen nothing and says all alike."""
    rows = []
    for (round, client), guess in sorted(estimates.items()):
        blind = torch.full_like(guess, 1 / len(guess))
        for metric, value in errors(priors[client], guess).items():
            rows.append((round, client, metric, value))
        for metric, value in errors(priors[client], blind).items():
            rows.append((round, client, f"{metric}/blind", value))
        rows += [(round, client, f"estimate/{c}", float(value)) for c, value in enumerate(guess)]
    return rows
