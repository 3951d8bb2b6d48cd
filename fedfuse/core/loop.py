"""The round loop: drives any fusion strategy over any Flower grid; everything else is a callback."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedfuse.core.scenario import Scenario
from fedfuse.core.shares import STALE
from fedfuse.core.strategy import FusionStrategy
from fedfuse.errors import UserError
from fedfuse.train import privacy
from fedfuse.train.losses import chosen
from fedfuse.train.scores import scored
from fedfuse.wire.records import digest_of

Row = tuple[int, str, int, str, str, float]  # round, scope, client, split, metric, value


class Callback:
    """Something that happens beside the loop. Callbacks run in the order they are given."""

    def start(self, federation: Federation) -> None:
        """Before the first round (or the first after a resume)."""

    def round(self, federation: Federation) -> None:
        """After a round's fuse."""

    def end(self, federation: Federation) -> None:
        """After the last round."""


class Federation:
    """One run of one strategy.

    Parameters
    ----------
    strategy : FusionStrategy
    grid : Grid
        Any Flower grid; replies may come in any order from one that is not ours.
    rounds : int
    callbacks : sequence of Callback

    Attributes
    ----------
    done : int
        The last round that was fused.
    headline : dict of str to float
        The newest evaluation's figures, `accuracy/global` and the like.
    rows, timing : list
        This round's rows, taken away by whoever commits them.
    stop : str
        Why the loop shall end early; empty if it shall not.
    """

    def __init__(self, strategy: FusionStrategy, grid: Grid, rounds: int, callbacks: Sequence[Callback] = ()) -> None:
        self.strategy, self.grid, self.rounds, self.callbacks = strategy, grid, rounds, list(callbacks)
        self.done = 0
        self.evaluated = -1
        self.headline: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.rows: list[Row] = []
        self.timing: list[tuple[int, str, str, float]] = []
        self.stop = ""
        self.digest: str | None = None
        self.digest_missing: list[int] = []
        self.set_up = False

    @property
    def scenario(self) -> Scenario:
        """The experiment."""
        return self.strategy.scenario

    def run(self) -> None:
        """Play all rounds that are left.

        Raises
        ------
        WorldError
            If in some phase no client succeeded.
        """
        strategy = self.strategy
        for callback in self.callbacks:
            callback.start(self)
        if not self.set_up:
            strategy.ensure_begun()
            for phase in strategy.setup:
                self._phase(0, phase)
            self.set_up = True
            if strategy.setup:
                self._collect(0)
                self._call("round")
        while self.done < self.rounds and not self.stop:
            round = self.done + 1
            for phase in strategy.phases(round):
                self._phase(round, phase)
            self.done = round
            self._collect(round)
            self._call("round")
        for callback in self.callbacks:
            callback.end(self)

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self)

    def _phase(self, round: int, phase: str) -> None:
        """One phase: messages out, replies in, fused."""
        strategy, started = self.strategy, time.perf_counter()
        strategy.round, strategy.phase = round, phase
        messages = strategy.configure_train(round, ArrayRecord(), ConfigRecord(), self.grid)
        strategy.aggregate_train(round, self.exchange(messages))
        self._time(round, phase, started)

    def _time(self, round: int, what: str, started: float) -> None:
        """Note what a phase took here, and on the way if the grid is a network."""
        self.timing.append((round, "server", what, time.perf_counter() - started))
        on_the_way: list[tuple[str, str, float]] = getattr(self.grid, "timed", [])
        self.timing += [(round, *row) for row in on_the_way]
        on_the_way.clear()

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Send messages; a node that cannot follow gets the whole values and is asked again, in its turn."""
        strategy = self.strategy
        replies = self.grid.send_and_receive(messages)
        if isinstance(replies, Sequence):  # a grid of Flower's, in no order; ours stream in client order
            replies = sorted(replies, key=strategy.sender)
        for reply in replies:
            if reply.has_error() and reply.error.code == STALE:
                client = strategy.sender(reply)
                reply = next(iter(self.grid.send_and_receive([strategy.message_again(client)])), reply)
            yield reply

    def _collect(self, round: int) -> None:
        strategy = self.strategy
        self.rows += [(round, *row) for row in strategy.logged]
        self.timing += [(round, *row) for row in strategy.timed]
        weight = sum(n for n, _ in strategy.losses)
        loss = sum(n * value for n, value in strategy.losses) / weight if weight else math.nan
        if strategy.phase not in strategy.setup:
            self.headline = {**self.headline, "loss/train": loss}
            self.rows.append((round, "server", -1, "train", "loss/train", loss))
        strategy.logged, strategy.timed, strategy.losses = [], [], []

    # -- evaluation ----------------------------------------------------------------------------------------

    def evaluate(self, final: bool = False) -> dict[str, float]:
        """Score every client on its personal test set, and the global test set; commits nothing.

        Returns
        -------
        dict
            accuracy/personal (mean over clients), accuracy/personal_worst10 (mean of the lowest ⌈N/10⌉),
            accuracy/global (macro over classes), accuracy/global_plain; NaN where there is no such set.
        """
        strategy, started, round = self.strategy, time.perf_counter(), self.done
        models, test = strategy.server_models(), self.scenario.data.dataset.test
        splits = ["personal"]
        if test is not None and not models:
            splits.append("global")
        if self.scenario.config.stop.patience is not None or self.scenario.config.evaluate.validation:
            splits.append("validation")
        strategy.splits = tuple(splits)
        extra = ConfigRecord({"final": True} if final else {})
        messages = strategy.configure_evaluate(round, ArrayRecord(), extra, self.grid)
        strategy.aggregate_evaluate(round, self.exchange(messages))
        for client, metrics in sorted(strategy.scored.items()):
            for key, value in metrics.items():
                split, _, metric = key.partition("/")
                self.rows.append((round, "client", client, split, metric, float(value)))
        headline = self._clients_headline()
        if test is not None and models:
            headline |= self._server_headline(round, models)
        for key, value in headline.items():
            split = key.split("/")[1].split("_")[0]
            self.rows.append((round, "server", -1, split, key, value))
        self.rows += [(round, *row) for row in strategy.logged]
        strategy.logged, strategy.timed = [], []
        self.headline = {"loss/train": self.headline.get("loss/train", math.nan), **headline}
        self.history.append({"round": float(round), **headline})
        self.evaluated = round
        self._time(round, "evaluate", started)
        if final:
            self._seal()
        return headline

    def _clients_headline(self) -> dict[str, float]:
        def values(key: str) -> list[float]:
            found = (m[key] for m in self.strategy.scored.values() if key in m)
            return [float(v) for v in found if v == v]

        personal = sorted(values("personal/accuracy"))
        worst = personal[: math.ceil(len(personal) / 10)]
        out = {
            "accuracy/global": _mean(values("global/accuracy_macro")),
            "accuracy/global_plain": _mean(values("global/accuracy")),
            "accuracy/personal": _mean(personal),
            "accuracy/personal_worst10": _mean(worst),
        }
        if validation := values("validation/accuracy"):
            out["accuracy/validation"] = _mean(validation)
        return out

    def _server_headline(self, round: int, models: dict[str, Any]) -> dict[str, float]:
        """Server models on the global test set, weighted by the clients of their architecture."""
        residents, names = self.strategy.residents, self.scenario.architectures
        x, y = residents.tensors("test")
        total: dict[str, float] = {}
        weights = 0
        for name, (architecture, arrays) in models.items():
            model = residents.loaded(architecture, arrays)
            found = scored(partial(self._predict, model), x, y, self.scenario.classes)
            count = sum(a == architecture for a in names) if len(models) > 1 else len(names)
            weights += count
            for key in ("accuracy_macro", "accuracy"):
                total[key] = total.get(key, 0.0) + count * found[key]
            if "perplexity" in found:
                for key in ("loss", "perplexity"):
                    self.rows.append((round, "server", -1, "global", f"{key}/global", found[key]))
            if len(models) > 1:
                self.rows.append((round, "server", -1, "global", f"accuracy/global/{name}", found["accuracy_macro"]))
        return {
            "accuracy/global": total["accuracy_macro"] / weights,
            "accuracy/global_plain": total["accuracy"] / weights,
        }

    def _predict(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.strategy.predict(model, x, self.scenario.config.evaluate.batch_size)

    def _seal(self) -> None:
        """The digest: the server's sha and every client's; none if somebody did not answer."""
        shas = self.strategy.client_shas
        self.digest_missing = [c for c in range(self.scenario.clients) if not shas.get(c)]
        if not self.digest_missing:
            clients = [shas[c] for c in range(self.scenario.clients)]
            self.digest = digest_of(self.strategy.server_sha(), clients)


class Evaluation(Callback):
    """Scores every `every` rounds, and always the last."""

    def __init__(self, every: int) -> None:
        self.every = every

    def round(self, federation: Federation) -> None:
        """Evaluate if it is time."""
        last = federation.done == federation.rounds
        if federation.done and not last and federation.done % self.every == 0:
            federation.evaluate()
        elif last:
            federation.evaluate(final=True)


class EarlyStop(Callback):
    """Ends a run when the clients' validation score has not improved for `patience` evaluations."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def round(self, federation: Federation) -> None:
        """Look at the validation scores so far; the round that stops is evaluated as the last."""
        scored = [
            (h["accuracy/validation"], -i) for i, h in enumerate(federation.history) if "accuracy/validation" in h
        ]
        if not scored or federation.done == federation.rounds:
            return
        best = -max(scored)[1]
        if len(scored) - 1 - best >= self.patience:
            federation.stop = f"no better validation accuracy for {self.patience} evaluations"
            federation.rows = [r for r in federation.rows if not (r[0] == federation.done and r[3] != "train")]
            federation.history.pop()
            federation.evaluate(final=True)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def check_fit(strategy: FusionStrategy, personal: bool) -> None:
    """Refuse, in words, a strategy that cannot run on this experiment.

    Raises
    ------
    UserError
        Naming what does not fit and what would.
    """
    scenario = strategy.scenario
    pool = sorted(set(scenario.architectures))
    if not strategy.heterogeneous and len(pool) > 1:
        raise UserError(
            f"strategy={strategy.name} averages weights and needs one architecture, model.pool has {', '.join(pool)}; "
            f"use model=<name>, or a strategy that exchanges knowledge instead of weights"
        )
    if strategy.transfer != "none" and scenario.data.transfer is None:
        raise UserError(
            f"strategy={strategy.name} needs a transfer set and data={scenario.config.data.name} brings none; "
            f"name one: transfer.source=noise or a data set"
        )
    if strategy.transfer != "none" and scenario.data.transfer is not None:
        rows = len(scenario.data.transfer)
        asked = {"transfer.subset": scenario.config.transfer.subset}
        asked["strategy.subset"] = getattr(strategy.hyper, "subset", None)
        for key, size in asked.items():
            if size is not None and size > rows:
                raise UserError(f"{key}={size}: the transfer set has {rows} examples; allowed is at most that")
    if scenario.config.train.optimizer_state == "keep" and not personal:
        raise UserError(
            f"train.optimizer_state=keep: strategy={strategy.name} keeps no private model; allowed there: fresh"
        )
    if scenario.config.privacy.on:
        _check_private(strategy, pool)
    objective = chosen(scenario.config.loss)  # refuses one that cannot be built
    if objective.needs_labels and strategy.transfer != "none" and not scenario.config.transfer.labelled:
        raise UserError(
            f"loss={scenario.config.loss.name} needs labels, and strategy={strategy.name} distils on an unlabelled "
            f"transfer set: set transfer.labelled=true, or choose another loss"
        )
    for name in pool:  # refuses one that cannot be built, instead of leaving out its clients
        model = strategy.residents.model(name)
        if strategy.needs_features and not hasattr(model, "features"):
            raise UserError(
                f"strategy={strategy.name} needs models with features(x), head(z), feature_dim; {name} has none"
            )
    if strategy.same_features:
        sizes = {name: int(strategy.residents.model(name).feature_dim) for name in pool}  # type: ignore[arg-type]
        if len(set(sizes.values())) > 1:
            told = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise UserError(
                f"strategy={strategy.name} compares features across clients, which must be of one size; {told}: "
                f"set model.feature_dim={min(sizes.values())}"
            )


def _check_private(strategy: FusionStrategy, pool: list[str]) -> None:
    if strategy.pooled:
        raise UserError(f"privacy: strategy={strategy.name} joins all examples at one client; there N is nobody's own")
    if strategy.discloses:
        what = ", ".join(strategy.discloses)
        raise UserError(f"privacy: strategy={strategy.name} lets {what} of private examples leave the clients")
    scenario, delta = strategy.scenario, strategy.scenario.config.privacy.delta
    most = max(range(scenario.clients), key=scenario.examples)
    if delta is not None and delta * scenario.examples(most) > 1:
        raise UserError(f"privacy.delta={delta}: client {most} has {scenario.examples(most)} examples; allowed is 1/N")
    for name in pool:
        privacy.check(strategy.residents.model(name), name)
