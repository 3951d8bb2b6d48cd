"""`loss=<name>` in every strategy that distils: all eleven run, each teaches something else, TAID goes its way."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from fedfuse.config import registry
from fedfuse.config.schema import LossConfig
from fedfuse.core.build import build_strategy
from fedfuse.core.loop import Federation
from fedfuse.core.node import place
from fedfuse.engines.inline import InlineGrid
from fedfuse.errors import UserError
from fedfuse.train.losses import names
from fedfuse.wire.client_store import ClientStore
from fedfuse.wire.records import sha_arrays
from tests.federations import TINY, federation, play, scenario_of
from tests.halves import final_states

SMALL = ("clients=2", "data.limit=60", "data.test_limit=20", "transfer.size=12", "transfer.labelled=true")
# what makes two barely trained clients teach each other at all: more rows a round, one cluster, no selection
MORE = {
    "scarlet": ("strategy.subset=12",),
    "comet": ("strategy.clusters=1",),
    "selectivefd": ("strategy.client_quantile=null", "strategy.server_threshold=null"),
    "fedet": ("strategy.lam=5", "strategy.distill_epochs=1", "partition=shards", "train.epochs=4"),
    "fedgen": ("strategy.generator_steps=3",),
    "fedmkt": ("strategy.alpha=0",),
}
DISTIL = (
    "cfd", "comet", "dsfl", "fd", "fedd2s", "feddf", "fedet", "fedgen", "fedgkt", "fedhkd", "fedkd", "fedmd", "fedmkt",
    "fedov", "fml", "knfu", "ktpfl", "scarlet", "selectivefd",
)  # fmt: skip


def played(name: str) -> list[str]:
    """All at a client, at the server and between two networks; elsewhere a third, so that each is in six files."""
    return [
        n for i, n in enumerate(names()) if name in ("fedmd", "feddf", "fedkd") or (i + DISTIL.index(name)) % 3 == 0
    ]


@pytest.mark.parametrize("name", DISTIL)
def test_all_losses_run_and_each_is_another(name: str, tmp_path: Path) -> None:
    _, scenario = scenario_of((*TINY, *SMALL, *MORE.get(name, ()), f"strategy={name}"))
    entry, found = registry.entry(name), set()
    for chosen in played(name):
        options = {"heads": 1} if chosen == "dhkd" and not entry.server.whole else {}
        config = dataclasses.replace(scenario.config, loss=LossConfig(name=chosen, options=options))
        other = dataclasses.replace(scenario, config=config)
        store = ClientStore(tmp_path / chosen)
        grid = InlineGrid(place(entry, other, store))
        federation = Federation(build_strategy(entry, other), grid, 2)
        federation.run()
        strategy = federation.strategy
        assert strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}, (chosen, strategy.inbox.left_out)
        assert math.isfinite(federation.headline["loss/train"]), chosen
        models = [store.load(c, strategy.outbox.tags[c]) for c in range(2)]
        kept = [model.get("model", model.get("own", {})) for model in models]
        kept += [arrays for _, arrays in strategy.server_models().values()]
        kept += [item.arrays for item in strategy.board.items.values()]
        assert all(bool(torch.isfinite(v).all()) for arrays in kept for v in arrays.values() if v.is_floating_point())
        found.add("".join(sha_arrays(arrays) for arrays in kept))
    # cross-entropy with soft labels has kl's gradient and may have its bits; so has ttm on cfd's labels: one-hot.
    # In one vocabulary xtoken is kl to the bit
    assert len(found) >= len(played(name)) - (3 if name == "cfd" else 2)


def test_every_strategy_that_asks_for_a_loss_is_in_the_list() -> None:
    folder = Path(__file__).parents[2] / "strategies"
    asks = re.compile(r"\b(self|half)\.loss\(")
    asking = {path.stem for path in folder.glob("*.py") if asks.search(path.read_text(encoding="utf-8"))}
    assert asking == set(DISTIL)


@pytest.mark.parametrize("name", ["dsfl", "feddf", "fedmd", "knfu"])
def test_labels_are_asked_for_before_anything_runs(name: str) -> None:
    with pytest.raises(UserError, match=rf"loss=dkd needs labels, and strategy={name}.*transfer.labelled=true"):
        play(name, "loss=dkd")


def test_an_option_without_a_loss_is_refused() -> None:
    with pytest.raises(UserError, match=r"loss\.temperature.*goes with loss=<name>"):
        play("dsfl", "loss.temperature=2")


def models(name: str, *overrides: str) -> list[dict[str, torch.Tensor]]:
    """What clients and server end with, without what a loss remembers."""
    strategy, states = final_states(name, *overrides)
    kept = [state.get("model", state.get("own", {})) for state in states]
    return [*kept, *(arrays for _, arrays in strategy.server_models().values())]


@pytest.mark.parametrize("name", ["dsfl", "knfu", "fd", "fml"])
def test_taid_at_its_far_end_is_kl(name: str) -> None:
    ends = models(name, "loss=taid", "+loss.options.tau_start=1")
    for one, other in zip(ends, models(name, "loss=kl"), strict=True):
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-6, atol=1e-7)


def test_taid_at_its_near_end_teaches_nothing() -> None:
    sgd = "distil.optimizer=sgd"  # Adam makes whole steps of what rounding leaves of no gradient
    ends = models("dsfl", sgd, "loss=taid", "+loss.options.tau_start=0", "+loss.options.tau_end=0")
    for one, other in zip(ends, models("dsfl", "strategy.distill_epochs=0"), strict=True):
        for key, value in other.items():
            torch.testing.assert_close(one[key], value, rtol=1e-5, atol=1e-6)


def test_taid_rises_with_the_run_at_both_halves() -> None:
    """After round t clients have distilled lesson t − 1 and the server t: τ is on the line, or above."""
    seen = []

    class Watch:
        def start(self, _): ...
        def end(self, _): ...
        def round(self, federation):
            seen.append(float(federation.strategy.state["losses"]["distil 0"]["tau"]))

    with federation("dsfl", "loss=taid", "rounds=4", "strategy.distill_epochs=1") as (built, directory):
        built.callbacks.append(Watch())
        built.run()
        strategy = built.strategy
        mine = [directory.clients.load(c, strategy.outbox.tags[c])["losses"]["receive 0"] for c in range(3)]
    assert seen[0] == 0.4  # one batch a round: the first step only records
    assert all(tau >= 0.4 + 0.6 * t / 4 for t, tau in enumerate(seen[1:], start=2))
    assert seen == sorted(seen)
    assert seen[-1] == 1
    for state in mine:
        assert 0.4 + 0.6 * 3 / 4 <= float(state["tau"]) < 1
        assert float(state["started"]) == 1


def test_two_objectives_of_one_training_learn_apart() -> None:
    _, states = final_states("fml", "loss=taid", "+loss.options.alpha=0.1", "rounds=1", "train.epochs=3")
    own, meme = (states[0]["losses"][f"train {i}"] for i in range(2))
    assert float(own["previous"]) != float(meme["previous"])


@pytest.mark.parametrize("name", ["dsfl", "fedgkt"])
def test_what_taid_learnt_survives_any_grid_and_a_resume(name: str, tmp_path: Path) -> None:
    from tests.contract.test_matrix import Crash

    whole = play(name, "loss=taid")
    assert play(name, "loss=taid", grid="serial").digest == whole.digest
    assert play(name, "loss=taid", "evaluate.every=2", reverse=True).digest == whole.digest
    where = tmp_path / "run"
    with (
        federation(name, "loss=taid", path=where, callbacks=(Crash(1),)) as (built, _),
        pytest.raises(KeyboardInterrupt),
    ):
        built.run()
    assert play(name, "loss=taid", path=where).digest == whole.digest
