"""KnFu's choice of neighbours: the nearest, whatever β does to the weights; and what is published to whom."""

from __future__ import annotations

import pytest
import torch

from fedfuse.strategies.knfu import KnFuHyper, distances, estimate, fusion_weights
from tests.federations import federation, intercept

KINDS = ("kl_nm", "kl_mn", "sym_kl", "js", "l2", "cosine")


def estimated(n: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return (2 * torch.randn(n, 5, generator=draw, dtype=torch.float64)).softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 10.0])
@pytest.mark.parametrize("include_self", [True, False])
def test_top_k_keeps_the_nearest(kind: str, beta: float, include_self: bool) -> None:
    p = estimated()
    d = distances(p, kind)
    w = fusion_weights(p, KnFuHyper(beta=beta, distance=kind, top_k=2, include_self=include_self))
    for n in range(len(p)):
        others = [m for m in range(len(p)) if include_self or m != n]
        nearest = sorted(others, key=lambda m: float(d[n, m]))[:2]
        assert sorted(w[n].nonzero().flatten().tolist()) == sorted(nearest)
        if beta == 0:
            assert w[n, nearest].tolist() == [0.5, 0.5]


def test_weak_neighbours_are_dropped_and_the_rest_renormalised() -> None:
    p = estimated()
    free = fusion_weights(p, KnFuHyper(beta=1.0))
    w = fusion_weights(p, KnFuHyper(beta=1.0, min_weight=0.15))
    kept = free >= 0.15
    assert bool(kept.any())
    assert not bool(kept.all())
    want = torch.where(kept, free, 0)
    torch.testing.assert_close(w, want / want.sum(1, keepdim=True))
    alone = fusion_weights(p, KnFuHyper(beta=1e9, min_weight=1.0))
    assert torch.equal(alone, torch.eye(len(p), dtype=torch.float64))


def test_mixtures_go_to_participants_and_are_what_the_weights_say() -> None:
    """Recomputed from what was sent, over the participants of the round only."""
    words = ("clients=5", "participation=0.6", "rounds=2", "evaluate.every=2", "strategy.fuse_space=prob")
    with federation("knfu", *words) as (built, _):
        sent: dict[int, torch.Tensor] = {}

        def look(reply):
            sent[reply.metadata.src_node_id - 1] = torch.tensor(reply.content["soft_labels"]["p"].numpy())

        intercept(built, look, kind="train", round=2)
        built.run()
        board = built.strategy.board.items
        assert sorted(sent) == built.strategy.plan(2)
        assert len(sent) == 3
        stacked = torch.stack([sent[c] for c in sorted(sent)]).double()
        w = fusion_weights(estimate(stacked, KnFuHyper()), KnFuHyper())
        for row, client in zip(w, sorted(sent), strict=True):
            item = board["soft_labels", f"client:{client}"]
            assert item.version == 2
            torch.testing.assert_close(
                item.arrays["p"].double(), torch.einsum("m,mtc->tc", row, stacked), atol=1e-6, rtol=0
            )
        for client in set(range(5)) - set(sent):
            assert (
                board.get(("soft_labels", f"client:{client}")) is None
                or board["soft_labels", f"client:{client}"].version == 1
            )
