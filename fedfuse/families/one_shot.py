"""What strategies share whose server gets clients' whole models once and makes a student of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedfuse.core.shares import Shares
from fedfuse.core.strategy import FusionStrategy
from fedfuse.core.workspace import Workspace
from fedfuse.wire.records import Arrays


class Ensemble:
    """Clients' models side by side, in evaluation mode, with gradients to their inputs alone.

    Parameters
    ----------
    workspace : Workspace
        Whose architectures and device they have.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self.networks: dict[str, nn.Module] = {}
        self.members: list[tuple[str, Arrays]] = []

    def add(self, name: str, arrays: Arrays) -> None:
        """Add a model of an architecture."""
        if name not in self.networks:
            network = copy.deepcopy(self._workspace.model(name))
            self.networks[name] = network.eval().requires_grad_(False)
        self.members.append((name, {k: v.to(self._workspace.device) for k, v in arrays.items()}))

    def __len__(self) -> int:
        return len(self.members)

    def logits(self, x: Tensor) -> Tensor:
        """What each model says of x: K × B × C."""
        return torch.stack([self.member(k, x) for k in range(len(self))])

    def member(self, k: int, x: Tensor) -> Tensor:
        """Logits of one model (B × C)."""
        name, arrays = self.members[k]
        answer: Tensor = functional_call(self.networks[name], arrays, (x,))
        return answer


class OneShotStrategy(FusionStrategy):
    """Server half: teaches a student an architecture, from its newest weights, and publishes it.

    A subclass overrides `students`. One round is the one shot. In a further round clients start from the student of
    their architecture, train on, and are fused into it again; the run's notes say so.
    """

    @property
    def names(self) -> list[str]:
        """Architectures of the students: those that clients have."""
        return sorted(set(self.scenario.architectures))

    def student(self, name: str) -> Arrays:
        """An architecture's newest student; before the first round its initial weights."""
        return self.published("model", name if len(self.names) > 1 else None)

    def students(self, ensemble: Ensemble) -> dict[str, Arrays]:
        """New students, by architecture, taught by the clients' models."""
        raise NotImplementedError

    def collected(self, shares: Shares) -> Ensemble:
        """The models of all clients that have examples."""
        ensemble = Ensemble(self.workspace)
        for share in shares:
            if share.examples:
                ensemble.add(self.scenario.architectures[share.client], share.records["model"])
        return ensemble

    def fuse(self, shares: Shares) -> None:
        """Publish the students."""
        for name, arrays in self.students(self.collected(shares)).items():
            self.publish("model", arrays, to=name if len(self.names) > 1 else None)

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """One student an architecture."""
        if len(self.names) == 1:
            return {"model": (self.names[0], self.student(self.names[0]))}
        return {name: (name, self.student(name)) for name in self.names}

    def notes(self) -> list[str]:
        """That further rounds are no one shot."""
        rounds = self.scenario.config.rounds
        if rounds == 1:
            return []
        return [
            f"{self.name}: rounds={rounds} is no one shot (rounds=1): clients start again from the student, each round"
        ]


def votes(ensemble: Ensemble, x: Tensor, batch_size: int, call: Callable[[Any, Tensor], Tensor]) -> Tensor:
    """What `call(model, x)` gives of each model, batch by batch, without gradients: K × n × …."""
    found = []
    with torch.no_grad():
        for name, arrays in ensemble.members:
            network = _Called(ensemble.networks[name], call)
            named = {f"inner.{key}": value for key, value in arrays.items()}
            found.append(torch.cat([functional_call(network, named, (batch,)) for batch in x.split(batch_size)]))
    return torch.stack(found)


class _Called(nn.Module):
    """A network that is called another way than by `forward`."""

    def __init__(self, inner: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self._call = inner, call

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self.inner, x)
