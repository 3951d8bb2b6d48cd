"""KnFu in float64: its limits, its options, and who enters the softmax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.strategies.knfu import KnFuHyper, distances, estimate, fusion_weights
from tests.federations import federation, play

KINDS = ("kl_nm", "kl_mn", "sym_kl", "js", "l2", "cosine")


def soft_labels(n: int, t: int, c: int, seed: int = 0) -> torch.Tensor:
    """F: n clients' distributions on t rows, float64."""
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, t, c, generator=draw, dtype=torch.float64)).softmax(-1)


def test_beta_zero_is_uniform_averaging() -> None:
    f = soft_labels(5, 7, 4)
    w = fusion_weights(estimate(f, KnFuHyper()), KnFuHyper(beta=0.0))
    assert torch.equal(w, torch.full((5, 5), 0.2, dtype=torch.float64))
    fused = torch.einsum("nm,mtc->ntc", w, f)
    torch.testing.assert_close(fused, f.mean(0).expand(5, 7, 4), rtol=0, atol=1e-15)


def test_beta_to_infinity_is_self_distillation() -> None:
    f = soft_labels(5, 7, 4)
    w = fusion_weights(estimate(f, KnFuHyper()), KnFuHyper(beta=1e9))
    assert torch.equal(w, torch.eye(5, dtype=torch.float64))


def test_weights_by_hand() -> None:
    """Two clients with p = (3/4, 1/4) and (1/4, 3/4): d = ½·log 3 both ways, w₁₂ = 1 / (1 + 3^{β/2})."""
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    d = distances(p, "kl_nm")
    assert d[0, 1].item() == pytest.approx(0.5 * math.log(3), abs=1e-12)
    w = fusion_weights(p, KnFuHyper(beta=2.0))
    assert w[0, 1].item() == pytest.approx(1 / (1 + 3), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_against_their_formulae(kind: str) -> None:
    p = soft_labels(4, 3, 5).mean(1)
    found = distances(p, kind)
    for n in range(4):
        for m in range(4):
            a, b = p[n].numpy(), p[m].numpy()
            kl = lambda u, v: float((u * (torch.tensor(u) / torch.tensor(v)).log().numpy()).sum())  # noqa: E731
            want = {
                "kl_nm": kl(a, b),
                "kl_mn": kl(b, a),
                "sym_kl": (kl(a, b) + kl(b, a)) / 2,
                "js": (kl(a, (a + b) / 2) + kl(b, (a + b) / 2)) / 2,
                "l2": float(((a - b) ** 2).sum() ** 0.5),
                "cosine": 1 - float(a @ b) / float((a @ a) ** 0.5 * (b @ b) ** 0.5),
            }[kind]
            assert found[n, m].item() == pytest.approx(want, abs=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    beta=st.floats(0, 1000),
    kind=st.sampled_from(KINDS),
    top_k=st.none() | st.integers(1, 8),
    include_self=st.booleans(),
    min_weight=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
def test_fused_rows_are_distributions(n, beta, kind, top_k, include_self, min_weight, seed) -> None:
    f = soft_labels(n, 3, 4, seed)
    h = KnFuHyper(beta=beta, distance=kind, top_k=top_k, include_self=include_self, min_weight=min_weight)
    w = fusion_weights(estimate(f, h), h)
    assert bool((w >= 0).all())
    torch.testing.assert_close(w.sum(1), torch.ones(n, dtype=torch.float64))
    fused = torch.einsum("nm,mtc->ntc", w, f)
    torch.testing.assert_close(fused.sum(-1), torch.ones(n, 3, dtype=torch.float64))
    if not include_self and n > 1:
        assert bool((w.diagonal() == 0).all())
    if top_k is not None:
        assert bool(((w > 0).sum(1) <= max(top_k, 1)).all())


def test_one_sided_predictions_do_not_divide_by_zero() -> None:
    """A histogram EPD has zeros; divergences stay finite and the weights are still a distribution."""
    p = torch.eye(3, dtype=torch.float64)
    for kind in KINDS:
        w = fusion_weights(p, KnFuHyper(distance=kind))
        assert bool(torch.isfinite(w).all())


def test_argmax_histogram() -> None:
    f = torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]], dtype=torch.float64)
    p = estimate(f, KnFuHyper(epd_source="argmax_histogram"))
    torch.testing.assert_close(p, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))


def test_absent_clients_do_not_enter_the_softmax() -> None:
    """With one of three clients a round, its mixture is its own soft labels."""
    with federation("knfu", "participation=0.34", "rounds=3") as (built, _):
        seen = []
        fuse = built.strategy.fuse

        def look(shares):
            everyone = list(shares)
            seen.append(everyone[0].records["soft_labels"]["p"])
            fuse(iter(everyone))
            (client,) = [s.client for s in everyone]
            published = built.strategy.published("soft_labels", client)["p"]
            torch.testing.assert_close(published, seen[-1], rtol=0, atol=1e-6)

        built.strategy.fuse = look
        built.run()
    assert len(seen) == 3


def test_bytes_up_are_rows_times_classes_times_four() -> None:
    played = play("knfu", "rounds=3", "participation=0.67")
    assert played.totals["up_bytes"] == 3 * 2 * 24 * 10 * 4


@pytest.mark.parametrize(
    "option",
    [
        "strategy.epd_source=oracle_label_histogram",
        "strategy.epd_source=argmax_histogram",
        "strategy.fuse_space=logit",
        "strategy.finetune_loss=ce_soft",
        "strategy.top_k=1",
        "loss=js",
    ],
)
def test_every_open_choice_runs(option: str) -> None:
    first = play("knfu", option)
    assert first.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    assert play("knfu", option, grid="serial").digest == first.digest


def test_hard_labels_need_a_labelled_transfer_set() -> None:
    labelled = play("knfu", "strategy.finetune_loss=kl+ce_hard", "transfer.labelled=true")
    assert labelled.digest != play("knfu", "transfer.labelled=true").digest
