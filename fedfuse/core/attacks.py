"""Clients that lie (`attack=`): what a simulated client shares instead of what its client half made.

A lie is told after `share`, on the client's own machine, from what that client knows: its own records and what it was
sent. Nobody sees what the others share, but in `fedfuse.core.collusion`. The client's own state stays true, so that it
goes on like an honest one; `label_flip` alone trains on false labels, and then shares what follows from them. A
liar's counts and metrics are true.

Weights and adapters (arrays that are the model's own, by name) are altered as updates, x − w with w what was published
under the same name, where anything was. Rows over the classes are soft labels: logits, or distributions where all rows
are. A multiple, an opposite or noise of a distribution is that of its logarithm, by softmax a distribution again: a
share that is refused at the door poisons nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedfuse.config.schema import AttackConfig
from fedfuse.core.scenario import Scenario
from fedfuse.core.shares import declared
from fedfuse.errors import UserError
from fedfuse.seeding import generator
from fedfuse.wire.records import Arrays, Layout, layout_of, strays

if TYPE_CHECKING:
    from fedfuse.core.strategy import FusionStrategy

SCALES = {"noise": 3.0, "sign_flip": 1.0, "scale": 10.0, "pcfdla": 10.0}  # where the user says none


def flipped(y: Tensor, classes: int) -> Tensor:
    """Labels C − 1 − y; what is no class (padding) stays."""
    return torch.where((y >= 0) & (y < classes), classes - 1 - y, y)


def distributions(x: Tensor) -> bool:
    """Whether all rows of an array are probability distributions over two classes or more."""
    if x.ndim < 2 or x.shape[-1] < 2 or not x.is_floating_point() or not len(x):
        return False
    return not bool(strays(x).any())


def fdla(x: Tensor) -> Tensor:
    """Per row, the value of rank r goes to the class of rank r + 1, cyclic: the top class moves, the multiset stays."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(x).scatter_(-1, order.roll(-1, -1), x.gather(-1, order))


def pcfdla(x: Tensor, s: float) -> Tensor:
    """Per row, the class of rank 2 gets s, every other −s."""
    second = x.argsort(dim=-1, descending=True, stable=True)[..., 1:2]
    return torch.full_like(x, -s).scatter_(-1, second, s)


def lma(x: Tensor) -> Tensor:
    """Per row, the least class in place of the greatest."""
    return _pointed(x, x.argmin(-1))


def cpa(x: Tensor) -> Tensor:
    """Per row, the class that varies least like its likeliest, by the classes' covariance over the rows."""
    p = (x if distributions(x) else x.softmax(-1)).double()
    centred = p - p.mean(0)
    return _pointed(x, (centred.T @ centred).argmin(-1)[x.argmax(-1)])


def _pointed(x: Tensor, classes: Tensor) -> Tensor:
    """One-hot rows; of logits, the row's greatest value at the class and its least elsewhere."""
    if distributions(x):
        return torch.zeros_like(x).scatter_(-1, classes[..., None], 1.0)
    high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    return low.expand_as(x).clone().scatter_(-1, classes[..., None], high)


OF_ROWS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "fdla": lambda x, s: fdla(x),
    "pcfdla": lambda x, s: pcfdla(x, s).softmax(-1) if distributions(x) else pcfdla(x, s),
    "lma": lambda x, s: lma(x),
    "cpa": lambda x, s: cpa(x),
}


def soft_labels(layout: Layout, model: Layout, classes: int) -> list[str]:
    """Arrays of a record that hold rows over the classes."""
    return [
        name
        for name, (dtype, shape) in layout.items()
        if name not in model and dtype.startswith("float") and len(shape) == 2 and shape[-1] == classes
    ]


class Liar:
    """What one client shares in one phase, altered.

    Parameters
    ----------
    attack : AttackConfig
    moment : tuple
        Seeds what is drawn.
    model : Layout
        The arrays of the client's architecture.
    classes : int
    """

    def __init__(self, attack: AttackConfig, moment: tuple[object, ...], model: Layout, classes: int) -> None:
        self.attack, self.moment, self.model, self.classes = attack, moment, model, classes
        self.scale = SCALES.get(attack.name, 0.0) if attack.scale is None else attack.scale

    def altered(self, record: str, arrays: Arrays, known: Mapping[str, Tensor]) -> Arrays:
        """The record as the liar shares it; `known` is what it was sent under the same name."""
        rows = OF_ROWS.get(self.attack.name)
        if rows is not None:
            soft = soft_labels(layout_of(arrays), self.model, self.classes)
            return arrays | {name: rows(arrays[name], self.scale) for name in soft if len(arrays[name])}
        if self.attack.name == "label_flip":
            return arrays
        return {
            name: self._moved(x, known.get(name) if name in self.model else None, f"{record}/{name}")
            if x.is_floating_point()
            else x
            for name, x in arrays.items()
        }

    def _moved(self, x: Tensor, start: Tensor | None, what: str) -> Tensor:
        """A multiple, an opposite, or noise."""
        value = x.detach().double()
        simplex = start is None and distributions(x[None] if x.ndim == 1 else x)  # a histogram is one row
        if simplex:
            value = value.clamp_min(1e-12).log()
        if self.attack.name == "noise":
            draw = torch.randn(x.shape, generator=generator(*self.moment, what), dtype=torch.float64).to(x.device)
            value = value + self.scale * value.square().mean().sqrt() * draw
        else:
            origin = 0 if start is None else start.to(x.device).double()
            sign = -1 if self.attack.name == "sign_flip" else 1
            value = origin + sign * self.scale * (value - origin)
        return (value.softmax(-1) if simplex else value).to(x.dtype)


def check_attack(strategy: FusionStrategy) -> None:
    """Refuse a lie that nobody can tell in this run.

    Raises
    ------
    UserError
        Naming the key and what is allowed.
    """
    scenario = strategy.scenario
    attack, who = scenario.config.attack, f"strategy={strategy.name}"
    beyond = [client for client in attack.clients if client >= scenario.clients]
    if beyond:
        raise UserError(f"attack.clients={beyond[0]}: no such client; allowed are 0 to {scenario.clients - 1}")
    if strategy.pooled:
        raise UserError(
            f"attack={attack.name}: {who} joins all examples at one place, and no client shares any; allowed is off"
        )
    phases = (*strategy.setup, *strategy.phases(1))
    if attack.name == "label_flip":
        return
    if not any(declared(strategy, phase) for phase in phases):
        raise UserError(f"attack={attack.name}: {who} shares no arrays; allowed are off and label_flip")
    if (attack.name in OF_ROWS or attack.name == "hips") and not any(
        shares_soft_labels(strategy, phase) for phase in phases
    ):
        allowed = "label_flip, noise, sign_flip, scale"
        raise UserError(f"attack={attack.name} alters soft labels, and {who} shares none; allowed are {allowed}")
    if attack.name not in OF_ROWS and attack.name != "hips" and not any(_shares_numbers(strategy, p) for p in phases):
        raise UserError(f"attack={attack.name}: {who} shares whole numbers alone, which no attack alters; "
                        f"allowed are off and label_flip")  # fmt: skip


def _shares_numbers(strategy: FusionStrategy, phase: str) -> bool:
    """Whether anything travels up in a phase that is no whole number, or may."""
    scope = strategy.workspace.scope(0, strategy.hyper)
    return any(
        spec is None or any(dtype.startswith("float") for dtype, _ in spec(scope).values())
        for spec in declared(strategy, phase).values()
    )


def shares_soft_labels(strategy: FusionStrategy, phase: str) -> bool:
    """Whether rows over the classes travel up in a phase, or may."""
    scope = strategy.workspace.scope(0, strategy.hyper)
    return any(
        spec is None or bool(soft_labels(spec(scope), scope.model, strategy.classes))
        for spec in declared(strategy, phase).values()
    )


def attack_notes(scenario: Scenario) -> list[str]:
    """Who lied, and how."""
    attack, liars = scenario.config.attack, sorted(scenario.liars)
    how = "named" if attack.clients else "drawn by the seed"
    agree = "; they know what the honest share, and tell one lie" if attack.colludes else ""
    scale = attack.scale if attack.scale is not None else SCALES.get(attack.name)
    strength = f" (scale {scale:g})" if scale is not None else ""
    honest = "the mean of the others" if len(liars) < scenario.clients else "nobody's, since everybody lies"
    return [
        f"attack: {attack.name}{strength}: {len(liars)} of {scenario.clients} clients lie whenever they take part, "
        f"{how}: {', '.join(map(str, liars))}{agree}; accuracy/personal_honest is {honest}"
    ]
