"""KnFu in float64: its limits, its options, and who enters the softmax."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fedfuse.errors import UserError
from fedfuse.families.neighbours import distances, weights
from fedfuse.families.public_text import Said, aligned, mixture
from fedfuse.strategies.knfu import KnFu, KnFuHyper, estimate
from fedfuse.wire.records import InvalidArrays
from tests.federations import federation, intercept, play
from tests.halves import client, server
from tests.strategies.test_fedmkt import words  # noqa: F401  (a fixture)


def soft_labels(n: int, t: int, c: int, seed: int = 0) -> torch.Tensor:
    """F: n clients' distributions on t rows, float64."""
    draw = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(n, t, c, generator=draw, dtype=torch.float64)).softmax(-1)


def test_beta_zero_is_uniform_averaging() -> None:
    f = soft_labels(5, 7, 4)
    w = weights(distances(estimate(f, KnFuHyper()), "js"), KnFuHyper(beta=0.0))
    assert torch.equal(w, torch.full((5, 5), 0.2, dtype=torch.float64))
    fused = torch.einsum("nm,mtc->ntc", w, f)
    torch.testing.assert_close(fused, f.mean(0).expand(5, 7, 4), rtol=0, atol=1e-15)


def test_beta_to_infinity_is_self_distillation() -> None:
    f = soft_labels(5, 7, 4)
    w = weights(distances(estimate(f, KnFuHyper()), "js"), KnFuHyper(beta=1e9))
    assert torch.equal(w, torch.eye(5, dtype=torch.float64))


def test_argmax_histogram() -> None:
    f = torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]]], dtype=torch.float64)
    p = estimate(f, KnFuHyper(epd_source="argmax_histogram"))
    torch.testing.assert_close(p, torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64))


def test_the_oracles_histogram_is_of_shares_not_of_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    half = client("knfu", "strategy.epd_source=oracle_label_histogram")
    monkeypatch.setattr(half, "examples", lambda split: (None, torch.tensor([3, 3, 0, 3, 9])))
    want = torch.tensor([0.2, 0, 0, 0.6, 0, 0, 0, 0, 0, 0.2])
    torch.testing.assert_close(half.share()["soft_labels"]["histogram"], want)


@pytest.mark.parametrize("space", ["prob", "logit"])
def test_an_oracles_histogram_that_is_no_distribution_is_refused(space: str) -> None:
    strategy = server("knfu", "strategy.epd_source=oracle_label_histogram", f"strategy.fuse_space={space}")
    scope = strategy.workspace.scope(0, strategy.hyper)
    p = soft_labels(1, 3, 10)[0]
    for told in ([0.25, 0.75], [0.0, 0.0]):  # nobody's examples have no shares
        KnFu.examine(scope, {"soft_labels": {"p": p, "histogram": torch.tensor(told)}})
    for wrong in ([25.0, 75.0], [-0.25, 1.25], [-1.0, 1.0], [0.0, float("nan")]):
        with pytest.raises(InvalidArrays, match="soft_labels/histogram: 1 rows are no distributions"):
            KnFu.examine(scope, {"soft_labels": {"p": p, "histogram": torch.tensor(wrong)}})


def test_absent_clients_do_not_enter_the_softmax() -> None:
    """With one of three clients a round, its mixture is its own soft labels."""
    with federation("knfu", "participation=0.34", "rounds=3", "strategy.fuse_space=prob") as (built, _):
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
        "strategy.fuse_space=prob",
        "strategy.finetune_loss=ce_soft",
        "strategy.top_k=1",
        "loss=reverse_kl",
    ],
)
def test_every_open_choice_runs(option: str) -> None:
    first = play("knfu", option)
    assert first.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
    assert play("knfu", option, grid="serial").digest == first.digest


def test_hard_labels_need_a_labelled_transfer_set() -> None:
    labelled = play("knfu", "strategy.finetune_loss=kl+ce_hard", "transfer.labelled=true")
    assert labelled.digest != play("knfu", "transfer.labelled=true").digest


def test_hard_labels_are_refused_where_there_are_none() -> None:
    with pytest.raises(UserError, match=r"finetune_loss=kl\+ce_hard needs labels: set transfer.labelled=true"):
        play("knfu", "strategy.finetune_loss=kl+ce_hard")


class _Said:
    """A share as `fuse` sees it."""

    def __init__(self, client: int, p: torch.Tensor, examples: int) -> None:
        self.client, self.records = client, {"soft_labels": {"p": p}}
        self.examples, self.weight = examples, 1.0  # it is fresh


@pytest.mark.parametrize("space", ["prob", "logit"])
def test_a_client_gets_the_mixture_of_its_own_row(space: str) -> None:
    """KL(p_n ‖ p_m) is not symmetric, so the weights are not: a transposed matrix would give other mixtures."""
    f = soft_labels(3, 24, 10, seed=4).float()
    f[0] = (f[0] ** 3) / (f[0] ** 3).sum(-1, keepdim=True)
    sent = f.log() if space == "logit" else f
    with federation("knfu", f"strategy.fuse_space={space}", "strategy.distance=kl_nm", "strategy.beta=4") as (built, _):
        server = built.strategy
        server.round = 1
        server.fuse(iter([_Said(n, sent[n], 5 + n) for n in range(3)]))
        p = f.double().mean(1)
        for n in range(3):
            d = [float((p[n] * (p[n] / p[m]).log()).sum()) for m in range(3)]
            e = [math.exp(-4 * x) for x in d]
            w = [x / sum(e) for x in e]
            mixed = sum(w[m] * sent[m].double() for m in range(3))
            want = mixed.softmax(-1) if space == "logit" else mixed
            got = server.published("soft_labels", to=n)["p"].double()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
            logged = {name: value for _, client, _, name, value in server.logged if client == n}
            assert logged["weight/self"] == pytest.approx(w[n], rel=1e-5)
            assert logged["weight/neighbours"] == pytest.approx(1 / sum(x * x for x in w), rel=1e-5)


def test_fusion_is_felt_at_the_defaults_and_a_run_without_says_so() -> None:
    skewed = ("partition=dirichlet", "partition.alpha=0.3", "partition.min_size=2", "train.epochs=5")
    default = play("knfu", *skewed)
    assert default.strategy.state["weights"]["neighbours"] > 1.2
    assert default.strategy.notes() == []
    with federation("knfu", *skewed, "strategy.distance=kl_nm", "strategy.beta=1000") as (built, directory):
        built.run()
        summary = json.loads((directory.path / "summary.json").read_text())
    (note,) = built.strategy.notes()
    assert "fusion did next to nothing" in note
    assert "1.000 of their mixtures" in note
    assert note in summary["notes"]


CLASSROOM = ("strategy.neighbours=classroom", "transfer.labelled=true")


@pytest.mark.parametrize("space", ["prob", "logit"])
def test_classroom_sends_each_the_soft_labels_of_those_who_know_more(space: str) -> None:
    """The middle one of three has learnt from no example: it is taught, and teaches nobody."""
    with federation("knfu", *CLASSROOM, f"strategy.fuse_space={space}") as (built, _):
        server = built.strategy
        server.round = 1
        y = server.workspace.tensors("transfer")[1]
        right = torch.nn.functional.one_hot(y, 10).double()
        f = torch.stack([s * right + (1 - s) * soft_labels(1, 24, 10, seed=6)[0] for s in (0.2, 0.7, 0.5)])
        sent = f.log() - 3 if space == "logit" else f
        server.fuse(iter([_Said(n, sent[n], 5 * (n != 1)) for n in range(3)]))
        r = [math.exp(-float(-f[n][torch.arange(24), y].log().mean())) for n in range(3)]
        w = [2 * x / sum(r) for x in r]
        for n, teachers in enumerate(([2], [], [])):  # 1 is the best, and may not teach
            got = server.published("soft_labels", to=n)
            assert got["own"].item() == pytest.approx(w[n], rel=1e-6)
            assert got["weight"].tolist() == pytest.approx([w[m] for m in teachers], rel=1e-6)
            torch.testing.assert_close(got["p"].double(), f[teachers], rtol=1e-6, atol=1e-8)
            assert got["temperature"].tolist() == pytest.approx([1 + 12 * (w[m] - w[n]) / w[m] for m in teachers])


def test_classroom_needs_labels_and_says_which_keys_do_nothing_beside_it() -> None:
    with pytest.raises(UserError, match=r"neighbours=classroom ranks by labels: set transfer.labelled=true"):
        play("knfu", CLASSROOM[0])
    with federation("knfu", *CLASSROOM) as (built, _):
        workspace = built.strategy.workspace
    beside = {"beta": 3.0, "epd_source": "argmax_histogram", "distance": "l2", "include_self": False, "top_k": 1}
    for key, value in (beside | {"min_weight": 0.2, "finetune_loss": "ce_soft", "kd_temperature": 2.0}).items():
        with pytest.raises(UserError, match=f"strategy.{key}={value} does nothing with strategy.neighbours=classroom"):
            KnFu(KnFuHyper(neighbours="classroom", **{key: value}), workspace)


def test_mixtures_go_to_participants_and_are_what_the_weights_say() -> None:
    """Recomputed from what was sent, over the participants of the round only."""
    drawn = ("clients=5", "participation=0.6", "rounds=2", "evaluate.every=2", "strategy.fuse_space=prob")
    with federation("knfu", *drawn) as (built, _):
        sent: dict[int, torch.Tensor] = {}

        def look(reply):
            sent[reply.metadata.src_node_id - 1] = torch.tensor(reply.content["soft_labels"]["p"].numpy())

        intercept(built, look, kind="train", round=2)
        built.run()
        board = built.strategy.board.items
        assert sorted(sent) == built.strategy.plan(2)
        assert len(sent) == 3
        stacked = torch.stack([sent[c] for c in sorted(sent)]).double()
        w = weights(distances(estimate(stacked, KnFuHyper()), "js"), KnFuHyper())
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


# -- texts -----------------------------------------------------------------------------------------------------------

PERPLEXITY = ("strategy.distance=perplexity", "strategy.fuse_space=prob", "strategy.finetune_epochs=1")


def test_texts_are_fused_by_perplexity_between_tokenisers(words) -> None:  # noqa: F811
    """What each client gets, and what it weighs, by hand from the records that were sent."""
    with federation("knfu", *PERPLEXITY, "rounds=1", "strategy.beta=3", base=words) as (built, _):
        strategy, seen = built.strategy, []
        fuse = strategy.fuse
        strategy.fuse = lambda shares: (seen.extend(shares), fuse(iter(seen)))[1]
        built.run()
        texts, rows = strategy.workspace.texts, torch.arange(12)
        names = strategy.scenario.architectures
        ce = torch.stack([s.records["soft_labels"]["bits"].double() for s in seen]) * math.log(2)
        ce = ce / texts.places(names[0], rows).ends.amax(1)
        w = (-3 * ce).softmax(0)
        assert w.std() > 1e-3
        for share in seen:
            name = names[share.client]
            parts = [
                aligned(texts, name, Said(names[s.client], s.records["soft_labels"]), rows, coarse=False,
                        unmatched_label=False) for s in seen
            ]  # fmt: skip
            p, ids = mixture(parts, w, 16)
            got = strategy.published("soft_labels", share.client)
            assert torch.equal(got["ids"].long(), ids)
            assert torch.allclose(got["p"].double(), p, atol=1e-6)
            places = texts.places(name).tokens.shape[1]
            assert sum(a.nbytes for a in share.records["soft_labels"].values()) == 12 * (places * 16 * (4 + 2) + 4)
        assert math.isfinite(built.headline["bits_per_byte/global"])


def test_keys_are_heard_of_texts(words) -> None:  # noqa: F811
    base = (*words, "model.pool=[causal_lm@own]", "rounds=1", *PERPLEXITY)
    keys = ("k=4", "beta=1000", "include_self=false", "finetune_loss=kl+ce_hard")
    plain = play("knfu", base=base).digest
    assert play("knfu", base=base, grid="serial").digest == plain
    assert len({plain, *(play("knfu", f"strategy.{key}", base=base).digest for key in keys)}) == 1 + len(keys)


def test_what_says_nothing_of_texts_or_of_classes_is_refused(words) -> None:  # noqa: F811
    with pytest.raises(UserError, match=r"strategy\.distance=js: of texts only perplexity says anything"):
        play("knfu", base=words)
    with pytest.raises(UserError, match=r"strategy\.distance=perplexity: perplexity is of texts"):
        play("knfu", PERPLEXITY[0])
    for word in ("fuse_space=logit", "epd_source=argmax_histogram"):
        with pytest.raises(UserError, match=rf"strategy\.{word}: of texts allowed is "):
            play("knfu", *PERPLEXITY, f"strategy.{word}", base=words)
