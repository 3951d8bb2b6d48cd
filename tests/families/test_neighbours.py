"""Who teaches whom, in float64: distances and the weights of mixtures, and what a rule refuses or says of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.core.texts import Places
from fedfuse.data.dataset import IGNORED
from fedfuse.errors import UserError
from fedfuse.families import neighbours
from fedfuse.families.neighbours import distances, weights
from fedfuse.train.losses import loss

KINDS = ("kl_nm", "kl_mn", "sym_kl", "js", "l2", "cosine")


@dataclass(frozen=True)
class Keys:
    """Hyper-parameters of a strategy that mixes, and may be asked for another rule."""

    beta: float = 10.0
    include_self: bool = True
    top_k: int | None = None
    min_weight: float = 0.0
    neighbours: str = "classroom"


def soft_labels(n: int, t: int, c: int, seed: int = 0) -> torch.Tensor:
    """F: n clients' distributions on t rows, float64."""
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, t, c, generator=draw, dtype=torch.float64)).softmax(-1)


def test_weights_by_hand() -> None:
    """Two clients with p = (3/4, 1/4) and (1/4, 3/4): d = ½·log 3 both ways, w₁₂ = 1 / (1 + 3^{β/2})."""
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    d = distances(p, "kl_nm")
    assert d[0, 1].item() == pytest.approx(0.5 * math.log(3), abs=1e-12)
    w = weights(d, Keys(beta=2.0))
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
    w = weights(distances(f.mean(1), kind), Keys(beta, include_self, top_k, min_weight))
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
        w = weights(distances(p, kind), Keys())
        assert bool(torch.isfinite(w).all())


def test_who_has_no_examples_is_in_nobodys_mixture() -> None:
    """Three clients, the second untaught: its column is 0, its own row mixes the other two by their distances to it."""
    p = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.1, 0.9]], dtype=torch.float64)
    taught = torch.tensor([True, False, True])
    d = distances(p, "kl_nm")
    w = weights(d, Keys(beta=3.0), taught)
    assert w[:, 1].tolist() == [0, 0, 0]
    for n in range(3):
        ratio = math.exp(-3.0 * (d[n, 0] - d[n, 2]).item())
        assert (w[n, 0] / w[n, 2]).item() == pytest.approx(ratio, rel=1e-12)
    w = weights(d, Keys(include_self=False), taught)
    assert w[0].tolist() == [0, 0, 1]
    assert w[2].tolist() == [1, 0, 0]
    assert w[1, 1] == 0
    lone = weights(d, Keys(include_self=False), torch.tensor([True, False, False]))
    assert lone.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]  # nobody else: in its own mixture after all


def test_perplexity_weights_are_packllms() -> None:
    """λ_m = softmax(−CE_m/τ) with τ = 1/β, the same for every n; left out, the others' alone."""
    ce = torch.tensor([1.5, 0.5, 2.5], dtype=torch.float64)  # nats a byte of one row
    d = ce.expand(3, -1)
    w = weights(d, Keys(beta=2.0))
    e = [math.exp(-2 * c) for c in ce.tolist()]
    for row in w.tolist():
        assert row == pytest.approx([one / sum(e) for one in e], rel=1e-12)
    others = weights(d, Keys(beta=2.0, include_self=False))
    assert others[1].tolist() == pytest.approx([e[0] / (e[0] + e[2]), 0, e[2] / (e[0] + e[2])], rel=1e-12)
    assert weights(d, Keys(beta=2.0, top_k=1)).tolist() == [[0, 1, 0]] * 3
    absent = weights(d, Keys(beta=2.0), torch.tensor([True, False, True]))
    assert absent[0].tolist() == pytest.approx([e[0] / (e[0] + e[2]), 0, e[2] / (e[0] + e[2])], rel=1e-12)


def test_a_stale_share_weighs_less_before_weights_are_normalised() -> None:
    d, worth = distances(soft_labels(3, 4, 5).mean(1), "js"), torch.tensor([1.0, 0.25, 0.5], dtype=torch.float64)
    fresh = weights(d, Keys())
    want = fresh * worth / (fresh * worth).sum(1, keepdim=True)
    torch.testing.assert_close(weights(d, Keys(), worth=worth), want, rtol=1e-12, atol=0)


def estimated(n: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return (2 * torch.randn(n, 5, generator=draw, dtype=torch.float64)).softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.0, 10.0])
@pytest.mark.parametrize("include_self", [True, False])
def test_top_k_keeps_the_nearest(kind: str, beta: float, include_self: bool) -> None:
    p = estimated()
    d = distances(p, kind)
    w = weights(d, Keys(beta, include_self, top_k=2))
    for n in range(len(p)):
        others = [m for m in range(len(p)) if include_self or m != n]
        nearest = sorted(others, key=lambda m: float(d[n, m]))[:2]
        assert sorted(w[n].nonzero().flatten().tolist()) == sorted(nearest)
        if beta == 0:
            assert w[n, nearest].tolist() == [0.5, 0.5]


def test_weak_neighbours_are_dropped_and_the_rest_renormalised() -> None:
    d = distances(estimated(), "js")
    free = weights(d, Keys(beta=1.0))
    w = weights(d, Keys(beta=1.0, min_weight=0.15))
    kept = free >= 0.15
    assert bool(kept.any())
    assert not bool(kept.all())
    want = torch.where(kept, free, 0)
    torch.testing.assert_close(w, want / want.sum(1, keepdim=True))
    assert bool((weights(d[:4, :4] * 0, Keys(min_weight=0.25)) == 0.25).all())  # what is not below it stays
    alone = weights(d, Keys(beta=1e9, min_weight=1.0))
    assert torch.equal(alone, torch.eye(len(d), dtype=torch.float64))


def half(h: Any, *, labelled: bool = True, texts: bool = False, cohort: int = 3) -> Any:
    """As much of a server half as a rule asks for its refusals."""
    config = SimpleNamespace(transfer=SimpleNamespace(labelled=labelled))
    scenario = SimpleNamespace(
        config=config, data=SimpleNamespace(dataset=SimpleNamespace(next_token=texts)), cohort_size=cohort
    )
    workspace = SimpleNamespace(transfer_declared=False)
    return SimpleNamespace(
        hyper=h, scenario=scenario, workspace=workspace, transfer="clients", name="own", state={}, logged=[]
    )


@pytest.mark.parametrize(
    ("keys", "labelled", "said"),
    [
        (Keys(), False, "strategy.neighbours=classroom ranks by labels: set transfer.labelled=true"),
        (Keys(top_k=3), True, "strategy.top_k=3 does nothing with strategy.neighbours=classroom; allowed there: null"),
        (
            Keys(beta=1.0),
            True,
            "strategy.beta=1.0 does nothing with strategy.neighbours=classroom; allowed there: 10.0",
        ),
    ],
)
def test_keys_beside_mentors_are_named_with_what_is_allowed_there(keys: Keys, labelled: bool, said: str) -> None:
    rule = neighbours.rule("classroom")
    assert rule is not None
    with pytest.raises(UserError) as refused:
        rule.check(half(keys, labelled=labelled), "beta", "top_k")
    assert str(refused.value) == said
    server = half(Keys(min_weight=0.1))
    rule.check(server, "beta", "top_k")  # what is not idle may be anything
    assert (server.transfer, server.workspace.transfer_declared) == ("both", True)  # it needs the labels itself


def test_a_word_that_names_no_rule_is_the_algorithms_own() -> None:
    assert neighbours.rule("learned") is None
    rule = neighbours.rule("perplexity")
    assert rule is not None
    rule.check(half(Keys(), texts=True))
    with pytest.raises(UserError, match=r"^strategy\.distance=perplexity: perplexity is of texts$"):
        rule.check(half(Keys()))


@pytest.mark.parametrize(("own", "cohort", "noted"), [(0.9, 3, True), (0.89, 3, False), (1.0, 1, False)])
def test_mixtures_are_logged_and_a_run_of_self_teachers_is_told(own: float, cohort: int, noted: bool) -> None:
    """w_nn = own for everybody, the rest to one other: 1/Σw² of a row is 1/(own² + (1 − own)²)."""
    server = half(Keys(), cohort=cohort)
    matrix = []
    server.log = lambda *said, **scope: server.logged.append((*said, scope))
    server.log_matrix = lambda *said: matrix.append(said)
    assert neighbours.inert(server, "listen") == []  # nothing has been fused yet
    w = own * torch.eye(3, dtype=torch.float64) + (1 - own) * torch.eye(3, dtype=torch.float64).roll(1, 1)
    neighbours.log_mixtures(server, [4, 5, 7], w)
    assert matrix == [("similarity", [4, 5, 7], w)]
    amount = 1 / (own**2 + (1 - own) ** 2)
    found = {(one[0], *one[2:-1]): one[1] for one in server.logged}
    assert set(found) == {(n, *w) for n in ("weight/self", "weight/neighbours") for w in ((), (4,), (5,), (7,))}
    for (name, *_), value in found.items():
        assert value == pytest.approx(own if name == "weight/self" else amount, rel=1e-12)
    notes = neighbours.inert(server, "listen")
    if noted:
        assert notes == [
            f"own: fusion did next to nothing: in the last round clients kept {own:.3f} of their mixtures for "
            f"themselves ({amount:.2f} effective neighbours); listen"
        ]
    else:
        assert notes == []


@pytest.mark.parametrize("softened", [None, 1.0, 4.0])
def test_mentors_are_ranked_alike_however_soft_labels_travel(softened: float | None) -> None:
    """Logits up to a shift, probabilities, or probabilities softened: one rank; what is taught is a distribution."""
    y, p = torch.tensor([3, 0, 1, 2]), soft_labels(3, 6, 5, seed=2)
    rows = torch.tensor([1, 2, 4, 5])
    sent = p.log() + 3 if softened is None else (p.log() / softened).softmax(-1)
    server, published = half(Keys()), {}
    server.records, server.topics = {"said": None}, {"taught": None}
    server.workspace.tensors = lambda what: (None, torch.tensor([0, 3, 0, 4, 1, 2]))
    server.log_matrix = lambda *said: None
    server.publish = lambda topic, arrays, to: published.update({(topic, to): arrays})
    everyone: Any = [
        SimpleNamespace(client=n, records={"said": {"p": sent[n][rows]}}, examples=n, weight=1.0) for n in range(3)
    ]
    rule = neighbours.rule("classroom", softened)
    assert rule is not None
    rule.fuse(server, everyone, rows)
    r = torch.stack([p[n][rows, y].log().mean().exp() for n in range(3)])
    w = 2 * r / r.sum()
    taught = p if softened is None else sent
    for n in range(3):
        teachers = [m for m in (1, 2) if m != n and w[m] >= w[n]]  # 0 has no examples, and teaches nobody
        got = published["taught", n]
        assert got["own"].tolist() == pytest.approx([w[n].item()], rel=1e-6)
        assert got["weight"].tolist() == pytest.approx(w[teachers].tolist(), rel=1e-6)
        torch.testing.assert_close(got["p"], taught[teachers][:, rows].float(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("choice", "name", "hard"), [("kl", "kl", 0), ("ce_soft", "soft_ce", 0), ("kl+ce_hard", "kl", 1)]
)
def test_a_mixture_of_texts_is_taught_by_the_loss_that_was_asked_for(choice: str, name: str, hard: int) -> None:
    """Two rows of two places, a vocabulary of three, one likeliest token and the rest."""
    tokens = torch.tensor([[1, 2], [0, IGNORED]])
    places = Places(torch.zeros(2, 3), tokens, torch.tensor([[1, 2], [1, 2]]), 3)
    pieces = (b"a", b"b", b"c")
    texts = SimpleNamespace(places=lambda architecture, rows: places, pieces=lambda architecture: pieces)
    keys, asked = SimpleNamespace(finetune_loss=choice, kd_temperature=1.0), []

    def made(kind: str, **options: Any) -> Any:
        asked.append((kind, options))
        return loss(kind, **options)

    client: Any = SimpleNamespace(hyper=keys, workspace=SimpleNamespace(texts=texts), architecture="own", loss=made)
    p = torch.tensor([[[0.7], [0.4]], [[0.9], [0.5]]])
    item: Any = SimpleNamespace(arrays={"p": p, "ids": torch.tensor([[[1], [0]], [[2], [0]]])})
    rule = neighbours.rule("perplexity")
    assert rule is not None
    step, x, y = rule.lesson(client, item, torch.arange(2))
    assert (x is places.x, y) == (True, None)
    assert asked == [(name, {"temperature": 1.0})]
    z = soft_labels(2, 3, 3, seed=1).log()
    q = z[:, :-1].softmax(-1)
    value, places_that_count = 0.0, ((0, 0, 1, 0.7), (0, 1, 0, 0.4), (1, 0, 2, 0.9))
    for row, place, likeliest, share in places_that_count:
        mine = q[row, place, likeliest].item()
        cross = -share * math.log(mine) - (1 - share) * math.log(1 - mine)
        own = share * math.log(share) + (1 - share) * math.log(1 - share)
        value += (cross + (own if name == "kl" else 0)) / 3
        value -= hard * math.log(q[row, place, tokens[row, place]].item()) / 3
    assert step(z, None, torch.arange(2)).item() == pytest.approx(value, rel=1e-6)
