"""FedAvg, FedProx and the pool: equal digests where one is the other, and the pool's order."""

from __future__ import annotations

import pytest
import torch

from fedfuse.wire.records import record, tensors
from tests.federations import answer, federation, intercept, play

ROUNDS = ("rounds=3", "clients=4", "participation=0.5")


def test_fedprox_without_its_term_has_fedavgs_digest() -> None:
    assert play("fedprox", "strategy.mu=0", *ROUNDS).digest == play("fedavg", *ROUNDS).digest


@pytest.mark.parametrize(
    "words", [("partition=iid",), ("train.optimizer=adam", "train.lr=0.01"), ("model=resnet8_bn", "rounds=1")]
)
def test_one_client_is_the_pool_bit_for_bit(words: tuple[str, ...]) -> None:
    there = play("centralized", "clients=1", *words)
    one = play("fedavg", "clients=1", *words)
    assert one.digest == there.digest
    assert one.totals["up_bytes"] == there.totals["up_bytes"]


def test_the_pool_is_everybodys_data_in_client_order() -> None:
    with federation("centralized", "clients=4") as (built, _):
        workspace = built.grid.node.workspace
        x, y = workspace.tensors("pooled")
        parts = [built.scenario.data.tensors(c, "train") for c in range(4)]
        assert torch.equal(x, torch.cat([p[0] for p in parts]))
        assert torch.equal(y, torch.cat([p[1] for p in parts]))
        assert built.strategy.plan(1) == [0]
        built.run()
        assert built.strategy.outbox.tags == {0: "0"}


def test_the_mean_is_weighted_by_examples() -> None:
    """Recomputed in float64 from what was sent."""
    words = ("partition=size", "clients=4", "partition.min_size=5", "rounds=1")
    for weighting in ("examples", "uniform"):
        with federation("fedavg", *words, f"strategy.weighting={weighting}") as (built, _):
            sent = []

            def look(reply, sent=sent):
                arrays = {k: v.double().clone() for k, v in tensors(reply.content["arrays"]).items()}
                sent.append((float(reply.content["metrics"]["num-examples"]), arrays))

            intercept(built, look, kind="train")
            built.run()
            assert len({n for n, _ in sent}) > 1
            weights = [n if weighting == "examples" else 1.0 for n, _ in sent]
            for name, value in built.strategy.model.items():
                want = sum(w * a[name] for w, (_, a) in zip(weights, sent, strict=True)) / sum(weights)
                torch.testing.assert_close(value.double(), want, rtol=0, atol=1e-6)


def test_fedmd_refuses_a_lesson_on_too_few_rows() -> None:
    """One row would broadcast over everybody's; it does not get that far."""
    with federation("fedmd", "transfer.subset=8", "rounds=1") as (built, _):

        def short(reply):
            return answer(reply, logits=record({"logits": tensors(reply.content["logits"])["logits"][:1]}))

        intercept(built, short, kind="train", client=1)
        built.strategy.ensure_begun()
        built.play(1, "train")
        assert built.strategy.inbox.failures["rejected"] == 1
        assert built.strategy.inbox.left_out == ["client 1: logits/logits: shape (1, 10), expected (8, 10)"]


@pytest.mark.parametrize("name", ["fedmd", "knfu", "local"])
def test_pools_of_architectures_work_where_knowledge_is_exchanged(name: str) -> None:
    words = ("model.pool=[mlp_small,mlp_wide]", "rounds=2")
    first = play(name, *words)
    assert play(name, *words, reverse=True).digest == first.digest
    assert len(set(first.federation.scenario.architectures)) == 2
