"""Which audits mean anything for a run, and in words why the others do not."""

from __future__ import annotations

from collections.abc import Sequence

from fedfuse.config import registry
from fedfuse.config.catalogue import AUDITS
from fedfuse.config.schema import Config
from fedfuse.core.attacks import shares_soft_labels, soft_labels
from fedfuse.core.defended import STALE
from fedfuse.core.shares import declared
from fedfuse.core.strategy import FusionStrategy
from fedfuse.errors import UserError, nearest

OF_ANSWERS = ("coop_lira", "distill_lira")  # that ask about candidates among the public rows
OF_CLIENTS = ("client_ldia", "client_lira")  # whose adversary is a client
OF_MODELS = ("fedmia", "fedmia_gradient")
OF_MEMBERS = (*OF_ANSWERS, *OF_MODELS, "client_lira")
FEWEST = 3  # clients, where the others of one make a distribution


def shares_models(strategy: FusionStrategy) -> bool:
    """Whether what a client sends, in the place of what it was sent, is the client's model."""
    scope = strategy.workspace.scope(0, strategy.hyper)
    specs = [spec for name, spec in declared(strategy, "train").items() if name in strategy.topics]
    # neither a code nor a companion is what a client predicts with
    own = any(spec is None or bool(spec(scope).keys() & scope.model.keys()) for spec in specs)
    return own and not registry.entry(strategy.name).client.personal


def _answers_row_by_row(strategy: FusionStrategy) -> bool:
    """Whether clients say of each public row of a round what they make of it."""
    scope = strategy.workspace.scope(0, strategy.hyper)
    layouts = [spec(scope) for spec in declared(strategy, "train").values() if spec is not None]
    sizes = [layout[n][1][0] for layout in layouts for n in soft_labels(layout, scope.model, strategy.classes)]
    return strategy.transfer in ("clients", "both") and scope.dims["subset"] in sizes


def _tells_counts(strategy: FusionStrategy) -> bool:
    scope = strategy.workspace.scope(0, strategy.hyper)
    layouts = [spec(scope) for spec in declared(strategy, "train").values() if spec is not None]
    return any(("int64", (strategy.classes,)) in layout.values() for layout in layouts)


def reason(strategy: FusionStrategy, name: str) -> str:
    """Why an audit means nothing here; empty if it does."""
    scenario, who = strategy.scenario, f"strategy={strategy.name}"
    config = scenario.config
    if name in OF_CLIENTS:
        return _reason_of_clients(strategy, name)
    if strategy.pooled or not declared(strategy, "train"):
        return f"{who} has clients send nothing after training"
    if config.secure.on:
        return "secure=on: the server sees sums, and no client's share"
    if unplayed := _not_replayed(config):
        return unplayed
    soft = shares_soft_labels(strategy, "train")
    if name == "ldia":
        if soft or _tells_counts(strategy) or (shares_models(strategy) and scenario.data.transfer is not None):
            return ""
        rows = "; with transfer.size above 0 it could ask the models that came" if shares_models(strategy) else ""
        return f"ldia reads soft labels, and {who} shares none{rows}"
    if name in OF_MODELS and not shares_models(strategy):
        return f"{name} reads weights or adapters, and {who} shares none that make a client's model"
    if name not in OF_MODELS and not soft:
        return f"{name} reads soft labels, and {who} shares none"
    if name in (*OF_ANSWERS, "pli") and not _answers_row_by_row(strategy):
        return f"{name} reads soft labels of all the public rows, one each, and {who} shares those of others or of some"
    if name in OF_MEMBERS and scenario.data.dataset.next_token:
        return f"{name} asks about labelled examples, and data={config.data.name} predicts next tokens"
    if name in OF_MEMBERS and scenario.cohort_size < FEWEST:
        return f"{name} compares with the other clients, and a round has {scenario.cohort_size}; allowed is 3 or more"
    if name in OF_ANSWERS and config.attack.on:
        return f"{name} asks clients for answers, and with attack={config.attack.name} some lie; allowed is off"
    if name == "pli" and scenario.data.dataset.kind != "image":
        return f"pli paints images, and data={config.data.name} has {scenario.data.dataset.kind}"
    return ""


def _not_replayed(config: Config) -> str:
    """Why a run's messages cannot be had a second time; empty if they can."""
    if config.schedule.name in STALE:
        return (
            f"schedule={config.schedule.name}: shares of several versions meet, which no audit reads; allowed are "
            "sync, deadline, overcommit"
        )
    if config.runtime.name == "flower":
        return "runtime=flower: its messages are not replayed; allowed are inline and ray"
    return ""


def _reason_of_clients(strategy: FusionStrategy, name: str) -> str:
    """As `reason`, of an audit whose adversary is a client."""
    scenario, who = strategy.scenario, f"strategy={strategy.name}"
    config = scenario.config
    if strategy.pooled or not strategy.topics:
        return f"{who} sends clients nothing that others made"
    if scenario.cohort_size < 2:
        return f"{name} asks about the other clients, and a round has {scenario.cohort_size}; allowed is 2 or more"
    if unplayed := _not_replayed(config):
        return unplayed
    models, labels = shares_models(strategy), publishes_soft_labels(strategy)
    if not models and not labels:
        read = "soft labels of public rows or the common model that clients predict with"
        return f"{name} reads {read}, and {who} sends neither"
    if name == "client_ldia" and not labels and scenario.data.transfer is None:
        return f"{name} asks the model that {who} sends about public rows; allowed is transfer.size above 0"
    if labels and config.secure.on:
        return f"{name} compares with the client's own soft labels, which secure=on masks in a replay; allowed is off"
    if name == "client_lira" and scenario.data.dataset.next_token:
        return f"{name} asks about labelled examples, and data={config.data.name} predicts next tokens"
    return ""


def publishes_soft_labels(strategy: FusionStrategy) -> bool:
    """Whether clients are sent soft labels of the public rows that their own stand on."""
    if strategy.transfer not in ("clients", "both") or not shares_soft_labels(strategy, "train"):
        return False
    scope = strategy.workspace.scope(0, strategy.hyper)
    rows = scope.dims["subset"]
    for topic in strategy.topics.values():
        layout = {} if topic.arrays is None or topic.fold is not None else topic.arrays(scope)
        found = soft_labels(layout, scope.model, strategy.classes)
        if any(layout[one][1][0] == rows for one in found):
            return True
    return False


def known(names: Sequence[str], what: str) -> None:
    """Refuse a name that is no audit's, and one that stands twice.

    Raises
    ------
    UserError
    """
    for name in names or ([""] if what.startswith("--") else []):
        if name not in AUDITS:
            raise UserError(f"{what}{name}: {nearest(name, AUDITS)}")
    if len(set(names)) < len(names):
        raise UserError(f"{what}{','.join(names)}: each once")


def check_audits(strategy: FusionStrategy, names: Sequence[str], what: str = "audit=") -> None:
    """Refuse audits that mean nothing for a strategy over its data.

    Raises
    ------
    UserError
        Naming the audit, why, and what is allowed.
    """
    known(names, what)
    for name in names:
        if why := reason(strategy, name):
            allowed = ", ".join(fitting(strategy, list(AUDITS))) or "none"
            raise UserError(f"{what}{name}: {why}; audits of this run: {allowed}")


def fitting(strategy: FusionStrategy, names: Sequence[str]) -> list[str]:
    """Those of some audits that mean something here."""
    return [name for name in names if not reason(strategy, name)]
