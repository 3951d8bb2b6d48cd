"""`distil.*`: the user's word goes before a strategy's own, at clients and server; notes where it cannot do much."""

import pytest
import torch

from fedfuse.config.schema import DistilConfig, TrainConfig
from fedfuse.core.client import transfer_rows
from fedfuse.core.fit import remarks
from fedfuse.errors import UserError
from fedfuse.train import training
from fedfuse.train.distil import Effort, chosen, happens, plan
from tests.federations import federation, play
from tests.halves import client, random_labels, server, shares, take

TRAIN = TrainConfig(lr=0.3, optimizer="sgd")


def test_rate_and_optimiser_by_precedence():
    own = Effort(3, 64, 0.01, "adam")
    for asked, name, lr in (
        (DistilConfig(), "adam", 0.01),
        (DistilConfig(lr=0.2), "adam", 0.2),
        (DistilConfig(optimizer="sgd"), "sgd", 0.3),  # local training's
        (DistilConfig(optimizer="adamw"), "adamw", 0.001),  # nobody's: its usual rate
        (DistilConfig(optimizer="adamw", lr=0.7), "adamw", 0.7),
    ):
        config, size = chosen(asked, own, TRAIN)
        assert (config.optimizer, config.lr, size) == (name, lr, 64)
    config, size = chosen(DistilConfig(batch_size=7), Effort(3, 64), TRAIN)
    assert (config.optimizer, config.lr, size) == ("sgd", 0.3, 7)


def test_epochs_and_steps():
    assert plan(DistilConfig(), Effort(3, 64), TRAIN, 100)["epochs"] == 3
    assert plan(DistilConfig(epochs=5), Effort(3, 64), TRAIN, 100)["epochs"] == 5
    assert plan(DistilConfig(), Effort(None, 64, steps=40), TRAIN, 100)["epochs"] == 20  # two steps a pass
    assert plan(DistilConfig(), Effort(None, 64, steps=40), TRAIN, 6400)["epochs"] == 1
    options = plan(DistilConfig(steps=5), Effort(3, 64), TRAIN, 100)
    assert options["epochs"] == 3
    assert [options["after_step"](done, 6) for done in (4, 5)] == [False, True]
    assert [happens(DistilConfig(steps=s, epochs=e), own) for s, e, own in ((None, None, 0), (None, 0, 3))] == [
        False
    ] * 2
    assert happens(DistilConfig(steps=1), 0)
    assert happens(DistilConfig(epochs=1), 0)


@pytest.mark.parametrize("name", ["knfu", "fedmd", "dsfl", "ktpfl", "cfd", "scarlet", "selectivefd", "feddf", "fedet"])
def test_every_distillation_does_as_many_steps_as_asked(name, monkeypatch):
    """Also at the server; private training goes on as it did."""
    found, original = [], training.train

    def counted(*args, **options):
        result = original(*args, **options)
        if "after_step" in options and result["steps"]:
            found.append((result["steps"], len(args[1])))
        return result

    monkeypatch.setattr(training, "train", counted)
    every_row = {
        "scarlet": ("transfer.subset=24",),
        "selectivefd": ("strategy.client_quantile=null", "strategy.server_threshold=null"),
    }
    whole = every_row.get(name, ())
    play(name, "distil.steps=3", "distil.batch_size=10", *whole)
    rows = {n for _, n in found}
    distilled = [steps for steps, n in found if n <= 24]
    assert distilled, rows
    assert set(distilled) == {3}
    one = play(name, "distil.optimizer=adam", *whole).digest
    assert one != play(name, "distil.optimizer=adamw", "distil.lr=0.02", *whole).digest


def test_no_batch_is_smaller_than_a_loss_can_take(monkeypatch):
    asked, half = [], client("fedmd")
    half.begin("receive")
    monkeypatch.setattr("fedfuse.core.client.plan", lambda *words: (asked.append(words[-1]), plan(*words))[1])
    x, y = half.workspace.transfer(half.subset(None))
    few = {"epochs": 0, "batch_size": 8}
    half.distil(lambda logits, labels, rows: logits.sum(), x, y, **few)
    for least in (5, 1):
        monkeypatch.setattr(half.loss("kl"), "min_batch", least)
        half.distil(lambda logits, labels, rows: logits.sum(), x, y, **few)
    assert asked == [2, 5, 2]


def test_a_lesson_is_of_its_own_rounds_rows():
    half = client("fedmd", round=3)
    of = {round: transfer_rows(half.scenario, 8, round).tolist() for round in (3, 5)}
    assert of[3] != of[5]
    assert (half.subset(8).tolist(), half.subset(8, 5).tolist()) == (of[3], of[5])


def test_bad_values_are_refused():
    from fedfuse.config.compose import compose

    for word, said in (
        ("distil.optimizer=lion", "null, sgd, adam, adamw"),
        ("distil.lr=0", "more than 0"),
        ("distil.epochs=-1", "at least 0"),
    ):
        with pytest.raises(UserError, match=said):
            compose(["strategy=knfu", word])
    with pytest.raises(UserError, match=r"null beside distil\.epochs"):
        compose(["strategy=knfu", "distil.epochs=1", "distil.steps=2"])


def test_what_cannot_do_much_is_said():
    from fedfuse.config.compose import compose

    with pytest.raises(UserError, match=r"distil\.epochs=2 does nothing here"):
        compose(["strategy=fedavg", "distil.epochs=2"])
    with federation("scarlet") as (built, _):
        assert "distils 2 rows a round for 10 classes, which is few" in remarks(built.strategy)[0]
    with federation("fedmd", "transfer.size=100") as (built, _):
        assert remarks(built.strategy) == []
    with federation("fedavg", "train.epochs=0") as (built, _):
        assert remarks(built.strategy) == ["train.epochs=0: nobody trains on own examples"]
    with federation("fedavg", "train.epochs=0", "train.max_steps=1") as (built, _):
        assert remarks(built.strategy) == []


def test_what_stands_on_drawn_weights_is_said(tmp_path):
    said = "model=mlp_small: weights that nobody trains are random"
    with federation("fedit") as (built, _):
        assert said in remarks(built.strategy)[0]
        torch.save(dict(built.strategy.workspace.build("mlp_small").state_dict()), tmp_path / "base.pt")
    with federation("fedavg", "model.lora_rank=2") as (built, _):
        assert said in remarks(built.strategy)[0]
    for words in (("fedit", f"model.checkpoint={tmp_path / 'base.pt'}"), ("fedavg",), ("ties",)):
        with federation(*words) as (built, _):
            assert remarks(built.strategy) == []


def test_that_few_labels_are_known_is_said():
    with federation("kafal") as (built, _):
        few, unasked = remarks(built.strategy)
        assert "trains on labels.initial=0.1 of a client's examples" in few
        assert "learns from no label that it asks for: rounds=2" in unasked
    with federation("kafal", "labels.rounds=1") as (built, _):
        assert len(remarks(built.strategy)) == 1
    with federation("kafal", "labels.initial=1.0") as (built, _):
        assert remarks(built.strategy) == []


P = random_labels(24, 10).float()
ALL = torch.arange(24, dtype=torch.int32)
LESSONS = {
    "dsfl": ("labels", {"p": P}), "ktpfl": ("target", {"p": P}), "fedmd": ("consensus", {"logits": 3 * P}),
    "scarlet": ("cache", {"index": ALL, "p": P, "stamp": torch.ones_like(ALL)}),
    "selectivefd": ("ensemble", {"rows": ALL, "p": P}),
}  # fmt: skip


def moved_by_a_lesson(name, *words):
    """How far one step on the same soft labels moves the weight that it moves most."""
    own = ("strategy.subset=24",) if name == "scarlet" else ()
    half = client(name, "distil.steps=1", "distil.batch_size=24", *own, *words)
    before = half.weights()
    topic, arrays = LESSONS[name]
    take(half, topic, **arrays)
    return max(float((value - before[k]).abs().max()) for k, value in half.weights().items())


@pytest.mark.parametrize("name", ["dsfl", "ktpfl", "fedmd", "scarlet"])
def test_a_lesson_is_learned_by_adam_whatever_local_training_has(name):
    """Adam's first step moves a weight by its rate, however steep the loss; SGD's does not."""
    assert moved_by_a_lesson(name, "train.lr=0.05") == pytest.approx(1e-3, rel=1e-2)
    assert abs(moved_by_a_lesson(name, "train.lr=0.05", "distil.optimizer=sgd") - 1e-3) > 1e-4


def test_selective_fd_distils_at_a_rate_of_its_own():
    moved = moved_by_a_lesson("selectivefd", "train.lr=0.05")
    assert moved_by_a_lesson("selectivefd", "train.lr=0.3") == moved
    assert moved_by_a_lesson("selectivefd", "distil.lr=0.05") == pytest.approx(5 * moved, rel=1e-2)


@pytest.mark.parametrize("name", ["dsfl", "scarlet"])
def test_a_student_at_the_server_learns_by_adam_too(name):
    own = ("strategy.subset=24",) if name == "scarlet" else ()
    built = server(name, "strategy.distill_epochs=1", "train.lr=0.05", *own)
    before = built.state["model"]
    built.fuse(shares(built, {"labels": {"p": random_labels(24, 10).float()}}))
    moved = max(float((value - before[k]).abs().max()) for k, value in built.state["model"].items())
    assert moved == pytest.approx(1e-3, rel=1e-2)
