"""The client half every algorithm extends: receive, fit, share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fedfuse.config.schema import TrainConfig
from fedfuse.core.attacks import flipped
from fedfuse.core.labels import Pools
from fedfuse.core.scenario import Scenario
from fedfuse.core.shares import Metrics, Records
from fedfuse.core.workspace import Workspace
from fedfuse.errors import UserError
from fedfuse.models.as_built import built_of
from fedfuse.models.in_place import overlay, variable
from fedfuse.models.replicas import shared
from fedfuse.seeding import generator, seed_everything
from fedfuse.train import schedule, training
from fedfuse.train.distil import Effort, plan
from fedfuse.train.entropy import Source
from fedfuse.train.losses import Loss, chosen
from fedfuse.train.objective import followed, least_batch
from fedfuse.train.privacy import PRIVATE, Budget, own_entropy
from fedfuse.train.privacy import train as dp_sgd
from fedfuse.train.scores import scored
from fedfuse.train.second_head import attached
from fedfuse.train.task import task_loss, task_step
from fedfuse.wire.knowledge import Item
from fedfuse.wire.records import Arrays

# A client's attributes that the platform sets. Any other is the strategy's own: `receive` may have left it for `fit`.
FIELDS = frozenset((
    "hyper", "model", "workspace", "client", "state", "round", "phase", "splits", "pooled", "version", "config",
    "lends", "pools", "_purpose", "_losses", "_false_labels", "_private",
))  # fmt: skip


class FusionClient:
    """One client for the length of one message.

    The platform builds it from committed state, calls `receive` with the knowledge that is new to it, then
    `fit` and `share` for a `train` message (or the method named like the phase), or `evaluate`. Everything that
    must survive goes into `state`; for a `personal` client the whole model is kept there by the platform.

    Attributes
    ----------
    hyper
        The strategy's hyper-parameters.
    model : nn.Module
        The architecture's resident model, holding initial weights overlaid with the client's private state; in
        training mode, as a new PyTorch module is.
    state : dict
        Private state: nested dicts of tensors and plain values. Its tensors are on the run's device, as is all that
        `receive` is given.
    client, round, version : int
        This client, the current round, and the newest version of a lesson in this message.
    x, y : Tensor
        Private training examples (n × …) and labels, in index order. Where only a part has labels, these alone.

    Class attributes
    ----------------
    personal : bool
        Whether the whole model is this client's own.
    partly_labelled : bool
        Whether only a part of the training examples has labels, and more are asked for by `reveal` (`labels.*`).
    """

    personal: ClassVar[bool] = False
    partly_labelled: ClassVar[bool] = False

    def __init__(
        self,
        *,
        hyper: Any,
        model: nn.Module,
        workspace: Workspace,
        client: int,
        state: dict[str, Any],
        round: int,
        phase: str,
        splits: tuple[str, ...] = ("personal",),
        pooled: bool = False,
    ) -> None:
        self.hyper, self.model, self.workspace, self.client = hyper, model, workspace, client
        self.state, self.round, self.phase, self.splits, self.pooled = state, round, phase, splits, pooled
        self.version = -1
        self.config: dict[str, Any] = {}  # extra settings the server half sent (Flower strategies' own keys)
        self.lends = False  # whether what is shared is summed at once, so that nobody needs a copy (platform use)
        self._purpose = "receive"
        self._losses: list[Loss] = []  # made for the next training
        self._false_labels: Tensor | None = None  # what a liar trains on (`attack=label_flip`)
        self._private = False  # whether private examples are being used inside the privacy budget

    # -- what an algorithm writes --------------------------------------------------------------------------

    @staticmethod
    def equip(model: nn.Module, hyper: Any, build: Callable[[str], nn.Module]) -> nn.Module:
        """Add what the algorithm needs to every client's model (adapters, a second network); default nothing."""
        return model

    def receive(self, knowledge: Mapping[str, Item]) -> None:
        """Take in what the server sent. Depends on state, knowledge and seed only, never on the round."""
        if "model" in knowledge:
            self.load(knowledge["model"].arrays)

    def fit(self) -> Metrics:
        """Train on private data, and return metrics: numbers by name.

        `num-examples`, where it is not among them, is the number of the client's training examples.
        """
        return self.train()

    def trainings(self) -> list[int | None]:
        """Epochs of each training on private examples that `fit` makes, for the privacy plan; None: `train.epochs`."""
        return [None]

    def share(self) -> Records:
        """Say what was learned: records of arrays. Per-sample rows stand in index order."""
        return {"model": shared(self.model) if self.lends else self.weights()}

    def evaluate(self) -> tuple[Records, Metrics]:
        """Score the model this client would use. Never changes the client."""
        metrics: Metrics = {}
        for split in self.splits:
            examples = self.examples(split)
            if examples is not None:
                x, y = examples
                bytes_held = self.scenario.data.byte_count(split, self.client)
                for name, value in scored(self.predict, x, y, self.classes, bytes_held).items():
                    metrics[f"{split}/{name}"] = value
        return {}, metrics

    def predict(self, x: Tensor) -> Tensor:
        """Logits (B × C) of the model this client would use."""
        return training.predict(self.model, x, self.scenario.config.evaluate.batch_size)

    def embed(self, x: Tensor) -> Tensor:
        """Features (B × feature_dim) of the model this client would use, in evaluation mode."""
        return training.predict(self.model, x, self.scenario.config.evaluate.batch_size, features=True)

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits of a batch, with gradients: a `forward` for `train`."""
        model = cast(Any, self.model)
        z = model.features(x)
        return z, model.head(z)

    # -- what it uses --------------------------------------------------------------------------------------

    @property
    def scenario(self) -> Scenario:
        """The experiment this client lives in."""
        return self.workspace.scenario

    @property
    def classes(self) -> int:
        """Number of classes C."""
        return self.scenario.classes

    @property
    def architecture(self) -> str:
        """Name of this client's architecture."""
        return self.scenario.architectures[self.client]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.scenario.seed

    @property
    def training(self) -> TrainConfig:
        """This client's training settings."""
        return self.scenario.training(self.client)

    @property
    def x(self) -> Tensor:
        """Private training inputs."""
        return self.examples("train")[0]

    @property
    def y(self) -> Tensor:
        """Private training labels."""
        return self.examples("train")[1]

    @functools.cached_property
    def pools(self) -> Pools:
        """Which of the training examples have labels (`fedfuse.core.labels.Pools`)."""
        config = self.scenario.config.labels
        return Pools(config, self.seed, self.client, self.scenario.examples(self.client), self.state)

    @property
    def unlabelled(self) -> Tensor:
        """Inputs of the training examples without a label, in index order."""
        x: Tensor = self.workspace.tensors(self.client, "train")[0]
        return x[self.pools.unlabelled.to(x.device)]

    @property
    def allowance(self) -> int:
        """How many labels may be asked for now: what `labels.budget` allows and the pool still has."""
        return self.pools.allowance(self.round)

    def reveal(self, rows: Tensor) -> None:
        """Ask for the labels of rows of `unlabelled`; from then on they are in `x` and `y`.

        Raises
        ------
        UserError
            For a row that is not there or named twice, or more of them than the `allowance`.
        """
        self.pools.reveal(rows, self.round)

    @property
    def transfer(self) -> Tensor:
        """Inputs of the transfer set D_t."""
        return self.workspace.texts.read(self.architecture, "transfer")[0]

    @property
    def transfer_labels(self) -> Tensor | None:
        """Labels of the transfer set, or None where it is unlabelled."""
        return self.workspace.tensors("transfer")[1]

    def examples(self, split: str) -> Any:
        """Inputs and labels of "train", "validation", "personal" or "global"; None where there is no such set.

        Raises
        ------
        UserError
            If test examples are asked for outside of `evaluate`.
        """
        if split in ("personal", "global") and self._purpose != "evaluate":
            raise UserError(f"examples({split!r}) outside of evaluate(): test examples are for scores alone; allowed "
                            f"here are 'train' and 'validation'")  # fmt: skip
        if split == "global":
            return self.workspace.texts.read(self.architecture, "test")
        if split == "train" and self.scenario.config.privacy.by_example and not self._private:
            raise UserError(
                "privacy: this strategy looks at private examples outside of training, where DP-SGD does not cover "
                "them; allowed are those that only train on them"
            )
        if split == "train" and self.pooled:
            return self.workspace.texts.read(self.architecture, "pooled")
        found = self.workspace.texts.read(self.architecture, self.client, split)
        if split == "train" and self.scenario.config.attack.name == "label_flip" and self.client in self.scenario.liars:
            if self._false_labels is None:
                self._false_labels = flipped(found[1], self.classes)
            found = (found[0], self._false_labels)
        if split == "train" and self.partly_labelled:
            rows = self.pools.labelled.to(found[0].device)
            found = (found[0][rows], found[1][rows])
        return found

    def generator(self, *purpose: object) -> torch.Generator:
        """A generator seeded by (run seed, purpose, client, round or lesson version)."""
        return generator(self.seed, *purpose, self.client, self._moment)

    @property
    def _moment(self) -> int:
        # what is received depends on the lesson's version, not on the round that happened to bring it
        return self.version if self._purpose == "receive" else self.round

    def begin(self, purpose: str) -> None:
        """Enter a verb (platform use): the global generators restart, so that nothing drawn before matters."""
        self._purpose, self._losses = purpose, []
        seed_everything(self.seed, purpose, self.client, self._moment)

    @property
    def keeps_all(self) -> bool:
        """Whether state and model hold all that `receive` left, so that they can stand in for it (platform use)."""
        resident = self.workspace.model(self.architecture)
        return vars(self).keys() <= FIELDS and self.model is resident and built_of(resident).untouched()

    def load(self, arrays: Arrays, strict: bool = True) -> None:
        """Overwrite the model's parameters and buffers in place.

        Raises
        ------
        RuntimeError
            If `arrays` has a name or a shape that the model does not have; if strict, also if it lacks one.
        """
        overlay(self.model, arrays, strict)

    def weights(self) -> Arrays:
        """A copy of the model's parameters and buffers by name, without those of a frozen base."""
        return {name: value.detach().clone() for name, value in variable(self.model).items()}

    def subset(self, size: int | None, version: int | None = None) -> Tensor:
        """Indices of the rows of the transfer set that a round uses, in ascending order.

        These are all rows, or `size` of them, drawn by the round's number alike at all clients. A lesson stands on the
        rows of its own version: pass `version=item.version` when taking one in.
        """
        return transfer_rows(self.scenario, size, self.round if version is None else version)

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of the task: mean cross-entropy of classes, or of next tokens."""
        return task_loss(logits, labels)

    def loss(self, default: str = "kl", **options: Any) -> Loss:
        """The next training's distillation objective: `loss=<name>` if the user chose one, else the paper's own.

        What a stateful one learns (TAID's τ) is kept in `state["losses"]`.
        """
        self._losses.append(chosen(self.scenario.config.loss, default, **options))
        return self._losses[-1]

    def train(
        self,
        loss: Callable[[Any, Any, Tensor], Tensor] | None = None,
        x: Tensor | None = None,
        y: Tensor | None = None,
        *,
        purpose: str | None = None,
        **options: Any,
    ) -> Metrics:
        """Minimise a loss by mini-batches; rows are named by index, never by batch order.

        Parameters
        ----------
        loss : callable, optional
            `loss(logits, labels, rows) -> scalar`; default cross-entropy.
        x, y : Tensor, optional
            Examples and labels; default the private training set.
        purpose : str, optional
            Names the random stream that orders the batches; default the verb's name.
        **options
            Passed to `fedfuse.train.training.train`: epochs, batch_size, lr, params, after_backward, after_step,
            forward.

        Returns
        -------
        dict
            `num-examples`, `steps` and `loss`, the mean over steps. Where differential privacy hides examples, what
            was spent of the budget stands in place of the loss.

        Raises
        ------
        UserError
            If privacy or a setting of `train.*` or `data.packing` cannot be followed with this loss.
        """
        own = x is None
        private = own and self.scenario.config.privacy.by_example
        moment = (self.seed, purpose or self._purpose, self.client, self._moment)
        keep = own and self.training.optimizer_state == "keep" and self.personal
        if keep:
            options["optimizer"] = self._kept_optimizer(options)
        if private:
            result = self._train_privately(loss, moment, options)
            if keep:
                self._keep_optimizer(options["optimizer"])
            return result
        inputs, labels = self.examples("train") if x is None else (x, y)
        losses, self._losses = self._losses, []
        span = self.scenario.span(self._moment)
        config = options.pop("config", self.training)
        if own or (not self.scenario.config.privacy.by_example and x is self.x):
            options = {**self._steps_of(config, options, span, losses), "trim": loss is None, **options}
            options["pack"] = self._packs(options["trim"])
        with followed(losses, self.state, self._purpose, span, options.pop("after_step", None)) as more:
            result = training.train(
                self.model, inputs, labels, loss or task_step, config, moment, **{**more, **options}
            )
        if keep:
            self._keep_optimizer(options["optimizer"])
        return {"num-examples": len(inputs), "steps": result["steps"], "loss": result["loss"]}

    def _steps_of(
        self, config: TrainConfig, options: dict[str, Any], span: tuple[float, float], losses: list[Loss]
    ) -> dict[str, Any]:
        """What `train.*` says of training on private examples, beside the optimiser's own settings."""
        if config.micro_batch is not None and any(one.min_batch > 1 for one in losses):
            raise UserError(
                f"train.micro_batch={config.micro_batch}: loss={self.scenario.config.loss.name} compares the examples "
                f"of a batch; allowed: null"
            )
        return {
            "max_steps": config.max_steps if options.get("epochs") is None else None,
            "rate": schedule.over(config, span),
            "clip": config.clip,
            "micro_batch": config.micro_batch,
        }

    def _packs(self, of_places: bool) -> bool:
        """Whether several texts stand in one row (`data.packing`), of which no loss by rows can be asked."""
        asked = self.scenario.config.data.packing
        if asked and not of_places:
            raise UserError(
                "data.packing=true: this strategy trains on private examples with a loss of its own, by rows; "
                "allowed: false"
            )
        return asked

    def distil(
        self,
        loss: Callable[[Any, Any, Tensor], Tensor],
        x: Tensor,
        y: Tensor | None,
        *,
        epochs: int | None,
        batch_size: int,
        lr: float | None = None,
        optimizer: str | None = None,
        steps: int = 0,
        purpose: str | None = None,
    ) -> Metrics:
        """Train on soft labels of rows of the transfer set; the user's `distil.*` goes before what is said here.

        Parameters
        ----------
        loss, x, y, purpose
            As of `train`.
        epochs, batch_size, lr, optimizer, steps
            The strategy's own effort (`fedfuse.train.distil.Effort`).
        """
        own = Effort(epochs, batch_size, lr, optimizer, steps)
        options = plan(self.scenario.config.distil, own, self.training, len(x), least_batch(self._losses))
        with attached(self._losses, self.model, self.classes, self.seed, purpose or self._purpose) as more:
            return self.train(loss, x, y, purpose=purpose, **options, **more)

    @contextlib.contextmanager
    def inside_budget(self, moment: tuple[object, ...]) -> Iterator[tuple[Budget, Source, Source]]:
        """Let private examples be used for a while.

        Yields
        ------
        budget, sampling, noising
            The privacy budget, and the sources that samples and noise are drawn from: generators seeded by `moment` in
            a simulation, the site's own entropy in a deployment.
        """
        config, ledger = self.scenario.config, self.workspace.ledger
        who, examples = f"client {self.client}", self.scenario.examples(self.client)
        budget = Budget(config.privacy, self.training, config.rounds, examples, self.state, ledger, who)
        purposes = ("private sample", "private noise")
        sampling, noising = (own_entropy() if ledger else generator(*moment, purpose) for purpose in purposes)
        self._private = True
        try:
            yield budget, sampling, noising
        finally:
            self._private = False

    def _train_privately(self, loss: Any, moment: tuple[object, ...], options: dict[str, Any]) -> Metrics:
        """DP-SGD on the task's loss. Its value is not returned: that would be a release that no noise covers."""
        if loss is not None or (unknown := set(options) - PRIVATE):
            what = "a loss of its own" if loss is not None else f"{sorted(unknown)[0]}= of its own"
            raise UserError(
                f"privacy: this strategy trains on private examples with {what}; only the task's is covered"
            )
        epochs, size = options.pop("epochs", None), options.pop("batch_size", None)
        rate_of = schedule.over(self.training, self.scenario.span(self._moment))
        with self.inside_budget(moment) as (budget, sampling, noising):
            rate, steps = budget.steps(epochs, size)
            noise = budget.noise([budget.steps(planned, size) for planned in self.trainings()])
            budget.spend(noise, rate, steps)
            train, privacy = self.training, self.scenario.config.privacy
            before = self._unnoised()
            dp_sgd(
                self.model, self.x, self.y, train, privacy, (noise, rate, steps), sampling, noising,
                seed_parts=moment, rate_of=rate_of, **options,
            )  # fmt: skip
            if moved := [name for name, value in self._unnoised().items() if not torch.equal(value, before[name])]:
                raise UserError(
                    f"privacy with model={self.architecture}: {moved[0]} changes with the examples that pass, which no "
                    f"noise covers; allowed are models whose buffers training leaves as they are"
                )
            if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
                raise UserError(f"client {self.client}: what it trained privately is not finite, and stays with it")
            return {"num-examples": len(self.x), "steps": steps, **budget.metrics()}

    def _unnoised(self) -> Arrays:
        """A copy of what the model shares beside its parameters: buffers, such as running means."""
        trained = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: value.clone() for name, value in variable(self.model).items() if name not in trained}

    def _keep_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        slots = optimizer.state_dict()["state"]
        self.state["optimizer"] = {
            str(i): {k: torch.as_tensor(v).clone() for k, v in s.items() if v is not None} for i, s in slots.items()
        }

    def _kept_optimizer(self, options: dict[str, Any]) -> torch.optim.Optimizer:
        params = options.get("params") or [p for p in self.model.parameters() if p.requires_grad]
        optimizer = training.optimizer(params, self.training)
        if "optimizer" in self.state:
            whole = optimizer.state_dict()
            try:
                whole["state"] = {int(i): dict(slots) for i, slots in self.state["optimizer"].items()}
            except (AttributeError, TypeError, ValueError) as error:
                raise UserError(
                    f"{type(self).__name__}.state['optimizer']: train.optimizer_state=keep keeps the optimiser's there"
                ) from error
            optimizer.load_state_dict(whole)
        return optimizer


def transfer_rows(scenario: Scenario, size: int | None, version: int) -> Tensor:
    """Rows of the transfer set that version `version` of a lesson stands on, in ascending order.

    The user's `transfer.subset` goes before the strategy's own size; `transfer.redraw=false` keeps one subset.
    """
    data, config = scenario.data, scenario.config.transfer
    total = 0 if data.transfer is None else len(data.transfer)
    size = scenario.rows_of(size)
    if size == total:
        return torch.arange(total)
    draw = generator(scenario.seed, "transfer subset", version if config.redraw else 0)
    return torch.randperm(total, generator=draw)[:size].sort().values
