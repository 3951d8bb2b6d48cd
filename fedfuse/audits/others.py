"""What a curious client finds out about the others: `client_ldia`, `client_lira`. Reconstructions: no paper gives them.

With z̄ the fused soft labels of a round's m clients, or θ the fused model, z_k or θ_k its own share, and w = 1/m where
the fuse is a mean (w = 0 where it is not, or where what was sent was made for the client alone):

    others         z̄_{−k} = (z̄ − w z_k)/(1 − w),   θ_{−k} = (θ − w θ_k)/(1 − w)
    client_ldia    p̂_{−k} = mean over public rows, and rounds so far, of softmax z̄_{−k}: the others' mean class prior
    client_lira    Φ((φ_{−k}(x) − μ)/σ): did anybody else train on x? φ = log p_y − log(1 − p_y) of the model θ_{−k},
                   or of one distilled from z̄_{−k}; μ, σ of 16 shadows, which have seen other examples alone: trained on
                   80 % of the client's own, or distilled from 80 % of its own soft labels

Exact where all weigh alike; where examples weigh (FedAvg), nobody tells a client how many the others have, and it takes
them to have as many as itself. Distributions are clamped at 0 and divided by their sum.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.audits.adversary import log_odds
from fedfuse.audits.curious import CuriousClient, Received, version
from fedfuse.audits.membership import KEPT, MOST, SHADOWS, above, distilled, round_down
from fedfuse.seeding import generator
from fedfuse.train import training

EPOCHS = 50  # of a shadow's training, at most; else as many as the run's clients have trained


class OthersLabels:
    """p̂_{−k} of each version that a client was sent, from all versions by then."""

    def __init__(self, adversary: CuriousClient) -> None:
        self.adversary = adversary

    @property
    def estimates(self) -> dict[int, Tensor]:
        """By the round whose fuse was published."""
        found, total, count = {}, torch.zeros(self.adversary.classes, dtype=torch.float64), 0
        for received in self.adversary.received:
            rows = self.adversary.others_rows(received) if version(received) > 0 else None
            if rows is not None:
                total, count = total + rows.sum(0), count + len(rows)
                found[version(received)] = total / total.sum()
        return found


class OthersMembers:
    """Scores of a client's candidates by the newest of what it was sent."""

    def __init__(self, adversary: CuriousClient) -> None:
        assert adversary.candidates is not None
        self.adversary, self.candidates = adversary, adversary.candidates

    def scores(self) -> dict[int, Mapping[int, Tensor]]:
        """As `coop_lira`'s, under the round that made the newest; larger: rather a member of somebody's."""
        who, k = self.adversary, self.adversary.client
        newest = who.received[-1] if who.received else None
        if newest is None or version(newest) < 1 or k not in self.candidates.of:
            return {}
        rows = self.candidates.of[k]
        x, y = self.candidates.x[rows], self.candidates.y[rows]
        found = self._of_labels(newest, x, y) if who.labels(newest) is not None else self._of_models(newest, x, y)
        return {} if found is None else {version(newest): {k: above(*found)}}

    def _of_models(self, newest: Received, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        who = self.adversary
        outputs = who.says(who.model_of_others(newest), x)
        own, labels = who.workspace.tensors(who.client, "train")
        if outputs is None or not len(own):
            return None
        phi, config = _phi(outputs, y), who.scenario.config
        first = who.received[0]
        known = first.known if version(first) == 0 else {}  # a later model may have seen the example already
        shadows = []
        for number in range(SHADOWS):
            seeds, part = self._draw(number, len(own))
            half = who.half(known)
            epochs = min(EPOCHS, config.train.epochs * version(newest))
            training.train(half.model, own[part], labels[part], _task, config.train, seeds, epochs=epochs)
            shadows.append(_phi(half.predict(x), y))
        return phi, torch.stack(shadows)

    def _of_labels(self, newest: Received, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        who = self.adversary
        sent, fused = who.shared(version(newest)), who.labels_of_others(newest)
        mine = None if sent is None else who.soft(sent)
        if mine is None or fused is None:
            return None
        public = who.public(version(newest))

        def of(soft: Tensor, rows: Tensor, seeds: tuple[object, ...]) -> Tensor:
            model: nn.Module = distilled(who, who.client, public[rows], soft[rows], seeds)
            return _phi(training.predict(model, x), y)

        phi = of(fused, torch.arange(len(fused)), self._draw(-1, 1)[0])
        drawn = [self._draw(number, len(mine)) for number in range(SHADOWS)]
        return phi, torch.stack([of(mine, part, seeds) for seeds, part in drawn])

    def _draw(self, number: int, count: int) -> tuple[tuple[object, ...], Tensor]:
        """Seeds of a shadow, and the rows it is made from."""
        seeds = (self.adversary.scenario.seed, "client_lira", self.adversary.client, number)
        return seeds, torch.randperm(count, generator=generator(*seeds))[: max(1, round_down(KEPT * count))]


def _task(logits: Tensor, y: Tensor, _: Tensor) -> Tensor:
    return F.cross_entropy(logits, y)


def _phi(outputs: Tensor, y: Tensor) -> Tensor:
    return log_odds(outputs.detach(), y).cpu().nan_to_num(0.0, MOST, -MOST)
