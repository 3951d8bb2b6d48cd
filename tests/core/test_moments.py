"""Two models of a client after a round, where it digests a lesson in the next: both are scored, and one is shown."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from fedfuse.config import registry
from fedfuse.config.idle import digests, idle
from fedfuse.core.moments import evaluate
from fedfuse.train.scores import scores
from fedfuse.train.training import predict
from tests.federations import federation, play, scenario_of
from tests.halves import client

# unequal clients, two of three in the last round, and a digest that is felt
WORDS = ("partition=dirichlet", "partition.alpha=0.5", "data.personal_test=0.4", "participation=0.67", "distil.lr=0.2")


def test_who_digests_what_is_received():
    names = [name for name in registry.listed() if digests(registry.entry(name))]
    assert names == ["dsfl", "fedmd", "fedmkt", "knfu", "ktpfl", "scarlet", "selectivefd"]


@pytest.mark.parametrize("name", ["fedmd", "scarlet"])
def test_both_moments_by_hand(name):
    """`trained` is what lies committed; `received` what the final evaluation made of it. Digest and rest stay."""
    found = {}
    for moment in ("received", "trained"):
        with federation(name, *WORDS, f"evaluate.moment={moment}") as (built, directory):
            built.run()
            strategy, figures = built.strategy, {"received": [], "trained": []}
            workspace = strategy.workspace
            for client in range(3):
                tag = strategy.outbox.tags.get(client, "0")
                kept = directory.clients.load(client, tag)["model"]
                final = load_file(directory.path / "final" / f"client-{client}.safetensors")
                x, y = workspace.tensors(client, "personal")
                for at, arrays in (("trained", kept), ("received", final)):
                    model = workspace.loaded("mlp_small", arrays)
                    figures[at].append(scores(predict(model, x), y, 10)["accuracy"])
            found[moment] = (built.digest, built.headline, dict(strategy.inbox.scored), figures)
    assert found["received"][0] == found["trained"][0]
    for moment, other in (("received", "trained"), ("trained", "received")):
        _, headline, scored, figures = found[moment]
        assert figures["received"] != figures["trained"]
        for client in range(3):
            assert scored[client]["personal/accuracy"] == figures[moment][client]
            assert scored[client][f"personal/accuracy_{other}"] == figures[other][client]
        assert headline["accuracy/personal"] == pytest.approx(sum(figures[moment]) / 3)
        assert headline[f"accuracy/personal_{other}"] == pytest.approx(sum(figures[other]) / 3)
        assert headline["accuracy/personal_worst10"] == min(figures[moment])
        assert f"accuracy/personal_{moment}" not in headline
    if name == "fedmd":  # which has no server model: the clients' mean is told
        assert found["received"][1]["accuracy/global"] != found["trained"][1]["accuracy/global"]


def test_a_lesson_that_moves_one_layer_is_told_too():
    """Scored beside is what training left, even if most of it is as it was; and the client stands where it stood."""
    half = client("fedmd", "partition=dirichlet", "data.personal_test=0.4")
    trained = half.weights()
    last = list(trained)[-1]
    half.begin("evaluate")
    x, y = half.examples("personal")
    most = y.mode().values
    received = {**trained, last: trained[last].index_fill(0, most[None], 100.0)}  # everything is its class then
    before = scores(predict(half.model, x), y, 10)["accuracy"]
    half.load(received)
    _, metrics = evaluate(half, trained)
    assert metrics["personal/accuracy"] == float((y == most).double().mean()) != before
    assert metrics["personal/accuracy_trained"] == before
    assert all(torch.equal(value, received[name]) for name, value in half.weights().items())
    assert half.splits == ("personal",)
    assert not any("trained" in key for key in evaluate(half, None)[1])


def test_where_there_is_one_model_the_key_is_idle_and_nothing_is_told_twice():
    for name in ("local", "fedavg", "fedproto", "cfd"):
        config, _ = scenario_of(("data=digits", f"strategy={name}", "evaluate.moment=trained"))
        assert "train on what they receive" in idle(config)["evaluate.moment"]
    headline = play("local", *WORDS[:3]).federation.headline
    assert not any("received" in key or "trained" in key for key in headline)


def test_the_table_says_which_is_shown(tmp_path):
    from fedfuse.results.run_data import load
    from fedfuse.results.table import notes

    records = []
    for name, moment in (("fedmd", "received"), ("knfu", "received"), ("local", "received")):
        path = tmp_path / name
        play(name, *WORDS[:3], f"evaluate.moment={moment}", path=path)
        records.append(load(path))
    final = {record.strategy: record.final for record in records}
    (line,) = (line for line in notes(records) if line.startswith("evaluate.moment"))
    assert line.startswith("evaluate.moment=received: clients are shown after they took in the newest lesson")
    for name in ("fedmd", "knfu"):
        assert f"{name} {100 * final[name]['accuracy/personal_trained']:.1f} %" in line
    assert "local" not in line
    assert math.isfinite(final["local"]["accuracy/personal"])
