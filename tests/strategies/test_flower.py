"""Flower's strategies under our loop: the same arrays as under Flower's own loop, nothing lost between rounds."""

from __future__ import annotations

import tempfile
from pathlib import Path

import flwr.serverapp.strategy as flower
import pytest
import torch
from flwr.app import ConfigRecord

from fedfuse.config import registry
from fedfuse.core.build import build_strategy
from fedfuse.core.client import FusionClient
from fedfuse.core.node import place
from fedfuse.engines.inline import InlineGrid
from fedfuse.errors import UserError
from fedfuse.wire.client_store import ClientStore
from fedfuse.wire.records import record, tensors
from tests.federations import TINY, federation, intercept, play, scenario_of
from tests.halves import server, wake


def under_flowers_loop(name: str, rule: flower.Strategy) -> dict[str, torch.Tensor]:
    """The arrays that Flower's `start` ends with on our grid."""
    _, scenario = scenario_of((*TINY, f"strategy={name}"))
    entry = registry.entry(name)
    with tempfile.TemporaryDirectory() as folder:
        grid = InlineGrid(place(entry, scenario, ClientStore(Path(folder))))
        initial = grid.node.workspace.initial(scenario.architectures[0])
        return tensors(rule.start(grid=grid, initial_arrays=record(initial), num_rounds=2).arrays)


def test_fedavg_ends_with_flowers_bits() -> None:
    theirs = under_flowers_loop("flwr_fedavg", flower.FedAvg())
    ours = play("flwr_fedavg").strategy.model
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("flwr_fedprox", flower.FedProx(proximal_mu=0.01)),
        ("flwr_fedavgm", flower.FedAvgM(server_momentum=0.9)),
        ("flwr_fedadam", flower.FedAdam()),
        ("flwr_fedmedian", flower.FedMedian()),
        ("flwr_krum", flower.Krum()),
        ("flwr_qfedavg", flower.QFedAvg(client_learning_rate=0.05, train_loss_key="train_loss")),
    ],
)
def test_every_kind_of_rule_ends_where_flowers_loop_does(name: str, rule: flower.Strategy) -> None:
    theirs, ours = under_flowers_loop(name, rule), play(name).strategy.model
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key].to(value.dtype), rtol=1e-5, atol=1e-6)


def test_the_proximal_term_reaches_the_clients() -> None:
    assert (
        play("flwr_fedprox", "strategy.proximal_mu=0")
        .strategy.model["head.weight"]
        .equal(play("flwr_fedavg").strategy.model["head.weight"])
    )
    pulled = play("flwr_fedprox", "strategy.proximal_mu=1", "rounds=1").strategy
    free = play("flwr_fedavg", "rounds=1").strategy
    start = pulled.workspace.initial("mlp_small")
    distance = [sum(float((s.model[k] - v).square().sum()) for k, v in start.items()) for s in (pulled, free)]
    assert distance[0] < distance[1]


@pytest.mark.parametrize(
    ("name", "override", "least"),
    [
        ("flwr_fedavg", "strategy.min_train_nodes=4", 4),
        ("flwr_krum", "strategy.num_malicious_nodes=1", 5),
        ("flwr_multikrum", "strategy.num_nodes_to_select=4", 4),
        ("flwr_multikrum", "strategy.num_malicious_nodes=1", 5),
        ("flwr_multikrum", "strategy.num_malicious_nodes=1 strategy.num_nodes_to_select=5", 6),
        ("flwr_bulyan", "strategy.num_malicious_nodes=1", 7),
        ("flwr_fedavg", "participation=0.3", 2),
    ],
)
def test_a_cohort_below_the_minimum_is_refused(name: str, override: str, least: int) -> None:
    _, scenario = scenario_of((*TINY, f"strategy={name}", *override.split()))
    with pytest.raises(UserError, match=f"{name} needs at least {least} clients"):
        build_strategy(registry.entry(name), scenario)


def test_q_fedavgs_clients_say_the_loss_of_the_model_they_received(monkeypatch) -> None:
    half = wake(server("flwr_qfedavg"))
    with torch.no_grad():
        received = torch.nn.functional.cross_entropy(half.model(half.x).double(), half.y).item()
    told = half.fit()
    assert told["train_loss"] == pytest.approx(received, rel=1e-5)
    assert told["loss"] < 0.99 * told["train_loss"]
    nothing = half.x[:0], half.y[:0]
    monkeypatch.setattr(FusionClient, "examples", lambda self, split: nothing)
    assert wake(server("flwr_qfedavg")).fit()["train_loss"] == 0.0


@pytest.mark.parametrize("asked", ["by its quorum", "by Flower"])
def test_skipped_aggregation_keeps_the_model_and_says_so(asked, monkeypatch) -> None:
    """Bulyan needs three replies; with two Flower skips, and so do we."""
    kind = registry.entry("flwr_bulyan").server
    if asked == "by Flower":
        monkeypatch.setattr(kind, "quorum", 1)
    logged = []
    monkeypatch.setattr(kind, "log", lambda self, metric, value, *more, **named: logged.append((metric, value)))

    def lost(message, reply) -> bool:
        return reply.metadata.src_node_id == 2 and message.metadata.message_type == "train"

    with federation("flwr_bulyan", grid="serial", drop=lost) as (built, _):
        built.run()
        model = built.strategy.model
        assert all(torch.equal(v, model[k]) for k, v in built.strategy.workspace.initial("mlp_small").items())
    assert [value for metric, value in logged if metric == "kept"] == [3, 3]


def test_arrays_are_paired_by_name_whatever_order_they_come_in() -> None:
    """FedAvgM and QFedAvg pair arrays by position: a checkpoint brings them back sorted."""
    _, scenario = scenario_of((*TINY, "strategy=flwr_fedavgm"))
    strategy = build_strategy(registry.entry("flwr_fedavgm"), scenario)
    strategy.ensure_begun()
    shuffled = dict(sorted(strategy.model.items(), reverse=True))
    assert list(strategy.ruled(shuffled)) == list(strategy.workspace.initial("mlp_small"))


def test_counters_stay_integers() -> None:
    """Flower's mean turns BatchNorm's counters into floats; q-FedAvg would fail on them."""
    options = ("model=resnet8_bn", "rounds=1", "data.limit=60", "model.width=0.25")
    for name in ("flwr_fedavg", "flwr_qfedavg", "flwr_krum"):
        model = play(name, *options).strategy.model
        counters = [v for k, v in model.items() if k.endswith("num_batches_tracked")]
        assert counters
        assert all(v.dtype == torch.int64 and int(v) > 0 for v in counters)


@pytest.mark.parametrize(
    "name", ["flwr_fedavgm", "flwr_fedadagrad", "flwr_fedadam", "flwr_fedyogi", "flwr_qfedavg", "flwr_fedavg"]
)
def test_running_statistics_are_the_clients_mean_whatever_the_server_steps(name: str) -> None:
    """Under FedAvgM's momentum a running variance was negative after three rounds, and predictions no numbers."""
    words = ("model=resnet8_bn", "model.width=0.25", "data.limit=60", "partition=size", "partition.min_size=5")
    sent: list[tuple[float, dict[str, torch.Tensor]]] = []
    with federation(name, *words, "rounds=2") as (built, _):

        def look(reply) -> None:
            arrays = {k: v.double().clone() for k, v in tensors(reply.content["arrays"]).items()}
            sent.append((float(reply.content["metrics"]["num-examples"]), arrays))

        intercept(built, look, kind="train")
        built.run()
        model = built.strategy.model
    last = sent[-3:]
    running = [key for key in model if "running_" in key]
    assert running
    for key in running:
        want = sum(n * arrays[key] for n, arrays in last) / sum(n for n, _ in last)
        torch.testing.assert_close(model[key].double(), want, rtol=1e-5, atol=1e-6)


def test_flowers_own_loop_configuration_reaches_a_client() -> None:
    _, scenario = scenario_of((*TINY, "strategy=flwr_fedavg"))
    entry = registry.entry("flwr_fedavg")
    with tempfile.TemporaryDirectory() as folder:
        grid = InlineGrid(place(entry, scenario, ClientStore(Path(folder))))
        initial = record(grid.node.workspace.initial("mlp_small"))
        results = [
            flower.FedAvg(fraction_evaluate=0.0)
            .start(grid=grid, initial_arrays=initial, num_rounds=1, train_config=ConfigRecord({"proximal-mu": mu}))
            .arrays
            for mu in (0.0, 10.0)
        ]
    assert not tensors(results[0])["head.weight"].equal(tensors(results[1])["head.weight"])
