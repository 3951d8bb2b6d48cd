"""`fedmia_gradient`, FedMIA by gradients (CVPR 2025, arXiv 2402.06289): does an update go where an example pulls it?

In each round, with θ what was published and Δ_k = θ_k − θ what client k made of it,

    s_k(x) = cos(−∇ℓ(θ; x, y), Δ_k)

over the parameters that are trained, ℓ the cross-entropy; then as `fedmia`: Φ((s_k − μ)/σ), μ and σ of the other
clients' s(x), the mean over the rounds a client took part in. The paper and its code take the cosine of an example's
gradient and a client's update; where the gradient is taken is the reading here: at what all clients began from, so that
its norm does not tell clients apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfuse.audits.adversary import Adversary, Sent
from fedfuse.audits.membership import FedMIA
from fedfuse.models.in_place import evaluating, frozen

ROOM = 2**23  # numbers in the gradients that are held at once


class FedMIAGradient(FedMIA):
    """The others as shadows, from updates beside gradients, over all rounds."""

    def __init__(self, adversary: Adversary) -> None:
        super().__init__(adversary)
        self._waiting: list[tuple[Sent, Tensor]] = []  # that began from the same: gradients are taken once for all

    def see(self, sent: Sent) -> None:
        """Take a message in."""
        half = self.adversary.after(sent)
        if half is None:
            return
        moved = flat(trained(half.model))
        if self._waiting and not self._alike(self._waiting[0][0], sent):
            self._compare()
        self._waiting.append((sent._replace(records={}), moved))

    def scores(self) -> dict[int, dict[int, Tensor]]:  # type: ignore[override]
        """As of `FedMIA`."""
        self._compare()
        return super().scores()  # type: ignore[return-value]

    def _alike(self, one: Sent, other: Sent) -> bool:
        of = self.adversary.scenario.architectures
        same = one.known.keys() == other.known.keys() and all(one.known[k] is other.known[k] for k in one.known)
        return same and of[one.client] == of[other.client]

    def _compare(self) -> None:
        """s of all candidates, of all who began from the same."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        model = self.adversary.before(waiting[0][0]).model
        start = trained(model)
        updates = torch.stack([moved for _, moved in waiting]) - flat(start)
        found = pulls(model, start, self.candidates.x, self.candidates.y, updates).nan_to_num(0.0)
        for (sent, _), s in zip(waiting, found.T.cpu(), strict=True):
            self.phi.setdefault(sent.round, {})[sent.client] = s


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training moves, by name, not copied."""
    fixed = frozen(model)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and name not in fixed}


def flat(values: dict[str, Tensor]) -> Tensor:
    """Parameters one after another, as one copy."""
    return torch.cat([value.reshape(-1) for value in values.values()])


def pulls(model: nn.Module, values: dict[str, Tensor], x: Tensor, y: Tensor, updates: Tensor) -> Tensor:
    """cos(−∇ℓ, Δ) of each example (rows) and update (columns), in float64; 0 where either vanishes.

    Parameters
    ----------
    values : dict of str to Tensor
        The trained parameters, in the order in which an update's numbers stand.
    """

    def loss(named: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, named, (one[None],))
        return F.cross_entropy(logits, label[None])

    slopes = torch.func.grad(loss)
    at_once = x.is_floating_point()  # models of tokens branch on what they read, which vmap cannot follow
    out = []
    with evaluating(model):
        for rows in torch.arange(len(x)).split(max(1, ROOM // updates.shape[1]) if at_once else 1):
            if at_once:
                found = torch.func.vmap(slopes, (None, 0, 0))(values, x[rows], y[rows])
                down = torch.cat([found[name].flatten(1) for name in values], 1)
            else:
                found = slopes(values, x[rows[0]], y[rows[0]])
                down = flat({name: found[name] for name in values})[None]
            out.append(-F.normalize(down.double(), dim=1) @ F.normalize(updates.double(), dim=1).T)
    return torch.cat(out)
