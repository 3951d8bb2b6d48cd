"""`ldia`, label distribution inference (arXiv 2502.08001): a curious server guesses each client's class prior.

It takes the mean of a client's soft labels over the public rows of the rounds so far, p̂_k = (1/|rows|) Σ softmax z_k.
Where weights travel it asks the model that came for them itself, on all public rows; where counts of classes travel,
they are the prior. The guess is as good as the public set is class-balanced, and the earlier the better: what a client
has learned from others is not its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedfuse.audits.adversary import Adversary, Sent, probabilities
from fedfuse.audits.outcomes import EVERYONE, Row, mean_interval

METRICS = ("kl", "tv", "chebyshev")


class LabelDistributions:
    """p̂ of each round and client, from all that the client had sent by then."""

    def __init__(self, adversary: Adversary) -> None:
        self.adversary = adversary
        self.estimates: dict[tuple[int, int], Tensor] = {}
        self._total: dict[int, tuple[Tensor, int]] = {}

    def see(self, sent: Sent) -> None:
        """Take a message in."""
        counts = self.adversary.counts(sent)
        if counts is not None and not bool(counts.any()):  # of who has said all in an earlier round
            return
        if counts is not None:  # the prior itself, not to be mixed with an older one
            self.estimates[sent.round, sent.client] = counts.double() / counts.sum().clamp_min(1)
            return
        soft = self.adversary.soft(sent)
        if soft is None and self.adversary.scenario.data.transfer is not None:
            soft = self.adversary.outputs(sent, self.adversary.workspace.tensors("transfer")[0])
        if soft is None:
            return
        rows = probabilities(soft)
        before, count = self._total.get(sent.client, (torch.zeros(rows.shape[-1], dtype=torch.float64), 0))
        self._total[sent.client] = before + rows.sum(0), count + len(rows)
        mean = self._total[sent.client][0] / self._total[sent.client][1]
        self.estimates[sent.round, sent.client] = mean / mean.sum()


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
    estimates: Mapping[tuple[int, int], Tensor],
    priors: Mapping[int, Tensor],
    blinds: Mapping[int, Tensor] | None = None,
    who: tuple[str, str] = ("ldia", "server"),
) -> list[Row]:
    """Errors of the estimates, and of who has seen nothing; means over clients by round.

    Parameters
    ----------
    blinds : dict of int to Tensor, optional
        By client, what is said without any message; default: all classes alike.
    who : tuple of str
        Audit and adversary.
    """
    rows = []
    by_round: dict[tuple[int, str], list[float]] = {}
    for (round, client), guess in sorted(estimates.items()):
        blind = torch.full_like(guess, 1 / len(guess)) if blinds is None else blinds[client]
        found = errors(priors[client], guess)
        found |= {f"{metric}/blind": value for metric, value in errors(priors[client], blind).items()}
        for metric, value in found.items():
            rows.append(Row(*who, round, client, metric, None, value))
            by_round.setdefault((round, metric), []).append(value)
        rows += [Row(*who, round, client, "estimate", c, float(value)) for c, value in enumerate(guess)]
    for (round, metric), values in by_round.items():
        rows.append(Row(*who, round, EVERYONE, metric, None, *mean_interval(values)))
    return rows


def of_the_others(priors: Mapping[int, Tensor], client: int) -> Tensor:
    """The mean class prior of all clients but one."""
    return torch.stack([prior for other, prior in sorted(priors.items()) if other != client]).mean(0)


def rest_of_alike(prior: Tensor, clients: int) -> Tensor:
    """What a client says of the others that takes all classes to be alike over everybody: (1/C − p_k/n)₊, to sum 1."""
    rest = (1 / len(prior) - prior.double() / clients).clamp_min(0)
    return rest / rest.sum()
