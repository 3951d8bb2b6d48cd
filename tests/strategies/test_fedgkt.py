"""FedGKT in closed form: soft labels by sample index, both losses, both halves in evaluation."""

import json

import numpy as np
import polars as pl
import pytest
import torch
import torch.nn.functional as F

from fedfuse.config.compose import compose
from fedfuse.core.scenario import prepare_scenario
from fedfuse.core.strategy import Share
from fedfuse.errors import UserError
from fedfuse.runs import configuration, experiment
from fedfuse.wire.records import InvalidArrays, Scope
from tests.federations import TINY, play
from tests.halves import client, server, shares, take

T = 3.0
FROZEN = ("train.lr=1e-30", "train.batch_size=7", "train.epochs=2")


def kl(teacher, student):
    p, log_p, log_q = (teacher / T).softmax(1), (teacher / T).log_softmax(1), (student / T).log_softmax(1)
    return T * T * (p * (log_p - log_q)).sum(1)


def test_survives_shuffled_loaders():
    """With weights that stand still, any order of batches must pair each example with its own row."""
    half = client("fedgkt", *FROZEN)
    own, y = half.predict(half.x), half.y
    bare = F.cross_entropy(own, y).item()
    take(half, "logits", z=own)
    assert half.fit()["loss"] == pytest.approx(bare, rel=1e-2)  # own logits as teacher: no divergence at all
    wild = 5 * torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (7, 16, 1000):
        half = client("fedgkt", "train.lr=1e-30", f"train.batch_size={size}", f"train.epochs={size}")
        take(half, "logits", z=wild)
        values = []

        inner = half.train

        def spy(step, inner=inner, values=values, **options):
            def kept(logits, labels, rows):
                expected = F.cross_entropy(logits, labels) + kl(wild[rows], logits).mean()
                values.append((step(logits, labels, rows).item(), expected.item()))
                return step(logits, labels, rows)

            return inner(kept, **options)

        half.train = spy
        found.append(half.fit()["loss"])
        got, expected = zip(*values, strict=True)
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    whole = F.cross_entropy(own, y) + kl(wild, own).mean()
    assert found[-1] == pytest.approx(whole.item(), rel=1e-4)


@pytest.mark.parametrize("word", ["distil.epochs=3", "distil.steps=3", "distil.batch_size=5", "distil.lr=0.3"])
def test_the_servers_training_hears_distil(word):
    """The tail is taught on the clients' features: `distil.*` goes before `server_epochs` and `server_batch`."""
    assert play("fedgkt", word, "rounds=1").digest != play("fedgkt", "rounds=1").digest


def test_a_shuffled_client_shares_in_index_order():
    half = client("fedgkt")
    half.begin("train")
    half.fit()
    content = half.share()["knowledge"]
    assert content["labels"].tolist() == half.y.tolist()
    np.testing.assert_allclose(content["logits"], half.model.head(half.model.features(half.x)).detach(), atol=1e-5)


def test_server_loss_and_answers_by_hand():
    strategy = server("fedgkt", "train.lr=1e-30", "strategy.alpha_server=0.5", "strategy.server_batch=10000")
    draw = torch.Generator().manual_seed(0)
    sizes, contents = (5, 9), []
    for n in sizes:
        contents.append(
            {
                "features": torch.rand(n, 32, generator=draw),
                "logits": torch.randn(n, 10, generator=draw),
                "labels": torch.randint(0, 10, (n,), generator=draw, dtype=torch.int32),
            }
        )
    strategy.fuse(shares(strategy, *[{"knowledge": c} for c in contents]))
    tail = strategy.tail().eval()
    z = [tail(c["features"]).detach() for c in contents]
    for i in range(2):  # every client its own examples' logits, in its own order, of the trained tail
        np.testing.assert_allclose(strategy.published("logits", to=i)["z"], z[i], atol=1e-6)
    every, y = torch.cat(z), torch.cat([c["labels"] for c in contents]).long()
    logits = torch.cat([c["logits"] for c in contents])
    expected = kl(logits, every).mean() + 0.5 * F.cross_entropy(every, y)
    assert next(v for *_, name, v in strategy.logged if name == "loss/tail") == pytest.approx(expected.item(), rel=1e-5)


def test_answers_are_those_of_the_trained_tail_in_evaluation_mode():
    strategy = server("fedgkt")
    content = {"features": torch.rand(8, 32), "logits": torch.randn(8, 10), "labels": torch.arange(8).int()}
    start = {k: v.clone() for k, v in strategy.state["tail"].items()}
    strategy.fuse(shares(strategy, {"knowledge": content}))
    assert any(not torch.equal(v, start[k]) for k, v in strategy.state["tail"].items())
    tail = strategy.tail().eval()
    np.testing.assert_allclose(strategy.published("logits", to=0)["z"], tail(content["features"]).detach(), atol=1e-6)


def test_judge_scores_with_both_halves():
    strategy, half = server("fedgkt"), client("fedgkt")
    half.splits = strategy.splits = ("personal", "global")
    half.begin("evaluate")
    records, metrics = half.evaluate()
    assert metrics == {}
    assert set(records["global"]) == {"features"}
    strategy.outbox.awaited = {0}
    ((who, found),) = strategy.judge([Share(0, records, {"num-examples": 1})])
    for split in ("personal", "global"):
        x, y = half.examples(split)
        right = strategy.tail().eval()(half.model.eval().features(x)).argmax(1) == y
        assert found[f"{split}/accuracy"] == pytest.approx(right.double().mean().item())
    assert who == 0


@pytest.mark.parametrize("spoil", ["shape", "label", "nan", "split"])
def test_hostile_evaluation_is_left_out(spoil):
    strategy, half = server("fedgkt"), client("fedgkt")
    strategy.splits = half.splits
    half.begin("evaluate")
    records, _ = half.evaluate()
    content = records["personal"]
    if spoil == "shape":
        content["features"] = content["features"][:, :3]
    elif spoil == "label":
        content["labels"] = content["labels"] + 10
    elif spoil == "nan":
        content["features"] = content["features"] * float("nan")
    else:
        records = {"secret": content}
    assert strategy.judge([Share(0, records, {"num-examples": 1})]) == []
    assert strategy.inbox.failures["rejected"] == 1


def test_labels_outside_the_classes_are_refused():
    strategy = server("fedgkt")
    with pytest.raises(InvalidArrays, match="labels"):
        type(strategy).examine(
            Scope({"classes": 10}, {}), {"knowledge": {"labels": torch.tensor([3, 10], dtype=torch.int32)}}
        )


def test_bytes_and_the_declaration(tmp_path):
    done = play("fedgkt", path=tmp_path / "run")
    n = sum(done.federation.scenario.examples(c) for c in range(3))
    assert done.totals["up_bytes"] == 2 * n * (4 * (32 + 10) + 4)
    assert done.totals["down_bytes"] == n * 10 * 4  # the second answer reaches evaluation only
    assert done.totals["evaluate_up_bytes"] > 0
    notes = json.loads((tmp_path / "run" / "summary.json").read_text())["notes"]
    assert "fedgkt: labels of private examples leave the clients" in notes


def test_the_tail_is_kept_exported_and_stands_behind_each_client(tmp_path):
    from safetensors import safe_open

    import fedfuse
    from fedfuse.runs.export import export

    where = experiment.run(compose([*TINY, "strategy=fedgkt", f"out={tmp_path / 'run'}"]), quiet=True)
    assert (where / "final/server-tail.safetensors").exists()
    with safe_open(export(where), framework="pt") as file:
        about = file.metadata()
        layers = {name for name in file.keys()}  # noqa: SIM118, C416 - not a dict
    assert (about["architecture"], about["shape"]) == ("mlp_wide", "[32]")
    assert "features" in about["preprocessing"]
    kept = fedfuse.load(where)
    assert layers == set(kept.model().state_dict())
    scenario = prepare_scenario(configuration.load_config(where))
    rows = kept.metrics.filter((pl.col("split") == "personal") & (pl.col("metric") == "accuracy"))
    for i in range(3):  # what the run reported of a client is what its two halves answer now
        x, y = scenario.data.tensors(i, "personal")
        found = (kept.model(client=i)(x).argmax(1) == y).double().mean().item()
        last = rows.filter((pl.col("client") == i) & (pl.col("round") == 2))["value"].item()
        assert found == pytest.approx(last)


def test_pool_needs_one_feature_size():
    with pytest.raises(UserError, match=r"model\.feature_dim"):
        play("fedgkt", "model.pool=[mlp,mlp_small]")
    pool = ("model.pool=[mlp,mlp_small,mlp_wide]", "model.feature_dim=16")
    assert play("fedgkt", *pool).strategy.inbox.failures["replies"] == 0
