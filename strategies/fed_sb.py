"""Fed-SB: clients train only the small R of W₀ + s·B R A in one common basis, so that averaging is exact.

Box (Singhal et al., "Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in
(Private) Federated LoRA Fine-Tuning", 2025, arXiv 2502.15436; initialisation of LoRA-SB, arXiv 2411.19557). B
(d × r) and A (r × k) are frozen and orthonormal, s = α/r = 1. Before round 1, with g = Σ dL/dW₀ over a few
training rows (set-up):

    ΔW₀ = −η·sign(g) ≈ U_r S_r V_rᵀ;   B ← U_r,  A ← V_rᵀ,  R ← S_r (`r0=singular`) or 0 (`r0=zero`: the base model)

In round t, for the sampled clients S_t:

    client i:  R_i ← R_t; E epochs of SGD on R_i (and the head)
    server:    R_{t+1} ← R_t + γ·m,  m ← β·m + (Σ_i p_i R_i − R_t)          (β = 0, γ = 1: the mean)

Σ p_i B R_i A = B (Σ p_i R_i) A for any p, so partial participation and server momentum stay exact. Travels:
b·r² (and the head) each way, a client, a layer and a round. One-off: `random_orthonormal` and `weight_svd`
are computed by every site from the run's seed or from W₀, 32 bytes of hash a client; gradient inits send
b·r·(d+k) down, and up b·d·k (`init_from=clients`, per-client gradients whose sum is the pooled one),
b·q·(d+k) (`sketch`, their q leading triples) or nothing (`transfer`: the server's labelled set). A site whose
basis has another hash refuses to take part. The released code pools the clients' training data for the
gradient, which no federation can do; it sends A and B as well, and averages the R of all rounds so far: three
things not done here. The default is the paper's sign of the gradient, by sketch. Clients of smaller rank (`ranks`)
train the leading r_i × r_i block; each entry is averaged over the clients that hold it, and stays as it is where none
took part. Choices of ours: R = 0 at the start, because S_r is as small as η; and `refresh`, after every so many rounds
(Δ = 0 before):

    Δ ← Δ + s·B R A,  R ← 0,  m ← 0,  B and A anew, over W₀ + Δ, as `init` says

which leaves the model as it is and lets later rounds learn outside the first basis. A refresh sends each node
2·b·r·(d+k) numbers once (or Δ, once that is smaller); gradient inits ask that round's clients for gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedfuse import (
    AdapterClient,
    AdapterStrategy,
    Arrays,
    Item,
    Layout,
    RankedHyper,
    Records,
    Residents,
    Scope,
    Shares,
    Topic,
    UserError,
    arrays,
    basis,
    drawn,
    hyper,
    lora,
    strategy,
    task_loss,
)


@dataclass(frozen=True)
class FedSBHyper(BasisHyper):
    """Hyper-parameters of Fed-SB: those of the basis (`init`, `refresh`, …), and the server's step."""

    alpha: float | None = hyper(None, "α in the scale s = α/r; null: r, so that s = 1", above=0)
    init: str = hyper(
        "sign_grad", "where the basis comes from (weight_svd: where nothing may be uploaded)", choices=basis.INITS
    )
    init_from: str = hyper("sketch", "whose gradient, for gradient inits", choices=("clients", "sketch", "transfer"))
    init_rows: int = hyper(32, "training rows a client (or the server) takes the gradient of", low=1)
    oversample: int = hyper(4, "triples sent beyond r in a sketch", low=0)
    rate: float = hyper(1e-3, "η of the first step, only for the size of S_r", above=0)
    r0: str = hyper("zero", "R at the start", choices=("zero", "singular"))
    refresh: int | None = hyper(None, "rounds between merging B R A and taking a new basis; null: never", low=1)
    server_momentum: float = hyper(0.0, "β", low=0, high=0.999)
    server_lr: float = hyper(1.0, "γ", above=0)



def gradient_arrays(scope: Scope) -> Layout:
    """What a client shares in set-up: the gradient of each W₀, or the factors of its sketch; and its rows."""
    out: Layout = {"rows": ("float32", (1,))}
    for name in lora.layer_names(scope.model, "lora_R.weight"):
        d, k = scope.model[f"{name}.basis_B"][1][0], scope.model[f"{name}.basis_A"][1][1]
        if scope.hyper.init_from == "sketch":
            q = min(scope.hyper.rank + scope.hyper.oversample, d, k)
            out |= {f"{name}.U": ("float32", (d, q)), f"{name}.V": ("float32", (q, k))}
        else:
            out[f"{name}.gradient"] = "float32", (d, k)
    return out


def over_holders(mean: Arrays, held: Arrays, old: Arrays) -> Arrays:
    """Means of blocks padded with zeros, made means over those who hold an entry.

    Parameters
    ----------
    mean, held, old : dict of Tensor
        Σ p_i R_i, zeros where a client has nothing; Σ p_i over those who have something; and R as it was.
    """
    return {
        name: torch.where(held[name] > 0, value / held[name].where(held[name] > 0, 1.0), old[name].to(value.dtype))
        for name, value in mean.items()
    }


def step(old: Arrays, mean: Arrays, momentum: Arrays, beta: float, rate: float) -> tuple[Arrays, Arrays]:
    """R + γ·m and m ← β·m + (R̄ − R), in float64; with β = 0 and γ = 1, R̄ itself."""
    if beta == 0 and rate == 1:
        return mean, {}
    m = {n: beta * momentum.get(n, 0) + (mean[n].double() - old[n].double()) for n in mean}
    return {n: (old[n].double() + rate * m[n]).to(mean[n].dtype) for n in mean}, m


class FedSBClient(AdapterClient):
    """Trains R in the common basis."""

    @staticmethod
    def equip(model: nn.Module, hyper: FedSBHyper, build: Callable[[str], nn.Module]) -> nn.Module:
        """Adapters in a random orthonormal basis from the run's seed, or in W₀'s leading directions."""
        delta = hyper.refresh is not None
        model = lora.equip(model, hyper, lora.LoRASB, ("lora_R",), default_scale=1.0, delta=delta)
        if hyper.init == "weight_svd":
            found, _, _ = basis.basis_of(basis.base_weights(model), hyper.rank)
            model.load_state_dict(found, strict=False)
        return model

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Take Δ and the basis, if they are sent, make sure that it is the server's, then take R and the head."""
        if "merged" in knowledge:
            self.load(lora.deltas(knowledge["merged"].arrays), strict=False)
        if "basis" in knowledge:
            self.load(knowledge["basis"].arrays, strict=False)
        if "sha" in knowledge:
            basis.check_basis(self.model, knowledge["sha"].arrays["sha"], f"client {self.client}")
        if "R" in knowledge:
            self.load(lora.pad(knowledge["R"].arrays, self.weights()), strict=False)
        self.restore()

    def setup(self) -> Records:
        """Sum of the gradients of W₀ over some training rows; under privacy clipped by example, and noised."""
        size = self.scenario.config.train.batch_size
        if self.scenario.config.privacy.on:
            found, count = self.private_gradients()
        else:
            x, y = self.x, self.y
            rows = torch.randperm(len(x), generator=self.generator("init rows"))[: self.hyper.init_rows].sort().values
            found = basis.gradients(self.model, lambda i: self.objective(self.model(x[i]), y[i]), rows, size)
            count = float(len(rows))
        out = {"rows": torch.tensor([count])}
        for name, gradient in found.items():
            if self.hyper.init_from == "sketch":
                q = min(self.hyper.rank + self.hyper.oversample, *gradient.shape)
                out[f"{name}.U"], out[f"{name}.V"] = basis.sketch(gradient, q)
            else:
                out[f"{name}.gradient"] = gradient
        return {"gradient": out}

    def refresh(self) -> Records:
        """The same at W₀ + Δ: R, which is part of Δ by now, counts no longer."""
        self.load({name: torch.zeros_like(value) for name, value in self.parts("lora_R", head=False).items()}, False)
        return self.setup()

    def private_gradients(self) -> tuple[Arrays, float]:
        """The same as one release of the budget: a Poisson sample of about `init_rows`, which is the count told."""
        clip, expected = (
            self.scenario.config.privacy.clip,
            min(self.hyper.init_rows, self.scenario.examples(self.client)),
        )
        rate = expected / self.scenario.examples(self.client)
        with self.inside_budget((self.seed, "basis", self.client)) as (budget, sampling, noising):
            noise = budget.noise(budget.steps(), (rate, 1))
            budget.spend(noise, rate, 1)
            x, y = self.x, self.y
            rows = drawn(len(x), rate, sampling)
            found = basis.gradients(self.model, lambda i: self.objective(self.model(x[i]), y[i]), rows, 1, clip)
        noised = {n: g + noise * clip * torch.randn(g.shape, generator=noising) for n, g in found.items()}
        return noised, float(expected)

    def share(self) -> Records:
        """R (its leading block, for a smaller rank) and the head."""
        return {"R": lora.cut(self.parts("lora_R"), lora.rank_of(self.hyper, self.client))}


@strategy("fed_sb", client=FedSBClient, hyper=FedSBHyper, paper="Singhal et al. 2025, arXiv 2502.15436")
class FedSB(AdapterStrategy):
    """Mean of the small R of W₀ + B R A in one hashed basis: r² numbers a layer."""

    topics = {
        "sha": Topic("state", arrays(sha=("uint8", 32)), once=True),
        "basis": Topic("state", lora.part("basis_A", "basis_B", head=False), once=True),
        "merged": Topic("fold", fold=lora.fold, increment=lora.increments),
        "R": Topic("state", lora.at_most(lora.part("lora_R"))),
    }
    records = {"R": lora.at_most(lora.part("lora_R"))}
    records_setup = records_refresh = {"gradient": gradient_arrays}
    sums = {}

    @property
    def setup(self) -> tuple[str, ...]:  # type: ignore[override]
        """One phase of gradients where the basis is made of the clients' gradients."""
        return ("setup",) if self.asks_clients else ()

    def __init__(self, hyper: FedSBHyper, residents: Residents) -> None:
        super().__init__(hyper, residents)
        if hyper.needs_gradient and hyper.init_from == "transfer":
            self.transfer, residents.transfer_declared = "server", True  # type: ignore[misc]

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
        self.check_ranks()
        if self.hyper.refresh is not None:
            if self.asks_clients and self.scenario.config.privacy.on:
                raise UserError(
                    f"strategy.refresh={self.hyper.refresh}: the privacy budget has room for one release of gradients; "
                    "allowed with privacy: init=random_orthonormal or weight_svd, init_from=transfer, or refresh=null"
                )
            layers = lora.adapted(self.residents.model(self.architecture))
            self.publish("merged", lora.empty({name: (m.outputs, m.inputs) for name, m in layers.items()}))
        if not self.hyper.needs_gradient:
            if self.hyper.r0 == "singular":
                raise UserError(f"strategy.r0=singular: init={self.hyper.init} has no first step; allowed: zero")
            model = self.residents.fresh(self.architecture)
            self.settle(basis.basis_in(model), self.parts("lora_R"), False)
        elif self.hyper.init_from == "transfer":
            self.start_from(self.transfer_gradient())

    def transfer_gradient(self) -> Arrays:
        """Σ of gradients over rows of the server's labelled set."""
        if self.scenario.data.transfer is None:
            raise UserError("strategy.init_from=transfer: there is no transfer set; allowed: clients, sketch")
        x, y = self.residents.tensors("transfer")
        if y is None:
            raise UserError("strategy.init_from=transfer: needs labels; set transfer.labelled=true")
        model = self.residents.loaded(self.architecture, self.state_of_model())
        rows = torch.randperm(len(x), generator=self.generator("init rows"))[: self.hyper.init_rows]
        size = self.scenario.config.train.batch_size
        return basis.gradients(model, lambda i: task_loss(model(x[i]), y[i]), rows, size)

    def fuse_setup(self, shares: Shares) -> None:
        """G = Σ g_i / Σ rows_i: the gradient over the joined rows."""
        total: dict[str, Tensor] = {}
        rows = 0.0
        for share in shares:
            sent = share.records["gradient"]
            rows += float(sent["rows"])
            for name in lora.layer_names(sent, "gradient"):
                total[name] = total.get(name, 0) + sent[f"{name}.gradient"].double()
            for name in lora.layer_names(sent, "U"):
                total[name] = total.get(name, 0) + sent[f"{name}.U"].double() @ sent[f"{name}.V"].double()
        self.start_from({name: value / rows for name, value in total.items()})

    fuse_refresh = fuse_setup

    def start_from(self, gradient: Arrays) -> None:
        """Basis and R₀ of the first step."""
        steps = {n: basis.first_step(g, self.hyper.init, self.hyper.rate) for n, g in gradient.items()}
        found, latents, captured = basis.basis_of(steps, self.hyper.rank)
        for name, share in captured.items():
            self.log(f"energy/{name}", share)
        start = self.state.get("R") or self.parts("lora_R")
        self.settle(found, start | latents if self.hyper.r0 == "singular" else start, True)

    def settle(self, found: Arrays, latents: Arrays, sent: bool) -> None:
        """Publish the basis (or only its hash) and R."""
        if sent:
            self.publish("basis", found)
        self.publish("sha", {"sha": basis.basis_sha(found)})
        self.publish_latents(latents)

    def publish_latents(self, latents: Arrays) -> None:
        """Publish R: to all, or each client's block."""
        self.state["R"] = latents
        self.publish_cut("R", latents)

    def fuse(self, shares: Shares) -> None:
        """Mean of R, zero-padded, then the server's step."""
        old: Arrays = self.state["R"]
        if self.hyper.ranks:
            mean = self.mean_over_holders(shares, old)
        else:
            mean, _ = self.mean((share, share.records["R"]) for share in shares)
        beta, rate = self.hyper.server_momentum, self.hyper.server_lr
        new, self.state["momentum"] = step(old, mean, self.state.get("momentum", {}), beta, rate)
        if self.refreshes(self.round):
            self.merge(new)
        else:
            self.publish_latents(new)

    def mean_over_holders(self, shares: Shares, old: Arrays) -> Arrays:
        """Each entry's mean over the clients whose rank reaches it."""

        def padded(sent: Arrays) -> Arrays:
            ones = {name: torch.ones_like(value) for name, value in sent.items()}
            whole = lora.pad({**sent}, old)
            return whole | {f"held {name}": value for name, value in lora.pad(ones, old).items()}

        both, _ = self.mean((share, padded(share.records["R"])) for share in shares)
        held = {name.removeprefix("held "): value for name, value in both.items() if name.startswith("held ")}
        return over_holders({name: value for name, value in both.items() if name in held}, held, old)

    def merge(self, latents: Arrays) -> None:
        """Δ ← Δ + s·B R A, R ← 0, m ← 0 and a new basis, or what the clients need to make it of."""
        now, folded = self.state_of_model(), {}
        layers = lora.adapted(self.residents.model(self.architecture))
        for name, layer in layers.items():
            r = latents[f"{name}.lora_R.weight"]
            left = layer.scale * now[f"{name}.basis_B"].double() @ r.double()
            folded[f"{name}.B"], folded[f"{name}.A"] = left.to(r.dtype), now[f"{name}.basis_A"].to(r.dtype)
        self.publish("merged", folded)
        zero = {name: torch.zeros_like(value) for name, value in latents.items() if not lora.is_head(name)}
        self.state |= {"R": latents | zero, "momentum": {}}
        if self.asks_clients:
            return
        if self.hyper.needs_gradient:
            self.start_from(self.transfer_gradient())
            return
        if self.hyper.init == "weight_svd":
            delta = lora.deltas(self.published("merged"))
            base = basis.base_weights(self.residents.model(self.architecture))
            found, _, _ = basis.basis_of({n: w + delta[f"{n}.delta"] for n, w in base.items()}, self.hyper.rank)
        else:
            found, draw = {}, self.generator("basis")
            for name, layer in layers.items():
                found[f"{name}.basis_B"] = lora.orthonormal(layer.outputs, self.hyper.rank, generator=draw)
                found[f"{name}.basis_A"] = lora.orthonormal(
                    layer.inputs, self.hyper.rank, generator=draw
                ).T.contiguous()
        self.settle(found, self.state["R"], True)

    def state_of_model(self) -> Arrays:
        """Basis, R and head, over W₀ + Δ."""
        merged = lora.deltas(self.published("merged")) if self.hyper.refresh is not None else {}
        return super().state_of_model() | self.state.get("R", {}) | merged
