"""What every strategy sees alike: the data and its split, each client's architecture, training settings, the seed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from fedfuse import models
from fedfuse.compat.torch_lists import copy_all
from fedfuse.compat.torch_state import contents
from fedfuse.config.idle import idle
from fedfuse.config.schema import Config, TrainConfig
from fedfuse.data import FederatedData, prepare
from fedfuse.errors import UserError
from fedfuse.models.shared_memory import share
from fedfuse.seeding import generator, seed_of
from fedfuse.train.ledger import Ledger
from fedfuse.wire.records import Arrays, Layout, Scope, layout_of


@dataclass(frozen=True)
class Scenario:
    """One experiment without its strategy; plain data, sent to every worker once.

    Equal scenarios make a comparison fair: partitions, initial weights, transfer set and client samples depend
    on nothing else.
    """

    config: Config
    data: FederatedData
    architectures: tuple[str, ...]  # of client i

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.architectures)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.data.dataset.classes)

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.config.seed

    def span(self, moment: int) -> tuple[float, float]:
        """Shares of the run's rounds done before and after round `moment`, within [0, 1]."""
        before, after = ((moment - back) / self.config.rounds for back in (1, 0))
        return min(max(before, 0.0), 1.0), min(max(after, 0.0), 1.0)

    def rows_of(self, subset: int | None) -> int:
        """Rows of the transfer set a lesson stands on: the user's `transfer.subset`, else the strategy's, else all."""
        total = 0 if self.data.transfer is None else len(self.data.transfer)
        return min(total, self.config.transfer.subset or subset or total)

    def sampled(self, round: int) -> list[int]:
        """The clients drawn for a round, in order; alike for every strategy."""
        n = self.clients
        size = self.cohort_size
        if size == n:
            return list(range(n))
        draw = generator(self.seed, "cohort", round)
        return sorted(torch.randperm(n, generator=draw)[:size].tolist())

    @property
    def cohort_size(self) -> int:
        """Clients drawn for a round: `participation` of them, halves up (0.25 of 10 is 3), at least one."""
        return max(1, int(self.clients * self.config.participation + 0.5))

    def training(self, client: int) -> TrainConfig:
        """A client's training settings: `train.*`, with the optimiser that `train.pool` deals it."""
        train = self.config.train
        if not train.pool:
            return train
        name, at, rate = train.pool[client % len(train.pool)].partition("@")
        return replace(train, optimizer=name, lr=float(rate) if at else train.lr, pool=None)

    def examples(self, client: int) -> int:
        """Training examples of a client."""
        return int(self.data.offsets[client, 1] - self.data.offsets[client, 0])


def prepare_scenario(config: Config, data: FederatedData | None = None) -> Scenario:
    """Load the data (if it is not there), deal it to clients and choose their architectures."""
    if data is None:
        data = prepare(config.data, config.partition, config.transfer, config.clients, config.seed)
    if unheard := idle(config):  # of a preset, or from before a group's word was changed: what is typed is refused
        data = replace(data, notes=(*data.notes, *unheard.values()))
    dataset = data.dataset
    names = models.architectures(config.model, dataset.kind, dataset.shape, data.clients)
    return Scenario(config, data, tuple(names))


Equip = Callable[[nn.Module, Callable[[str], nn.Module]], nn.Module]


class Residents:
    """One built model per architecture, resident in this process; parameters are overwritten in place.

    Parameters
    ----------
    scenario : Scenario
    equip : callable, optional
        `equip(model, build) -> model`: what a strategy adds to every client's model (adapters, a second head).
    device : torch.device
    ledger : Ledger or None
        At a deployed site, where it notes what its examples' privacy has been spent on; its noise is its own.
    transfer : bool
        Whether the strategy says that it uses the transfer set here.
    """

    def __init__(
        self,
        scenario: Scenario,
        equip: Equip | None = None,
        device: torch.device | str = "cpu",
        ledger: Ledger | None = None,
        transfer: bool = True,
    ) -> None:
        self.transfer_declared = transfer
        self.scenario, self.equip, self.device, self.ledger = scenario, equip, torch.device(device), ledger
        self._models: dict[str, nn.Module] = {}
        self._initial: dict[str, Arrays] = {}
        self._layouts: dict[str, Layout] = {}
        self._dims: dict[tuple[str, int | None], dict[str, int]] = {}
        self._tensors: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._cached = 0
        budget = scenario.config.runtime.memory
        self._room = min(512, 512 if budget is None else budget // 32) * 2**20

    def build(self, architecture: str) -> nn.Module:
        """Build a fresh model of an architecture with its initial weights, without what a strategy adds."""
        dataset, config = self.scenario.data.dataset, self.scenario.config
        return models.build(
            architecture,
            shape=dataset.shape,
            classes=self.scenario.classes,
            config=config.model,
            seed=config.seed,
        )

    def model(self, architecture: str) -> nn.Module:
        """The resident model of an architecture, in whatever state it was left."""
        if architecture not in self._models:
            model = self.build(architecture)
            if self.equip is not None:
                with torch.random.fork_rng(devices=[]):  # what is added is as equal everywhere as the model itself
                    torch.default_generator.manual_seed(seed_of(self.scenario.seed, "equip", architecture))
                    model = self.equip(model, self.build)
            if frozen(model) and self.device.type == "cpu":
                share(model, frozen(model))  # one copy a machine, however many processes and clients
            self._models[architecture] = model.to(self.device)
            self._initial[architecture] = {k: v.detach().clone() for k, v in variable(model).items()}
        return self._models[architecture]

    def initial(self, architecture: str) -> Arrays:
        """The initial weights, equal for all clients of an architecture."""
        self.model(architecture)
        return self._initial[architecture]

    def fresh(self, architecture: str) -> nn.Module:
        """The resident model reset to its initial weights, poisoned first so that nothing leaks through."""
        model, initial = self.unset(architecture), self._initial[architecture]
        fixed = frozen(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in fixed and name not in initial:  # the others are overwritten in the next line
                    parameter.fill_(float("nan"))
        overlay(model, initial)
        return model

    def unset(self, architecture: str) -> nn.Module:
        """The resident model without gradients, for whoever overwrites all of it before looking."""
        model = self.model(architecture)
        for parameter in model.parameters():
            parameter.grad = None
        return model

    def loaded(self, architecture: str, arrays: Arrays) -> nn.Module:
        """The resident model holding these weights."""
        model = self.fresh(architecture)
        overlay(model, arrays)
        return model

    def scope(self, client: int, hyper: Any) -> Scope:
        """The sizes a spec may name, for one client."""
        architecture, subset = self.scenario.architectures[client], getattr(hyper, "subset", None)
        common = self._dims.get((architecture, subset))
        if common is None:
            transfer = self.scenario.data.transfer
            common = self._dims[architecture, subset] = {
                "classes": self.scenario.classes,
                "transfer": 0 if transfer is None else len(transfer),
                "subset": self.scenario.rows_of(subset),
                "features": int(getattr(self.model(architecture), "feature_dim", 0) or 0),
            }
        dims = {**common, "examples": self.scenario.examples(client)}
        return Scope(dims, self.layout(architecture), hyper, module=self._models[architecture])

    def layout(self, architecture: str) -> Layout:
        """Names, dtypes and shapes of an architecture's arrays."""
        if architecture not in self._layouts:
            self._layouts[architecture] = layout_of(self.initial(architecture))
        return self._layouts[architecture]

    def transfer(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Inputs of rows of the transfer set, and their labels or None where it is unlabelled."""
        x, y = self.tensors("transfer")
        return x[rows], None if y is None else y[rows]

    # -- data as tensors, kept while there is room ---------------------------------------------------------

    def tensors(self, *key: Any) -> Any:
        """Tensors of (client, split), of "transfer" or of "test", cached in a process up to a limit."""
        if key in self._tensors:
            self._tensors.move_to_end(key)
            return self._tensors[key]
        data = self.scenario.data
        if key == ("transfer",) and not self.transfer_declared:
            raise UserError(
                "the transfer set is used where the strategy does not say so: "
                "declare transfer = 'clients', 'server' or 'both' in its class"
            )
        value: Any
        if key == ("transfer",):
            value = data.transfer_tensors()
        elif key == ("test",):
            value = data.test_tensors()
        elif key[0] == "pooled":
            parts = [data.tensors(c, "train") for c in range(self.scenario.clients)]
            value = (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
        else:
            value = data.tensors(*key)
        value = tuple(None if t is None else self._moved(t) for t in value) if value is not None else None
        self._tensors[key] = value
        self._cached += _size(value)
        while self._cached > self._room and len(self._tensors) > 1:
            self._cached -= _size(self._tensors.popitem(last=False)[1])
        return value

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on this process's device; pinned on the way to a GPU, so that the copy does not stop the loop."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)


def frozen(model: nn.Module) -> frozenset[str]:
    """Names of parameters that never change and never travel: `model.frozen`, which adapters set; default none."""
    return cast("frozenset[str]", model.__dict__.get("frozen") or getattr(type(model), "frozen", _NONE))


_NONE: frozenset[str] = frozenset()


def variable(model: nn.Module) -> Arrays:
    """The model's parameters and buffers but the frozen ones, not copied."""
    fixed, found = frozen(model), contents(model)
    if found is None:
        found = model.state_dict()
    return {name: value for name, value in found.items() if name not in fixed} if fixed else found


def overlay(model: nn.Module, arrays: Arrays, strict: bool = True) -> None:
    """Overwrite parameters and buffers in place.

    Raises
    ------
    RuntimeError
        If `arrays` has a name or shape the model has not, or, if strict, lacks one that is not frozen.
    """
    fixed, found = frozen(model), contents(model)
    if found is not None:  # what load_state_dict does for such models, at a tenth of its cost
        own = [value for name, value in found.items() if name not in fixed]
        new = [arrays[name] for name in found if name in arrays and name not in fixed]
        if len(own) == len(new) == len(arrays) and all(a.shape == b.shape for a, b in zip(own, new, strict=True)):
            with torch.no_grad():
                copy_all(own, new)
            return
    answer = model.load_state_dict(arrays, strict=False)
    missing = sorted(set(answer.missing_keys) - fixed) if strict else []
    if missing or answer.unexpected_keys:
        raise RuntimeError(f"state does not fit: missing {missing[:3]}, unexpected {answer.unexpected_keys[:3]}")


def _size(value: Any) -> int:
    return 0 if value is None else sum(0 if t is None else t.numel() * t.element_size() for t in value)
