"""Clients take turns with one model in one process; what one leaves behind, the next does not find."""

from __future__ import annotations

import math
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fedfuse import AveragingStrategy, FusionClient, FusionStrategy, Topic, arrays
from fedfuse.compat.turns import Modes, modes
from fedfuse.config.registry import NoHyper
from fedfuse.core import abreast_trial
from fedfuse.core.class_attributes import ClassAttributes
from fedfuse.errors import UserError, WorldError
from fedfuse.models.as_built import AsBuilt, built_of
from fedfuse.models.replicas import Replicas, shared
from tests.federations import federation, play
from tests.ledger import enter


@pytest.fixture(autouse=True)
def untried(monkeypatch: Any) -> None:
    """Stacks are made at once, whether they pay or not."""
    monkeypatch.setattr(abreast_trial, "TRIES", 0)


def build(shape: Any = None, classes: int = 10) -> Any:
    """A network that stacks, with what can be left behind: a layer's setting, a list, a dict in a dict, an order."""
    layers = {"flat": nn.Flatten(), "body": nn.Linear(64, 6), "bend": nn.ReLU()}
    model: Any = nn.Sequential(OrderedDict(**layers, out=nn.Linear(6, classes)))
    model.seen, model.notes = [], {"deep": {}}
    model.register_buffer("scale", torch.ones(2))
    model.register_buffer("mean", torch.zeros(2), persistent=False)
    model.register_parameter("heat", nn.Parameter(torch.ones(1)))
    model.plain = torch.zeros(2)
    return model


OWN = ("model=custom", f"model.build={__name__}:build")


def _hook(client: Any) -> None:
    client.model.register_forward_hook(lambda m, x, out: out + 1)


def _layer(client: Any) -> None:
    client.model.out = nn.Linear(6, 10)


def _order(client: Any) -> None:
    body = client.model.body
    del client.model.body
    client.model.body = body


def _setting(client: Any) -> None:
    client.model.flat.end_dim = 2


def _attribute(client: Any) -> None:
    client.model.temperature = 3.0


def _list(client: Any) -> None:
    client.model.seen.append(client.client)


def _deep(client: Any) -> None:
    client.model.notes["deep"]["who"] = client.client


def _buffer(client: Any) -> None:
    client.model.scale = torch.tensor([2.0, 1.0])


def _memory(client: Any) -> None:
    client.model.body.weight.data = torch.zeros(6, 64)


def _gone(client: Any) -> None:
    client.model.bend = nn.Identity()


def _parametrized(client: Any) -> None:
    parametrize.register_parametrization(client.model.body, "weight", nn.Identity())


def _pruned(client: Any) -> None:
    prune.l1_unstructured(client.model.body, "weight", 0.5)
    prune.remove(client.model.body, "weight")


def _class(client: Any) -> None:
    client.model.bend.__class__ = nn.Tanh


def _gradient_hook(client: Any) -> None:
    client.model.body.weight.register_hook(lambda gradient: 0 * gradient)


def _after_gradients(client: Any) -> None:
    client.model.body.weight.register_post_accumulate_grad_hook(lambda parameter: None)


def _of_parameter(client: Any) -> None:
    client.model.body.weight.rate = 0.5


def _part(client: Any) -> None:
    client.model.body.weight.data = client.model.body.weight.data[:5]


def _turned(client: Any) -> None:
    client.model.out.weight.data = client.model.out.weight.data.t()


def _number(client: Any) -> None:
    client.model.heat = nn.Parameter(client.model.heat.detach().clone(), requires_grad=False)


def _unsaved(client: Any) -> None:
    client.model.mean.add_(1)


def _plain(client: Any) -> None:
    client.model.plain.add_(1)


def _grad_mode(client: Any) -> None:
    torch.set_grad_enabled(False)


def _dtype(client: Any) -> None:
    torch.set_default_dtype(torch.float64)


def _threads(client: Any) -> None:
    torch.set_num_threads(2)


def _deterministic(client: Any) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)


def _precision(client: Any) -> None:
    torch.set_float32_matmul_precision("medium")


def _autocast(client: Any) -> None:
    torch.set_autocast_enabled("cpu", True)


def _device(client: Any) -> None:
    torch.set_default_device("meta")


LEFT: list[Callable[[Any], None]] = [
    _hook, _layer, _order, _setting, _attribute, _list, _deep, _buffer, _memory, _gone, _grad_mode, _dtype,
    _device, _threads, _deterministic, _precision, _autocast,
    _parametrized, _pruned, _class, _gradient_hook, _after_gradients, _of_parameter, _part, _turned, _number,
    _unsaved, _plain,
]  # fmt: skip


def looks(model: Any) -> tuple[Any, ...]:
    """All that a client could find, as plain values."""
    return (
        [name for name, _ in model.named_modules()],
        [id(p) for p in model.parameters()],
        [(p.data_ptr(), p.shape, p.requires_grad, "rate" in vars(p)) for p in model.parameters()],
        [[bool(of) for of in (p._backward_hooks, p._post_accumulate_grad_hooks)] for p in model.parameters()],
        [type(module) for module in model.modules()], model.mean.tolist(), model.plain.tolist(),
        model.scale.data_ptr(),
        len(model._forward_hooks), model.flat.end_dim, hasattr(model, "temperature"), list(model.seen),
        dict(model.notes["deep"]),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["'off'", "auto"])
@pytest.mark.parametrize("leave", LEFT, ids=lambda one: one.__name__)
def test_the_next_client_does_not_find_what_one_leaves(leave: Any, mode: str, made: Any, monkeypatch: Any) -> None:
    found: dict[int, set[str]] = {}
    plain, after = (True, torch.float32, 1, 0, "highest", False, False, None), dict[int, torch.dtype]()
    met = set[Modes]()

    class Leaves(FusionClient):
        def fit(self):
            found.setdefault(id(self.model), set()).add(str(looks(self.model)))
            met.add(modes())
            if leave is _dtype and self.client == 1:  # while it waits for others
                leave(self)
            metrics = self.train()
            after[self.client] = torch.get_default_dtype()
            leave(self)
            return metrics

        def share(self):
            return {"model": {k: v.clone() for k, v in self.workspace.initial(self.architecture).items()}}

    name = enter(monkeypatch, AveragingStrategy, Leaves, NoHyper, "leaves")
    torch.set_num_threads(2)  # as the strategy's file may do when it is imported
    with federation(name, "rounds=2", "clients=4", f"runtime.vectorize={mode}", *OWN) as (built, _):
        built.run()
    assert met == {plain} == {modes()}
    assert {after[client] for client in (0, 2, 3)} == {torch.float32}
    assert after[1] == (torch.float64 if leave is _dtype else torch.float32)
    assert found
    assert all(len(alike) == 1 for alike in found.values())
    assert bool(made) == (mode == "auto")


@pytest.mark.parametrize("leave", [_hook, _layer, _gone, _gradient_hook], ids=lambda one: one.__name__)
def test_a_changed_model_does_not_train_in_a_stack_of_unchanged_ones(leave: Any, made: Any, monkeypatch: Any) -> None:
    """A stack passes through the layers as they were built: with and without stacks the bits are the same."""

    class Changes(FusionClient):
        def fit(self):
            self.train()
            if self.client % 2:
                torch.manual_seed(self.client)
                leave(self)
            return self.train(purpose="again")

        def share(self):
            own = dict(self.model.named_parameters())
            return {"model": {n: own[n].detach().clone() if n in own else v for n, v in self.weights().items()}}

    name, words = enter(monkeypatch, AveragingStrategy, Changes, NoHyper, "changes"), ("clients=5", *OWN)
    assert play(name, *words, "runtime.vectorize='off'").digest == play(name, *words, "runtime.vectorize=auto").digest
    assert max(made) == 5


def test_replicas_are_made_of_a_model_as_it_was_built() -> None:
    with federation("fedavg", *OWN) as (built, _):
        workspace = built.strategy.workspace
        (name,) = {*built.scenario.architectures}
        workspace.model(name).flat.end_dim = 2
        assert [one.flat.end_dim for one in workspace.replicas(name, 2).modules] == [-1, -1]


def test_what_a_stack_lends_is_what_the_client_has() -> None:
    first, second = Replicas(build(), 2).modules
    assert shared(first) is first.__dict__["row"]
    second.out = nn.Linear(6, 10)
    assert torch.equal(shared(second)["out.weight"], second.out.weight)
    first.body.weight.data = torch.full((6, 64), 2.0)
    assert float(shared(first)["body.weight"].mean()) == 2


def test_a_copy_of_a_model_has_its_own_ways() -> None:
    import copy

    model = build()
    AsBuilt(model)
    other = copy.deepcopy(model)
    assert other.__dict__["built"] is None
    other.flat.end_dim = 2
    assert built_of(model).intact()
    built_of(model).restore()
    assert (model.flat.end_dim, other.flat.end_dim) == (-1, 2)


def test_a_parametrization_that_the_model_was_built_with_comes_back() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    AsBuilt(model)
    before, x = [*model.state_dict()], torch.ones(1, 4)
    expected = model(x)
    parametrize.remove_parametrizations(model[0], "weight")
    built_of(model).restore()
    assert [*model.state_dict()] == before
    assert torch.equal(model(x), expected)


class Masked(FusionClient):
    """Half of the first layer is never trained: a hook on its gradient, which `equip` registers, sees to that."""

    @staticmethod
    def equip(model: Any, hyper: Any, build: Any) -> Any:
        model.body.weight.register_hook(lambda gradient: gradient * (torch.arange(64) % 2))
        model.body.weight.rate = 0.5
        return model

    def fit(self):
        assert self.model.body.weight.rate == 0.5
        return self.train()


def test_hooks_and_attributes_that_parameters_were_built_with_hold_for_clients_abreast(monkeypatch: Any) -> None:
    name, words = enter(monkeypatch, AveragingStrategy, Masked, NoHyper, "masked"), ("clients=5", *OWN)
    assert play(name, *words, "runtime.vectorize='off'").digest == play(name, *words, "runtime.vectorize=auto").digest
    with federation(name, *OWN) as (built, _):
        workspace = built.strategy.workspace
        (copied,) = workspace.replicas(built.strategy.architecture, 1).modules
        copied.body.weight.sum().backward()
        assert copied.body.weight.grad[:, 0].tolist() == [0.0] * 6
        assert copied.body.weight.grad[:, 1].tolist() == [1.0] * 6


def _freezes(client: Any) -> None:
    client.model.body.requires_grad_(False)


def _leaves_gradients(client: Any) -> None:
    client.model(client.transfer).sum().backward()


@pytest.mark.parametrize("leave", [_freezes, _leaves_gradients, _hook, _gradient_hook, _unsaved])
def test_what_receive_leaves_beside_state_and_weights_is_there_however_often_clients_are_scored(
    leave: Any, monkeypatch: Any
) -> None:
    class Receives(FusionClient):
        personal = True

        def receive(self, knowledge):
            leave(self)

        def fit(self):
            model = self.model
            self.state["found"] = str([(p.grad is None, p.requires_grad) for p in model.parameters()])
            self.state["more"] = model(self.x).sum().item() + model.mean.sum().item()
            return self.train()

        def share(self):
            return {"lesson": {"n": torch.ones(1)}}

    class Gives(FusionStrategy):
        topics = {"lesson": Topic("lesson", arrays(n=(1,)))}
        records = {"lesson": arrays(n=(1,))}
        transfer = "clients"

        def fuse(self, shares):
            self.publish("lesson", next(iter(shares)).records["lesson"])

    words = (enter(monkeypatch, Gives, Receives, NoHyper, "gives"), "rounds=3", *OWN)
    assert play(*words, "evaluate.every=1").digest == play(*words, "evaluate.every=3").digest


@pytest.mark.parametrize("mode", ["'off'", "auto"])
def test_whoever_makes_the_weights_of_what_all_are_handed_is_named(mode: str, monkeypatch: Any) -> None:
    class Takes(FusionClient):
        def receive(self, knowledge):
            for name, parameter in self.model.named_parameters():
                parameter.data = knowledge["model"].arrays[name]

    name = enter(monkeypatch, AveragingStrategy, Takes, NoHyper, "takes")
    with (
        federation(name, "rounds=1", f"runtime.vectorize={mode}") as (built, _),
        pytest.raises(WorldError, match=r"Takes .*knowledge\['model'\]"),
    ):
        built.run()


def _inputs(client: Any) -> None:
    client.x.add_(0.1)


def _labels(client: Any) -> None:
    client.y[:2] = 0


def _common(client: Any) -> None:
    client.transfer.clamp_(-1, 1)


def _slopes(client: Any) -> None:
    client.x.requires_grad_(True)


@pytest.mark.parametrize("mode", ["'off'", "auto"])
@pytest.mark.parametrize(
    ("write", "told"), [(_inputs, "train"), (_labels, "train"), (_common, "transfer"), (_slopes, "train")]
)
def test_whoever_writes_to_the_examples_that_are_kept_is_named(
    write: Any, told: str, mode: str, monkeypatch: Any
) -> None:
    class Writes(FusionClient):
        def fit(self):
            if self.client == 1:
                write(self)
            return self.train()

    class Lends(AveragingStrategy):
        transfer = "clients"

    words = enter(monkeypatch, Lends, Writes, NoHyper, "writes"), f"runtime.vectorize={mode}", *OWN
    with federation(*words) as (built, _):
        with pytest.raises(WorldError, match=f"Writes wrote to the {told} examples in place"):
            built.run()
        workspace = built.grid.node.workspace
        assert not workspace.tensors(1, "train")[0].requires_grad  # read anew
        assert workspace.written(1) == ""


def test_a_fuse_that_writes_to_the_transfer_set_is_named(monkeypatch: Any) -> None:
    class Noisy(AveragingStrategy):
        transfer = "server"

        def fuse(self, shares):
            super().fuse(shares)
            self.workspace.tensors("transfer")[0].add_(0.1)

    name = enter(monkeypatch, Noisy, FusionClient, NoHyper, "noisy")
    with federation(name) as (built, _), pytest.raises(UserError, match="fuse wrote to the transfer examples in place"):
        built.run()


def _first(half: Any) -> None:
    next(iter(half.workspace.initial(half.architecture).values())).mul_(0.9)


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_whoever_writes_to_the_initial_weights_is_named(mode: str, monkeypatch: Any) -> None:
    """They are everybody's in a process, and a resumed run would have them as they were."""

    class Fades(AveragingStrategy):
        def fuse(self, shares):
            super().fuse(shares)
            _first(self)

    class Writes(FusionClient):
        def fit(self):
            if self.client == 1:
                _first(self)
            return self.train()

    told, vectorize = "wrote to the initial weights of mlp_small in place", f"runtime.vectorize={mode}"
    with pytest.raises(UserError, match=f"fuse {told}"):
        play(enter(monkeypatch, Fades, FusionClient, NoHyper, "fades"), vectorize)
    with federation(enter(monkeypatch, AveragingStrategy, Writes, NoHyper, "writes"), vectorize) as (built, _):
        workspace = built.grid.node.workspace
        before = {name: value.clone() for name, value in workspace.initial("mlp_small").items()}
        with pytest.raises(WorldError, match=f"Writes {told}"):
            built.run()
        assert workspace.written(1) == ""
        assert all(torch.equal(value, before[name]) for name, value in workspace.initial("mlp_small").items())  # anew


@pytest.mark.parametrize(
    ("made", "told"),
    [(lambda model: None, "returned None"), (lambda model: nn.LazyLinear(3), "'weight' without")],
)
def test_what_equip_returns_is_looked_at(made: Any, told: str, monkeypatch: Any) -> None:
    class Equips(FusionClient):
        @staticmethod
        def equip(model: Any, hyper: Any, build: Any) -> Any:
            return made(model)

    name = enter(monkeypatch, AveragingStrategy, Equips, NoHyper, "equips")
    with pytest.raises(UserError, match=told), federation(name) as (built, _):
        built.run()


def test_a_model_that_is_lent_is_of_tensors(monkeypatch: Any) -> None:
    class Numbers(FusionClient):
        def share(self):
            return {"model": {name: value.numpy() for name, value in self.weights().items()}}

    name = enter(monkeypatch, AveragingStrategy, Numbers, NoHyper, "numbers")
    with (
        federation(name) as (built, _),
        pytest.raises(WorldError, match=r"is ndarray; what is shared is a torch"),
    ):
        built.run()


def test_a_stack_passes_through_a_model_as_it_was_built() -> None:
    with federation("fedavg", *OWN) as (built, _):
        workspace = built.strategy.workspace
        workspace.model(built.strategy.architecture).register_forward_hook(lambda m, x, out: None)
        assert workspace.forward(built.strategy.architecture) is not None


def _rebind(client: Any) -> None:
    type(client).counter = client.client


def _append(client: Any) -> None:
    client.memory.append(client.client)


def _remember(client: Any) -> None:
    client.bank["rows"].append(client.client)


def _queue(client: Any) -> None:
    client.newest.append(client.client)


def _scale(client: Any) -> None:
    client.scale.mul_(2)


def _invent(client: Any) -> None:
    type(client).invented = 1


def _forget(client: Any) -> None:
    if "scale" in vars(type(client)):
        del type(client).scale


def _nothing(client: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("leave", "told"),
    [
        (_rebind, "counter"),
        (_append, "memory"),
        (_invent, "invented"),
        (_forget, "scale"),
        (_nothing, ""),
        (_remember, "bank"),
        (_queue, "newest"),
        (_scale, "scale"),
    ],
)
def test_what_is_left_on_the_class_is_named_once(leave: Any, told: str, monkeypatch: Any) -> None:
    class Remembers(FusionClient):
        memory: list[int] = []
        counter, scale = -1, torch.ones(3)
        bank, newest = defaultdict(list), deque(maxlen=3)  # type: ignore[var-annotated]

        def fit(self):
            leave(self)
            return self.train()

    name = enter(monkeypatch, AveragingStrategy, Remembers, NoHyper, "remembers")
    notes = [note for note in play(name).notes if "was written to" in note]
    assert [note.partition(" ")[0] for note in notes] == ([f"Remembers.{told}"] if told else [])


def test_what_a_server_leaves_on_its_class_is_named(monkeypatch: Any) -> None:
    class Counts(AveragingStrategy):
        rounds_played = 0

        def fuse(self, shares):
            type(self).rounds_played += 1
            super().fuse(shares)

    notes = play(enter(monkeypatch, Counts, FusionClient, NoHyper, "counts")).notes
    assert [note.partition(" ")[0] for note in notes if "was written to" in note] == ["Counts.rounds_played"]


class Heavy(AveragingStrategy):
    """Keeps where it stands in ways that a subclass chooses; the mean is published all the same."""

    def __init__(self, *args):
        super().__init__(*args)
        self.told, self.table, self.speed, self.net = [], {"rates": [0.1, math.nan]}, torch.zeros(2), nn.Linear(2, 2)

    def keep(self, mean):
        """What a round leaves on the server."""

    def fuse(self, shares):
        self.keep(shares.mean("model"))
        super().fuse(shares)


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (lambda self, mean: setattr(self, "velocity", mean), ["velocity"]),
        (lambda self, mean: setattr(self, "rounds", self.round), ["rounds"]),
        (lambda self, mean: setattr(self, "best", (0.5, {"mean": mean})), ["best"]),
        (lambda self, mean: setattr(self, "speed", self.speed + 1), ["speed"]),
        (lambda self, mean: (self.told.append(mean), self.speed.add_(1)), ["speed", "told"]),
        (lambda self, mean: self.table["rates"].append(1), ["table"]),
        (lambda self, mean: setattr(self, "many", list(range(2000))), ["many"]),
        (lambda self, mean: self.told.append(self.told), ["told"]),
        # made anew in a round, or the platform's; read; the same again
        (lambda self, mean: setattr(self, "other", nn.Linear(2, 2)), []),
        (lambda self, mean: self.state.update(velocity=mean), []),
        (lambda self, mean: (self.table["rates"], self.speed + 1, self.net(self.speed)), []),
        (lambda self, mean: setattr(self, "table", {"rates": [0.1, self.table["rates"][1]]}), []),
    ],
)
def test_what_a_server_keeps_beside_its_state_is_named(keep: Any, told: list[str], monkeypatch: Any) -> None:
    """A resumed run would start without it, and go on to other bits."""
    name = enter(monkeypatch, type("Keeps", (Heavy,), {"keep": keep}), FusionClient, NoHyper, "keeps")
    notes = [note for note in play(name).notes if "starts without it" in note]
    assert [note.partition(" ")[0] for note in notes] == [f"Keeps.{one}" for one in told]


COUNTED: dict[str, int] = {}
LATEST = -1
DRAWN = torch.Generator().manual_seed(1)
NUMBERS = np.random.default_rng(1)
SHUFFLED = random.Random(1)
WEIGHED = torch.zeros(2)
LEARNT = {"rate": 0.1}  # which is only read


def _count(client: Any) -> None:
    COUNTED["clients"] = COUNTED.get("clients", 0) + 1


class Counting(FusionClient):
    def fit(self):
        _count(self)
        return self.train(lr=LEARNT["rate"])


class Latest(FusionClient):
    def fit(self):
        global LATEST
        LATEST = self.client
        return self.train()


class Drawing(FusionClient):
    def fit(self):
        return self.train(lr=torch.rand(1, generator=DRAWN).item())


class Shuffling(FusionClient):
    def fit(self):
        return self.train(lr=SHUFFLED.random())


class Numbering(FusionClient):
    @property
    def rate(self) -> float:
        return NUMBERS.random()

    def fit(self):
        return self.train(lr=self.rate)


class Weighing(FusionClient):
    def fit(self):
        WEIGHED.add_(1)
        return self.train()


class Reading(FusionClient):
    def fit(self):
        return self.train(lr=LEARNT["rate"] + WEIGHED.sum().item() * 0)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Counting, "COUNTED"),
        (Latest, "LATEST"),
        (Drawing, "DRAWN"),
        (Shuffling, "SHUFFLED"),
        (Numbering, "NUMBERS"),
        (Weighing, "WEIGHED"),
        (Reading, ""),
    ],
)
def test_what_is_left_in_a_global_that_a_client_uses_is_named(kind: Any, told: str, monkeypatch: Any) -> None:
    name = enter(monkeypatch, AveragingStrategy, kind, NoHyper, "globals")
    notes = [note for note in play(name).notes if "was written to" in note]
    assert [note.partition(" ")[0] for note in notes] == ([f"{__name__}.{told}"] if told else [])


def test_what_one_client_puts_among_what_it_is_handed_the_next_does_not_find(monkeypatch: Any) -> None:
    found = set()

    class Puts(FusionClient):
        def receive(self, knowledge):
            arrays = knowledge["model"].arrays
            found.add("mine" in arrays)
            self.load(arrays)
            arrays["mine"] = arrays.pop("out.weight")

    play(enter(monkeypatch, AveragingStrategy, Puts, NoHyper, "puts"), *OWN)
    assert found == {False}


def test_a_fuse_that_writes_to_what_clients_hold_is_named(monkeypatch: Any) -> None:
    class Grows(AveragingStrategy):
        topics = {**AveragingStrategy.topics, "pace": Topic("state", arrays(n=(1,)))}

        def begin(self):
            super().begin()
            self.publish("pace", {"n": torch.ones(1)})

        def fuse(self, shares):
            super().fuse(shares)
            self.published("pace")["n"].add_(1)

    name = enter(monkeypatch, Grows, FusionClient, NoHyper, "grows")
    with federation(name) as (built, _), pytest.raises(UserError, match="fuse wrote to the published 'pace' in place"):
        built.run()


@dataclass
class Open:
    """Hyper-parameters that are not frozen."""

    pace: float = 1.0


def _rate(half: Any) -> None:
    half.scenario.config.train.lr *= 0.9


def _pace(half: Any) -> None:
    half.hyper.pace += 1


@pytest.mark.parametrize("mode", ["'off'", "auto"])
@pytest.mark.parametrize(("change", "told"), [(_rate, "train.lr"), (_pace, "strategy.pace")])
def test_whoever_changes_the_settings_of_all_is_named(change: Any, told: str, mode: str, monkeypatch: Any) -> None:
    class Decays(FusionClient):
        def fit(self):
            change(self)
            return self.train()

    class Slows(AveragingStrategy):
        def fuse(self, shares):
            super().fuse(shares)
            change(self)

    words = (f"runtime.vectorize={mode}", *OWN)
    with federation(enter(monkeypatch, AveragingStrategy, Decays, Open, "decays"), *words) as (built, _):
        before = built.scenario.config.train.lr
        with pytest.raises(WorldError, match=f"client 0: Decays set {told}"):
            built.run()
        assert built.scenario.config.train.lr == before
    with (
        federation(enter(monkeypatch, Slows, FusionClient, Open, "slows"), *words) as (built, _),
        pytest.raises(UserError, match=f"fuse set {told}"),
    ):
        built.run()


def test_what_a_client_notes_beside_the_settings_it_was_sent_is_its_own(monkeypatch: Any) -> None:
    found = set()

    class Notes(FusionClient):
        def fit(self):
            found.add("noted" in self.config)
            self.config["noted"] = self.client
            return self.train()

    play(enter(monkeypatch, AveragingStrategy, Notes, NoHyper, "notes"))
    assert found == {False}


def test_what_python_itself_notes_on_a_class_is_no_leak() -> None:
    class Plain(FusionClient):
        """Has annotations that nobody asked for yet."""

    kept = ClassAttributes(Plain, FusionClient)
    assert Plain.__annotations__ == {}
    Plain.__doc__ = "another"
    assert kept.written() == ""
    FusionClient.noted = 1  # type: ignore[attr-defined]
    try:
        assert kept.written() == ""
    finally:
        del FusionClient.noted  # type: ignore[attr-defined]
    Plain.noted = 1  # type: ignore[attr-defined]
    assert [kept.written(), kept.written()] == ["Plain.noted", ""]


def test_what_a_phase_of_its_own_returns_is_looked_at(monkeypatch: Any) -> None:
    class Probed(AveragingStrategy):
        setup = ("probe",)
        records_probe: dict[str, Any] = {}

        def fuse_probe(self, shares):
            pass

    class Probes(FusionClient):
        def probe(self):
            return None

    name = enter(monkeypatch, Probed, Probes, NoHyper, "probed")
    with federation(name, "rounds=1") as (built, _), pytest.raises(WorldError) as error:
        built.run()
    assert "probe() of Probes returned None; a dict is needed" in str(error.value)
