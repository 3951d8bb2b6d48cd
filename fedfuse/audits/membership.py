"""Was this example trained on? `coop_lira`, `distill_lira` (arXiv 2502.08001) and `fedmia` (CVPR 2025).

All three compare φ(x) = log p_y(x) − log(1 − p_y(x)) of the client in question with what it would be, had the client
not trained on x, as a normal distribution N(μ, σ), one-sided: Φ((φ_k(x) − μ)/σ).

    coop_lira      μ, σ of the other clients' φ(x): they have not trained on x
    distill_lira   μ, σ of 16 shadows, each distilled from client k's soft labels of a random 80 % of the public rows
                   (L1, Adam at 1e-3, 20 epochs): they imitate k, and have not seen x
    fedmia         as coop_lira, from weights or adapters, the mean of Φ over the rounds

Where soft labels travel nobody's model is at hand, and the released attack loads the clients' weights for φ_k(x). Here
the server *asks*: it puts the candidates among the public rows of one round, once, and gets the clients' own answers.
It has to choose the public rows for that; the run is otherwise as it was.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedfuse.audits.adversary import Adversary, Answer, Sent, log_odds
from fedfuse.config.schema import TrainConfig
from fedfuse.core.attacks import distributions
from fedfuse.seeding import generator
from fedfuse.train import training

SHADOWS, KEPT, EPOCHS, RATE, BATCH = 16, 0.8, 20, 1e-3, 32
MOST = 1e6  # of |φ|
LEAST = 1e-6  # of σ: others that agree to the last bit are no distribution


def above(own: Tensor, others: Tensor) -> Tensor:
    """log Φ((own − μ)/σ), μ and σ over the first axis of `others`; the logarithm keeps the order where Φ is 1."""
    sigma = others.std(0).clamp_min(LEAST)
    found: Tensor = torch.special.log_ndtr((own - others.mean(0)) / sigma)
    return found


class _Membership:
    """Candidates, and each client's φ of them by round."""

    def __init__(self, adversary: Adversary) -> None:
        assert adversary.candidates is not None
        self.adversary, self.candidates = adversary, adversary.candidates
        self.phi: dict[int, dict[int, Tensor]] = {}  # round -> client -> φ of all candidates

    def _keep(self, round: int, client: int, rows: Tensor) -> None:
        phi = log_odds(rows, self.candidates.y.to(rows.device)).cpu()
        self.phi.setdefault(round, {})[client] = phi.nan_to_num(0.0, MOST, -MOST)  # of a model that has run away

    def _against_others(self, round: int) -> dict[int, Tensor]:
        """log Φ by client of a round, where two others at least took part."""
        known, out = self.phi[round], {}
        for client, own in known.items():
            others = [phi for other, phi in sorted(known.items()) if other != client]
            if len(others) > 1 and client in self.candidates.of:
                rows = self.candidates.of[client]
                out[client] = above(own[rows], torch.stack(others)[:, rows])
        return out


class CoopLira(_Membership):
    """The others as shadows, from answers."""

    def answered(self, answer: Answer) -> None:
        """Take a client's answer in."""
        self._keep(answer.round, answer.client, answer.rows)

    def scores(self) -> dict[int, Mapping[int, Tensor]]:
        """By round and client, of its candidates: larger is rather a member."""
        return {round: self._against_others(round) for round in sorted(self.phi)}


class FedMIA(_Membership):
    """The others as shadows, from the models that came, over all rounds."""

    def see(self, sent: Sent) -> None:
        """Ask the model that a message amounts to."""
        outputs = self.adversary.outputs(sent, self.candidates.x)
        if outputs is not None:
            self._keep(sent.round, sent.client, outputs)

    def scores(self) -> dict[int, Mapping[int, Tensor]]:
        """As of `CoopLira`, under the last round: the mean of Φ over the rounds a client took part in."""
        kept: dict[int, list[Tensor]] = {}
        for round in self.phi:
            for client, logs in self._against_others(round).items():
                kept.setdefault(client, []).append(logs.exp())
        found = {client: torch.stack(values).mean(0) for client, values in kept.items()}
        return {max(self.phi): found} if found else {}


class DistillLira(_Membership):
    """Shadows distilled from a client's own soft labels."""

    def __init__(self, adversary: Adversary) -> None:
        super().__init__(adversary)
        self._soft: dict[int, dict[int, Tensor]] = {}  # round -> client -> soft labels of the public rows

    def see(self, sent: Sent) -> None:
        """Keep the soft labels."""
        soft = self.adversary.soft(sent)
        if soft is not None:
            self._soft.setdefault(sent.round, {})[sent.client] = soft

    def answered(self, answer: Answer) -> None:
        """Take a client's answer in."""
        self._keep(answer.round, answer.client, answer.rows)

    def scores(self) -> dict[int, Mapping[int, Tensor]]:
        """As of `CoopLira`, of the last round with answers."""
        if not self.phi:
            return {}
        round = max(self.phi)
        out = {}
        for client, own in sorted(self.phi[round].items()):
            if client in self.candidates.of and client in self._soft.get(round, {}):
                rows = self.candidates.of[client]
                shadows = torch.stack([self._shadow(round, client, number, rows) for number in range(SHADOWS)])
                out[client] = above(own[rows], shadows)
        return {round: out}

    def _shadow(self, round: int, client: int, number: int, rows: Tensor) -> Tensor:
        """φ of a client's candidates by a model that learned its soft labels of a part of the public rows."""
        adversary, soft = self.adversary, self._soft[round][client]
        seeds = (adversary.scenario.seed, "distill_lira", client, number)
        part = torch.randperm(len(soft), generator=generator(*seeds))[: max(1, round_down(KEPT * len(soft)))]
        model = distilled(adversary, client, adversary.public(round)[part], soft[part], seeds, distributions(soft))
        outputs = training.predict(model, self.candidates.x[rows])
        return log_odds(outputs.detach(), self.candidates.y[rows])


def distilled(
    adversary: Adversary, client: int, x: Tensor, soft: Tensor, seeds: tuple[object, ...], given: bool | None = None
) -> nn.Module:
    """The resident model of a client's architecture, anew, taught soft labels (L1, Adam at 1e-3, 20 epochs).

    Parameters
    ----------
    given : bool, optional
        Whether they are distributions; default: whether these rows are.
    """
    given = distributions(soft) if given is None else given
    model = adversary.workspace.fresh(adversary.scenario.architectures[client])

    def apart(logits: Tensor, _: Tensor | None, batch: Tensor) -> Tensor:
        return ((logits.softmax(-1) if given else logits) - soft[batch]).abs().mean()

    config = TrainConfig(epochs=EPOCHS, batch_size=BATCH, lr=RATE, optimizer="adam")
    training.train(model, x, None, apart, config, seeds)
    return model


def round_down(count: float) -> int:
    """⌊count⌋, whatever a product of decimals comes to."""
    return int(count + 1e-9)
