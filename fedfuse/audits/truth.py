"""What is true of a simulation, and no adversary's knowledge: who trained on what. Attacks are scored against it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from fedfuse.audits.adversary import Candidates
from fedfuse.core.scenario import Scenario
from fedfuse.data.dataset import Examples
from fedfuse.errors import WorldError
from fedfuse.seeding import numpy_generator

MOST = 200  # members in question of one client, and as many others


class Questions:
    """Candidates of membership: for each client, of its examples and of such as nobody trained on, equally many.

    Others are matched by label, so that a client's class prior tells nothing; they come from the clients' validation
    and personal test sets, the client's own before those of the rest.

    Parameters
    ----------
    scenario : Scenario
    inside, outside : sequence of str
        Splits that members and others come from; the default is the question, others are checks of it.

    Attributes
    ----------
    asked : Examples
        The candidates as they would stand in a public set: without labels, if that has none.
    candidates : Candidates
    truth : dict of int to Tensor
        By client, which of its candidates are members.
    """

    def __init__(
        self,
        scenario: Scenario,
        inside: Sequence[str] = ("train",),
        outside: Sequence[str] = ("personal", "validation"),
    ) -> None:
        data = scenario.data
        targets = data.dataset.train.targets
        everyone = range(scenario.clients)
        held = {k: np.concatenate([data.rows_of(k, split) for split in outside]) for k in everyone}
        chosen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for client in everyone:
            draw = numpy_generator(scenario.seed, "audit", client)
            members = draw.permutation(np.concatenate([data.rows_of(client, split) for split in inside]))
            rest = [held[k] for k in everyone if k != client]
            others = np.concatenate(
                [draw.permutation(held[client]), draw.permutation(np.concatenate([*rest, held[client][:0]]))]
            )
            chosen[client] = matched(members, others, targets)
        known = np.unique(np.concatenate([np.concatenate(pair) for pair in chosen.values()]))
        if not len(known):
            raise WorldError("no candidates: the clients hold no validation or personal test examples to compare with")
        self.asked = data.dataset.train.take(known)
        of, self.truth = dict[int, Tensor](), dict[int, Tensor]()
        for client, (members, others) in chosen.items():
            rows = np.searchsorted(known, np.concatenate([members, others]))
            bits = np.arange(len(rows)) < len(members)
            order = numpy_generator(scenario.seed, "audit order", client).permutation(len(rows))
            of[client], self.truth[client] = torch.from_numpy(rows[order]), torch.from_numpy(bits[order])
        x = data.dataset.tensor(self.asked.inputs)
        self.candidates = Candidates(x, torch.from_numpy(self.asked.targets.copy()), of)
        if not scenario.config.transfer.labelled:
            self.asked = Examples(self.asked.inputs, np.full(len(self.asked), -1))

    def about_others(self, curious: Collection[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """By curious client, the candidates of the next client, and which are members: no example counts twice."""
        after = {client: (client + 1) % len(self.truth) for client in curious}
        of = self.candidates.of
        return {k: of[other] for k, other in after.items()}, {k: self.truth[other] for k, other in after.items()}


def matched(members: np.ndarray, others: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As many of each class on both sides, at most `MOST` in all, the first of both."""
    inside, outside = [], []
    room = {
        c: min(int((targets[members] == c).sum()), int((targets[others] == c).sum()))
        for c in np.unique(targets[members])
    }
    scale = min(1.0, MOST / max(1, sum(room.values())))
    for label, count in room.items():
        count = max(1, int(count * scale)) if scale < 1 else count
        inside.append(members[targets[members] == label][:count])
        outside.append(others[targets[others] == label][:count])
    nothing = members[:0]
    return np.concatenate([*inside, nothing]), np.concatenate([*outside, nothing])


def prior(scenario: Scenario, client: int) -> Tensor:
    """A client's true class prior, of its training examples."""
    counts = torch.bincount(scenario.data.tensors(client, "train")[1], minlength=scenario.classes).double()
    return counts / counts.sum().clamp_min(1)


def mean_images(scenario: Scenario, client: int) -> dict[int, Tensor]:
    """Mean image of each class that a client trained on."""
    x, y = scenario.data.tensors(client, "train")
    return {int(label): x[y == label].mean(0) for label in y.unique()}
