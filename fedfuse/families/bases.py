"""What strategies share that train a small R in a common basis, W₀ + s·B R A: where B and A come from, and anew.

A basis is hashed, so that a site with another one refuses to take part. Random ones and those of W₀ every site makes
itself; those of gradients are made by the server, in set-up, and sent. After some rounds s·B R A may be folded into
the base and a new basis taken, which leaves the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.config.registry import hyper, without_effect
from fedfuse.core.shares import Records, Shares
from fedfuse.core.workspace import Workspace
from fedfuse.errors import UserError
from fedfuse.families import lora
from fedfuse.families.ranks import RankedClient, RankedHyper, RankedStrategy
from fedfuse.train import basis
from fedfuse.train.entropy import gaussian
from fedfuse.train.privacy import drawn
from fedfuse.train.svd import WAYS
from fedfuse.train.task import task_loss
from fedfuse.wire.knowledge import Item, Topic
from fedfuse.wire.records import Arrays, arrays


@dataclass(frozen=True)
class BasisHyper(RankedHyper):
    """Hyper-parameters of the basis."""

    alpha: float | None = hyper(None, "α in the scale s = α/r; null: r, so that s = 1", above=0)
    init: str = hyper(
        "sign_grad", "where the basis comes from (weight_svd: where nothing may be uploaded)", choices=basis.INITS
    )
    init_from: str = hyper("sketch", "whose gradient, for gradient inits", choices=("clients", "sketch", "transfer"))
    init_rows: int = hyper(32, "training rows a client (or the server) takes the gradient of", low=1)
    svd: str = hyper(
        "auto", "singular vectors: exact, randomised (seeded), or auto: randomised for large layers", choices=WAYS
    )
    oversample: int = hyper(4, "triples sent beyond r in a sketch", low=0)
    rate: float = hyper(1e-3, "η of the first step, only for the size of S_r", above=0)
    r0: str = hyper("zero", "R at the start", choices=("zero", "singular"))
    refresh: int | None = hyper(None, "rounds between merging B R A and taking a new basis; null: never", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r0 != "singular":
            without_effect(self, "rate", f"with strategy.r0={self.r0}, where R starts at 0")
        if not self.needs_gradient:
            for name in ("init_from", "init_rows", "oversample"):
                without_effect(self, name, f"with strategy.init={self.init}, which takes no gradient")
        elif self.init_from != "sketch":
            without_effect(self, "oversample", f"with strategy.init_from={self.init_from}, which sends no sketch")
        if self.init == "random_orthonormal":
            without_effect(self, "svd", "with strategy.init=random_orthonormal, which decomposes nothing")

    @property
    def needs_gradient(self) -> bool:
        """Whether the basis is made of a gradient."""
        return self.init in ("raw_grad", "sign_grad")


class BasisClient(RankedClient):
    """Client half: trains R in the common basis, and says its gradient of W₀ where the basis is made of it."""

    trains = ("lora_R",)
    averaged = "R"
    folded = "merged"

    @classmethod
    def equip(cls, model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Adapters in a random orthonormal basis from the run's seed, or in W₀'s leading directions."""
        folds = hyper.refresh is not None
        model = lora.equip(model, hyper, lora.LoRASB, cls.trains, delta=folds)
        if hyper.init == "weight_svd":
            model.load_state_dict(basis.public_basis(model, hyper.init, hyper.rank, way=hyper.svd), strict=False)
        return model

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Take Δ and the basis, if they are sent, make sure that it is the server's, then take R and the head."""
        if "merged" in knowledge:
            self.load(lora.deltas(knowledge["merged"].arrays), strict=False)
        if "basis" in knowledge:
            self.load(knowledge["basis"].arrays, strict=False)
        if "sha" in knowledge:
            basis.check_basis(self.model, knowledge["sha"].arrays["sha"], f"client {self.client}")
        super().receive(knowledge)

    def setup(self) -> Records:
        """Sum of the gradients of W₀ over some training rows; under privacy clipped by example, and noised."""
        if self.scenario.config.privacy.by_example:
            found, count = self._private_gradients()
        else:
            order = torch.randperm(len(self.x), generator=self.generator("init rows"))
            rows = order[: self.hyper.init_rows].sort().values
            found, count = self._gradients(rows, self.scenario.config.train.batch_size), float(len(rows))
        return {"gradient": basis.told(found, count, self._width, self.hyper.svd)}

    @property
    def _width(self) -> int | None:
        return self.hyper.rank + self.hyper.oversample if self.hyper.init_from == "sketch" else None

    def refresh(self) -> Records:
        """The same at W₀ + Δ: R, which is part of Δ by now, counts no longer."""
        self.load({name: torch.zeros_like(value) for name, value in self.parts("lora_R", head=False).items()}, False)
        return self.setup()

    def _gradients(self, rows: Tensor, batch: int, clip: float | None = None) -> Arrays:
        x, y = self.x, self.y
        return basis.gradients(self.model, lambda i: self.objective(self.model(x[i]), y[i]), rows, batch, clip)

    def _private_gradients(self) -> tuple[Arrays, float]:
        """The same as one release of the budget: a Poisson sample of about `init_rows`, which is the count told."""
        clip, examples = self.scenario.config.privacy.clip, self.scenario.examples(self.client)
        expected = min(self.hyper.init_rows, examples)
        rate = expected / examples
        with self.inside_budget((self.seed, "basis", self.client)) as (budget, sampling, noising):
            noise = budget.noise([budget.steps(planned) for planned in self.trainings()], (rate, 1))
            budget.spend(noise, rate, 1)
            found = self._gradients(drawn(len(self.x), rate, sampling), 1, clip)
        noised = {n: g + gaussian(g, noise * clip, noising) for n, g in found.items()}
        return noised, float(expected)


class BasisStrategy(RankedStrategy):
    """Server half: publishes basis, its hash and R; folds them into the base and takes a new basis, if asked to."""

    averaged = kept = "R"
    kinds = ("lora_R",)
    folded = "merged"
    topics = {
        "sha": Topic("state", arrays(sha=("uint8", 32)), once=True),
        "basis": Topic("state", lora.part("basis_A", "basis_B", head=False), once=True, sometimes=True),
        "merged": Topic("fold", fold=lora.fold, increment=lora.increments, sometimes=True),
        "R": Topic("state", lora.at_most(lora.part("lora_R"))),
    }

    @property
    def means(self) -> tuple[str, ...]:
        """R, where all have all of it."""
        return () if self.hyper.ranks else (self.averaged,)

    records_setup = records_refresh = {"gradient": basis.gradient_arrays}

    @property
    def setup(self) -> tuple[str, ...]:  # type: ignore[override]
        """One phase of gradients where the basis is made of the clients' gradients."""
        return ("setup",) if self.asks_clients else ()

    def __init__(self, hyper: BasisHyper, workspace: Workspace) -> None:
        super().__init__(hyper, workspace)
        if hyper.needs_gradient and hyper.init_from == "transfer":
            self.transfer, workspace.transfer_declared = "server", True  # type: ignore[misc]

    @property
    def asks_clients(self) -> bool:
        """Whether bases are made of the clients' gradients."""
        return self.hyper.needs_gradient and self.hyper.init_from != "transfer"

    def refreshes(self, round: int) -> bool:
        """Whether a round ends with a new basis."""
        return self.hyper.refresh is not None and round % self.hyper.refresh == 0

    def phases(self, round: int) -> tuple[str, ...]:
        """Training, and gradients for a new basis."""
        return ("train", "refresh") if self.refreshes(round) and self.asks_clients else ("train",)

    @property
    def made_from(self) -> str:
        """Where the basis comes from."""
        if not self.hyper.needs_gradient:
            return f"R = 0 in a public basis ({self.hyper.init}), which no private example has touched"
        if self.hyper.init_from == "transfer":
            return "a basis of gradients on the server's labelled set, which is taken to be public"
        return "a basis of the clients' gradients, clipped and noised, inside each client's budget"

    def begin(self) -> None:
        """Publish hash and R; where the basis is made of gradients, later."""
        if self.hyper.refresh is not None:
            if self.asks_clients and self.scenario.config.privacy.by_example:
                raise UserError(
                    f"strategy.refresh={self.hyper.refresh}: the privacy budget has room for one release of gradients; "
                    "allowed with privacy: init=random_orthonormal or weight_svd, init_from=transfer, or refresh=null"
                )
            self.fold_nothing()
        if not self.hyper.needs_gradient:
            if self.hyper.r0 == "singular":
                raise UserError(f"strategy.r0=singular: init={self.hyper.init} has no first step; allowed: zero")
            model = self.workspace.fresh(self.architecture)
            self.settle(basis.basis_in(model), self.parts("lora_R"), False)
        elif self.hyper.init_from == "transfer":
            self.start_from(self.transfer_gradient())

    def transfer_gradient(self) -> Arrays:
        """Σ of gradients over rows of the server's labelled set."""
        if self.scenario.data.transfer is None:
            raise UserError("strategy.init_from=transfer: there is no transfer set; allowed: clients, sketch")
        self.workspace.transfer_declared = True  # by a hyper-parameter: other bases need no transfer set
        x, y = self.workspace.tensors("transfer")
        if y is None:
            raise UserError("strategy.init_from=transfer: needs labels; set transfer.labelled=true")
        model = self.workspace.loaded(self.architecture, self.state_of_model())
        rows = torch.randperm(len(x), generator=self.generator("init rows"))[: self.hyper.init_rows]
        size = self.scenario.config.train.batch_size
        return basis.gradients(model, lambda i: task_loss(model(x[i]), y[i]), rows, size)

    def fuse_setup(self, shares: Shares) -> None:
        """The gradient over the joined rows."""
        self.start_from(basis.joint(share.records["gradient"] for share in shares))

    fuse_refresh = fuse_setup

    def start_from(self, gradient: Mapping[str, Any]) -> None:
        """Basis and R₀ of the first step."""
        steps = basis.first_steps(gradient, self.hyper.init, self.hyper.rate)
        found, latents, captured = basis.basis_of(steps, self.hyper.rank, self.hyper.svd)
        for name, share in captured.items():
            self.log(f"energy/{name}", share)
        start = self.state.get("R") or self.parts("lora_R")
        self.settle(found, start | latents if self.hyper.r0 == "singular" else start, True)

    def settle(self, found: Arrays, latents: Arrays, sent: bool) -> None:
        """Publish the basis (or only its hash) and R."""
        if sent:
            self.publish("basis", found)
        self.publish("sha", {"sha": basis.basis_sha(found)})
        self.publish_whole(latents)

    def mean_over_holders(self, shares: Shares) -> Arrays:
        """Each entry's weighted mean over the clients whose rank reaches it; where none took part, it stays."""
        if not self.hyper.ranks:
            return shares.averaged("R", ((share, self.padded(share), self.weight_of(share)) for share in shares))
        old: Arrays = self.state["R"]

        def marked(share: Any) -> Arrays:
            ones = {name: torch.ones_like(value) for name, value in share.records["R"].items()}
            return self.padded(share) | {f"held {name}": value for name, value in lora.pad(ones, old).items()}

        both = self.mean((share, marked(share)) for share in shares)
        out = {}
        for name, value in old.items():
            held = both[f"held {name}"]
            mean = both[name] / held.where(held > 0, 1.0)
            out[name] = torch.where(held > 0, mean, value.to(mean.dtype))
        return out

    def take_over(self, latents: Arrays) -> None:
        """Publish a new R; or, where the round ends with a new basis, fold R and take one."""
        if not self.refreshes(self.round):
            self.publish_whole(latents)
            return
        self.merge(latents)
        if self.asks_clients:
            return
        if self.hyper.needs_gradient:
            self.start_from(self.transfer_gradient())
            return
        model, delta = self.workspace.model(self.architecture), lora.deltas(self.published("merged"))
        draw = self.generator("basis")
        found = basis.public_basis(model, self.hyper.init, self.hyper.rank, delta, draw, self.hyper.svd)
        self.settle(found, self.state["R"], True)

    def merge(self, latents: Arrays) -> None:
        """Δ ← Δ + s·B R A, R ← 0, m ← 0."""
        now, r = self.state_of_model(), {name: latents[f"{name}.lora_R.weight"] for name in self.layers}
        updates = (
            (name, layer.scale * now[f"{name}.basis_B"].double() @ r[name].double(), now[f"{name}.basis_A"])
            for name, layer in self.layers.items()
        )
        self.fold(updates, next(iter(r.values())).dtype)
        zero = {name: torch.zeros_like(value) for name, value in latents.items() if not lora.is_head(name)}
        self.state |= {"R": latents | zero, "momentum": {}}
