"""Where a process works on clients in turn: one built model per architecture, and the data as tensors on its device."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from fedfuse import models
from fedfuse.compat.torch_state import hooked, parameters
from fedfuse.compat.torch_writes import writes
from fedfuse.config.catalogue import LANGUAGE
from fedfuse.config.idle import adapts
from fedfuse.core.scenario import Scenario
from fedfuse.core.texts import Texts
from fedfuse.data.federated import FederatedData
from fedfuse.errors import UserError
from fedfuse.models.as_built import AsBuilt, built_of
from fedfuse.models.in_place import frozen, overlay, variable
from fedfuse.models.replicas import Replicas
from fedfuse.models.shared_memory import share
from fedfuse.seeding import seed_of
from fedfuse.train import abreast
from fedfuse.train.abreast_base import common_base
from fedfuse.train.abreast_batches import sent
from fedfuse.train.abreast_layers import Forward, stacked
from fedfuse.train.adapters import LoRA, inject
from fedfuse.train.ledger import Ledger
from fedfuse.train.task import check_order
from fedfuse.train.training import training_mode
from fedfuse.wire.knowledge import Item
from fedfuse.wire.records import Arrays, Layout, Scope, layout_of

SCOPES = 256  # scopes that are kept: one for each architecture and number of examples that a client may have
SENT = 4  # values of knowledge that stay on a GPU for the next client: a strategy has few topics that are for all
Equip = Callable[[nn.Module, Callable[[str], nn.Module]], nn.Module]


class Workspace:
    """One built model per architecture, resident in this process; parameters are overwritten in place.

    Parameters
    ----------
    scenario : Scenario
    equip : callable, optional
        `equip(model, build) -> model`: what a strategy adds to every client's model (adapters, a second head).
    device : torch.device
    ledger : Ledger or None
        Where a deployed site notes what its examples' privacy has been spent on; it draws noise from its own entropy.
        None in a simulation.
    transfer : bool
        Whether the strategy says that it uses the transfer set here, at the server or at clients.
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
        self._bare: dict[str, nn.Module] = {}
        self._replicas: dict[str, Replicas] = {}
        self._forwards: dict[str, Forward | None] = {}
        self._initial: dict[str, Arrays] = {}
        self._unwritten: dict[str, int] = {}  # writes to these when they were made
        self._layouts: dict[str, Layout] = {}
        self._scopes: dict[tuple[str, int], Scope] = {}
        self._dims: dict[tuple[str, int | None], dict[str, int]] = {}
        self._tensors: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
        self._cached = 0
        # by client (None: what all share), the examples that were given out, and how often they had been written to
        self._handed: defaultdict[int | None, dict[tuple[Any, ...], tuple[Any, int]]] = defaultdict(dict)
        # all clients' training examples on a GPU; empty where it has no room for them, None before that was tried
        self._pool: tuple[torch.Tensor, ...] | None = None
        # the last values of knowledge as they were given, each with its copy on this device
        self._sent: deque[tuple[Arrays, Arrays]] = deque(maxlen=SENT)
        self.texts = Texts(self)
        budget = scenario.config.runtime.memory
        self._predicts = transfer and scenario.data.transfer is not None
        self._room = (512 if budget is None else min(512, budget // 32)) * 2**20

    def build(self, architecture: str, draw: int = 0) -> nn.Module:
        """Build a fresh model of an architecture with its initial weights, without what a strategy adds.

        Parameters
        ----------
        architecture : str
        draw : int
            Where weights are drawn at random and not loaded: which draw it is. 0 are the weights that clients have.

        Raises
        ------
        UserError
            If it cannot be built, or does not read what the data are.
        """
        dataset, config = self.scenario.data.dataset, self.scenario.config
        architecture = models.language_of(architecture, dataset.kind_said, dataset.next_token)
        check_reads(architecture, self.scenario)
        if config.model.quantize != "none" and self.device.type != "cuda":
            raise UserError(
                f"model.quantize={config.model.quantize} needs a GPU, and here is {self.device.type}: set "
                f"runtime.device=cuda and runtime.server_device=cuda"
            )
        model = models.build(
            architecture,
            shape=dataset.shape,
            classes=self.scenario.classes,
            config=config.model,
            seed=seed_of(config.seed, "draw", draw) if draw else config.seed,
            pad=dataset.pad,
            vocabulary=dataset.vocabulary,
        )
        if dataset.next_token:
            check_order(model, architecture, dataset.shape[0], self.scenario.classes)
        return model

    def _adapted(self, model: nn.Module) -> nn.Module:
        """The model with adapters where `model.lora_rank` asks for some: its base then neither changes nor travels."""
        config = self.scenario.config.model
        if config.lora_rank is None or adapts(self.scenario.config):
            return model
        scale = 1.0 if config.lora_alpha is None else config.lora_alpha / config.lora_rank
        options: dict[str, Any] = {"rank": config.lora_rank, "scale": scale, "dropout": config.lora_dropout}
        try:
            return inject(model, LoRA, config.lora_targets, **options)
        except UserError as error:
            raise UserError(str(error).replace("strategy.", "model.lora_", 1)) from None

    def model(self, architecture: str) -> nn.Module:
        """The resident model of an architecture, in whatever state it was left.

        For a client that is trained side by side with others (`runtime.vectorize`), it is that client's replica.
        """
        if abreast.desk is not None and (own := abreast.desk.replica(self, architecture)) is not None:
            return own
        return self.resident(architecture)

    def resident(self, architecture: str) -> nn.Module:
        """The one model of an architecture that is not a replica."""
        if architecture not in self._models:
            model = self.build(architecture)
            with torch.random.fork_rng(devices=[]):  # what is added is as equal everywhere as the model itself
                torch.default_generator.manual_seed(seed_of(self.scenario.seed, "equip", architecture))
                model = self._adapted(model)
                if self.equip is not None:
                    model = _whole(self.equip(model, self.build))
            if frozen(model) and self.device.type == "cpu":
                share(model, frozen(model))  # one copy a machine, however many processes and clients
            self._models[architecture] = model = model.to(self.device)
            training_mode(model)
            AsBuilt(model)
            initial = self._initial[architecture] = {k: v.detach().clone() for k, v in variable(model).items()}
            self._unwritten[architecture] = writes(initial.values())
        return self._models[architecture]

    def replicas(self, architecture: str, count: int) -> Replicas:
        """At least so many copies of an architecture's model, whose weights lie side by side."""
        found = self._replicas.get(architecture)
        if found is None or len(found) < count:
            model = self.resident(architecture)
            built_of(model).restore()  # from whatever an earlier client left
            found = self._replicas[architecture] = Replicas(model, count)
        return found

    def forward(self, architecture: str) -> Forward | None:
        """A forward pass of many replicas of an architecture at once; None where its layers have no such form."""
        if architecture not in self._forwards:
            model = self.resident(architecture)
            built_of(model).restore()
            alone = hooked(parameters(model))  # hooks on gradients, which no gradient of a whole stack would call
            self._forwards[architecture] = None if alone else stacked(model) or common_base(model)
        return self._forwards[architecture]

    def initial(self, architecture: str) -> Arrays:
        """The initial weights by name, equal for all clients of an architecture; not to be written to."""
        self.resident(architecture)
        return self._initial[architecture]

    def drawn(self, architecture: str) -> bool:
        """Whether an architecture starts from random weights: no checkpoint, no directory, no builder of one's own."""
        model, (kind, _, word) = self.scenario.config.model, architecture.partition("@")
        given = model.checkpoint or architecture in model.checkpoints or (model.paths.get(word) if word else model.path)
        return not (given or kind == "custom" or ":" in kind)

    def fresh(self, architecture: str) -> nn.Module:
        """The resident model reset to its initial weights.

        Parameters that these do not hold become NaN, so that nothing of an earlier client can be used unseen.
        """
        model, initial = self.unset(architecture), self._initial[architecture]
        fixed = frozen(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in fixed and name not in initial:  # all others are overwritten by `overlay`
                    parameter.fill_(float("nan"))
        overlay(model, initial)
        return model

    def unset(self, architecture: str) -> nn.Module:
        """The resident model without gradients, for whoever overwrites all of it before looking.

        Its layers, hooks, modes and attributes, and what is trained, are as built, whatever the client before left.
        """
        model = self.model(architecture)
        built_of(model).restore()
        return model

    def loaded(self, architecture: str, arrays: Arrays) -> nn.Module:
        """The resident model holding these weights."""
        model = self.fresh(architecture)
        overlay(model, arrays)
        return model

    def bare(self, architecture: str, arrays: Arrays) -> nn.Module:
        """The resident network as it is built, without what `equip` adds, holding these weights, all of them."""
        if architecture not in self._bare:
            self._bare[architecture] = self.build(architecture).to(self.device)
        overlay(self._bare[architecture], arrays)
        return self._bare[architecture]

    def scope(self, client: int, hyper: Any) -> Scope:
        """The sizes a spec may name, for one client."""
        architecture, examples = self.scenario.architectures[client], self.scenario.examples(client)
        known = self._scopes.get((architecture, examples))
        if known is not None and known.hyper is hyper:
            return known
        subset = getattr(hyper, "subset", None)
        common = self._dims.get((architecture, subset))
        if common is None:
            transfer = self.scenario.data.transfer
            common = self._dims[architecture, subset] = {
                "classes": self.scenario.classes,
                "clients": self.scenario.clients,
                "transfer": 0 if transfer is None else len(transfer),
                "subset": self.scenario.rows_of(subset),
                "vocabulary": len(self.texts.pieces(architecture)) if self._predicts else 0,
                "places": self.texts.places(architecture).tokens.shape[1] if self._predicts else 0,
                "features": int(getattr(self.model(architecture), "feature_dim", 0) or 0),
            }
        if len(self._scopes) >= SCOPES:
            self._scopes.clear()
        made = Scope(
            {**common, "examples": examples}, self.layout(architecture), hyper, module=self._models[architecture]
        )
        self._scopes[architecture, examples] = made
        return made

    def layout(self, architecture: str) -> Layout:
        """Names, dtypes and shapes of an architecture's arrays."""
        if architecture not in self._layouts:
            self._layouts[architecture] = layout_of(self.initial(architecture))
        return self._layouts[architecture]

    def transfer(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Inputs of rows of the transfer set, and their labels, or None where it is unlabelled.

        Parameters
        ----------
        rows : Tensor
            Indices (n,). Where they are all rows in order, what is returned is the set itself and not a copy.
        """
        x, y = self.tensors("transfer")
        if len(rows) == len(x) and torch.equal(rows.cpu(), torch.arange(len(x))):
            return x, y
        return x[rows], None if y is None else y[rows]

    # -- data as tensors, kept while there is room ---------------------------------------------------------

    def tensors(self, *key: Any) -> Any:
        """Inputs and labels of (client, split), of "transfer" or of "test", cached in a process up to a limit.

        Raises
        ------
        UserError
            If the transfer set is asked for and the strategy does not declare that it uses it here.
        """
        if key == ("transfer",) and not self.transfer_declared:
            raise UserError(
                "the transfer set is used where the strategy does not say so: "
                "declare transfer = 'clients', 'server' or 'both' in its class"
            )
        return self.kept(key, lambda: self._tensors_of(key))

    def _tensors_of(self, key: tuple[Any, ...]) -> Any:
        data = self.scenario.data
        if self.device.type == "cuda" and len(key) == 2 and (found := self._resident_rows(*key)) is not None:
            return found
        if key == ("transfer",):
            return data.transfer_tensors()
        if key == ("test",):
            return data.test_tensors()
        if key[0] == "pooled":
            parts = [data.tensors(c, "train") for c in range(self.scenario.clients)]
            return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
        return data.tensors(*key)

    def _resident_rows(self, client: Any, split: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A client's examples, taken from all of them that lie on a GPU; None where there is no room for that."""
        data = self.scenario.data
        if type(data) is not FederatedData or data.dataset.kind == "tokens" or not isinstance(client, int):
            return None
        if self._pool is None:
            train = data.dataset.train
            size = 4 * train.inputs.size + 8 * len(train)
            self._pool = ()
            if size <= torch.cuda.mem_get_info(self.device)[0] // 4:
                x, y = data.dataset.tensor(train.inputs), torch.from_numpy(np.array(train.targets))
                self._pool = self._moved(x), self._moved(y)
        if not self._pool:
            return None
        rows = self._moved(torch.from_numpy(np.array(data.rows_of(client, split))))
        x, y = (whole.index_select(0, rows) for whole in self._pool)
        return x, y

    def here(self, item: Item) -> Item:
        """Knowledge on this process's device. What several clients are given is sent there once."""
        if self.device.type == "cpu":
            return item
        found = next((there for known, there in self._sent if known is item.arrays), None)
        if found is None:
            found = {name: self._moved(value) for name, value in item.arrays.items()}
            self._sent.append((item.arrays, found))
        return replace(item, arrays=found)

    def woken(self, state: dict[str, Any]) -> dict[str, Any]:
        """A client's private state, its tensors on this process's device."""
        if self.device.type == "cpu":
            return state
        return {
            key: self._moved(value) if isinstance(value, torch.Tensor)
            else self.woken(value) if isinstance(value, dict) else value
            for key, value in state.items()
        }  # fmt: skip

    def kept(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Tensors made once, on this process's device, and kept while there is room; the oldest go first."""
        if key in self._tensors:
            self._tensors.move_to_end(key)
            value = self._tensors[key]
        else:
            value = make()
            value = tuple(None if t is None else self._moved(t) for t in value) if value is not None else None
            self._tensors[key] = value
            self._cached += _size(value)
            while self._cached > self._room and len(self._tensors) > 1:
                gone, freed = self._tensors.popitem(last=False)
                # `get`, since a look by index would make an entry for each client that ever was
                if (handed := self._handed.get(_owner(gone))) is not None:
                    handed.pop(gone, None)
                self._cached -= _size(freed)
        if value is not None:
            handed = self._handed[_owner(key)]
            if key not in handed or handed[key][0] is not value:
                handed[key] = value, _writes(value)
        return value

    def written(self, who: int | None = None) -> str:
        """Which examples or initial weights were written to since they were given out, in words; empty if none were.

        Parameters
        ----------
        who : int, optional
            The client whose own examples are looked at, beside those that all share.
        """
        own = {} if who is None else self._handed.pop(who, {})  # the client's next turn counts from there
        for handed in (own, self._handed[None]):
            for key, (value, before) in handed.items():
                if _writes(value) == before:
                    continue
                # read anew when they are next asked for: a deployed site goes on, without this client's reply
                if self._tensors.pop(key, None) is not None:
                    self._cached -= _size(value)
                del handed[key]
                return f"the {key[0] if handed is not own else key[1]} examples"
        for architecture, initial in self._initial.items():
            if writes(initial.values()) != self._unwritten[architecture]:
                for made in (self._models, self._initial, self._replicas, self._forwards):  # anew, by the seed
                    made.pop(architecture, None)
                return f"the initial weights of {architecture}"
        return ""

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on this process's device; a large one is pinned on the way, so that its copy stops no loop."""
        return tensor.to(self.device) if tensor.is_cuda else sent(tensor, self.device)


def _whole(model: Any) -> nn.Module:
    """What `equip` returned; refused where it is no model, or a model with weights that have no shape yet."""
    if not isinstance(model, nn.Module):
        raise UserError(f"equip() of the strategy's client half returned {model!r:.40}; an nn.Module is needed")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise UserError(
                f"equip() of the strategy's client half leaves {name!r} without a shape (a lazy layer): call the layer "
                f"once on an example there"
            )
    return model


def _size(value: Any) -> int:
    return 0 if value is None else sum(0 if t is None else t.numel() * t.element_size() for t in value)


def _writes(value: tuple[torch.Tensor | None, ...]) -> int:
    """Writes in place so far; a tensor that asks for gradients counts as one: they would add up from round to round."""
    held = [tensor for tensor in value if tensor is not None]
    return writes(held) + sum([tensor.requires_grad for tensor in held])


def _owner(key: tuple[Any, ...]) -> int | None:
    return key[0] if isinstance(key[0], int) else None


def check_reads(architecture: str, scenario: Scenario) -> None:
    """Refuse a language model on anything but tokens, and tokens to what computes with numbers.

    Raises
    ------
    UserError
        Naming the architecture and the data.
    """
    dataset = scenario.data.dataset
    if dataset.kind == "tokens" and not models.reads_tokens(
        architecture, dataset.shape, scenario.classes, scenario.config.model
    ):
        raise UserError(
            f"model={architecture} takes numbers, and data={dataset.name} gives tokens: choose "
            f"{' or '.join(LANGUAGE)}, or a model of your own that embeds int64 (model.build)"
        )
    if architecture.partition("@")[0] in LANGUAGE and dataset.kind != "tokens":
        raise UserError(
            f"model={architecture} reads tokens, and data={dataset.name} gives {dataset.kind}: "
            f"set data.extra.tokenizer=<directory of the model>, or data.extra.text=tokens, or choose another model"
        )
