"""FedDF in closed form: the ensemble, its students by architecture, and FedAvg as the limit."""

import numpy as np
import pytest
import torch

from fedfuse.errors import UserError
from fedfuse.strategies.feddf import cosine
from tests.federations import play
from tests.halves import server, shares

POOL = "model.pool=[mlp,mlp_small,mlp_wide]"


def variants(strategy, architecture, count):
    """Models of one architecture, a little apart."""
    start = strategy.workspace.initial(architecture)
    draw = torch.Generator().manual_seed(5)
    return [
        {"model": {k: v + 0.2 * torch.randn(v.shape, generator=draw) for k, v in start.items()}} for _ in range(count)
    ]


def logits_of(strategy, architecture, arrays):
    x, _ = strategy.workspace.tensors("transfer")
    return strategy.predict(strategy.workspace.loaded(architecture, arrays), x, 512).double()


def test_no_distillation_is_fedavg():
    assert play("feddf", "strategy.distill_epochs=0").digest == play("fedavg").digest


@pytest.mark.parametrize("ensemble", ["logit", "prob"])
def test_the_ensemble_is_the_mean_of_all_teachers(ensemble, monkeypatch):
    strategy = server("feddf", f"strategy.ensemble={ensemble}")
    models, seen = variants(strategy, "mlp_small", 3), {}
    outputs = torch.stack([logits_of(strategy, "mlp_small", m["model"]) for m in models])
    monkeypatch.setattr(strategy, "distilled", lambda name, student, x, y, teacher: seen.update(t=teacher) or student)
    strategy.fuse(shares(strategy, *models))
    expected = outputs.mean(0) if ensemble == "logit" else outputs.softmax(2).mean(0)
    np.testing.assert_allclose(seen["t"], expected, rtol=1e-4, atol=1e-5)


def test_one_student_an_architecture_taught_by_all(monkeypatch):
    strategy = server("feddf", POOL)
    names = ("mlp", "mlp_small")  # nobody with mlp_wide took part
    models = [variants(strategy, name, 1)[0] for name in names]
    outputs = torch.stack([logits_of(strategy, n, m["model"]) for n, m in zip(names, models, strict=True)])
    seen = {}
    monkeypatch.setattr(
        strategy, "distilled", lambda name, student, x, y, teacher: seen.update({name: (student, teacher)}) or student
    )
    initial = strategy.workspace.initial("mlp_wide")
    strategy.fuse(shares(strategy, *models))
    assert sorted(seen) == ["mlp", "mlp_small", "mlp_wide"]
    for student, teacher in seen.values():
        np.testing.assert_allclose(teacher, outputs.mean(0), rtol=1e-4, atol=1e-5)
        assert student
    assert all(torch.equal(v, initial[k]) for k, v in seen["mlp_wide"][0].items())
    assert all(torch.allclose(v, models[0]["model"][k]) for k, v in seen["mlp"][0].items())
    assert sorted(strategy.server_models()) == ["mlp", "mlp_small", "mlp_wide"]


def test_of_two_architectures_each_has_its_own_student():
    strategy = server("feddf", "model.pool=[mlp_small,mlp]", "strategy.distill_epochs=0")
    models = [variants(strategy, name, 1)[0] for name in ("mlp_small", "mlp")]
    strategy.fuse(shares(strategy, *models))
    for name, sent in zip(("mlp_small", "mlp"), models, strict=True):
        assert all(torch.equal(strategy.published("model", name)[key], value) for key, value in sent["model"].items())


def test_students_begin_as_the_mean_weighted_by_examples_and_teachers_count_alike(monkeypatch):
    strategy = server("feddf")
    models, seen = variants(strategy, "mlp_small", 3), {}
    outputs = torch.stack([logits_of(strategy, "mlp_small", m["model"]) for m in models[:2]])
    monkeypatch.setattr(
        strategy, "distilled", lambda name, student, x, y, teacher: seen.update(s=student, t=teacher) or student
    )
    strategy.fuse(shares(strategy, *models, examples=[10, 30, 0]))
    np.testing.assert_allclose(seen["t"], outputs.mean(0), rtol=1e-4, atol=1e-5)
    for key, value in seen["s"].items():
        wanted = (10 * models[0]["model"][key].double() + 30 * models[1]["model"][key].double()) / 40
        torch.testing.assert_close(value, wanted.float())


def test_averaging_probabilities_is_averaging_losses():
    """Gradients of the mean of KLs and of the KL to the mean are equal: `prob` is the code's avg_losses."""
    teachers = torch.randn(4, 6, 5, dtype=torch.float64).softmax(2)
    z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def kl(p):
        return (p * (p.log() - z.log_softmax(1))).sum(1).mean()

    (one,) = torch.autograd.grad(torch.stack([kl(p) for p in teachers]).mean(), z)
    (other,) = torch.autograd.grad(kl(teachers.mean(0)), z)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_distilling_moves_the_student_to_the_ensemble():
    strategy = server("feddf", "strategy.distill_epochs=40", "strategy.distill_lr=0.01")
    models = variants(strategy, "mlp_small", 3)
    teacher = torch.stack([logits_of(strategy, "mlp_small", m["model"]) for m in models]).mean(0).log_softmax(1)
    mean = {k: torch.stack([m["model"][k] for m in models]).mean(0) for k in models[0]["model"]}

    def distance(arrays):
        return (teacher.exp() * (teacher - logits_of(strategy, "mlp_small", arrays).log_softmax(1))).sum(1).mean()

    strategy.fuse(shares(strategy, *models))
    assert distance(strategy.model) < 0.2 * distance(mean)


def test_clients_without_examples_neither_count_nor_teach():
    fused = []
    for place in (1, 2):
        strategy = server("feddf")
        said = variants(strategy, "mlp_small", 3)
        strategy.fuse(shares(strategy, said[0], said[place], examples=(10, 0)))
        fused.append(strategy.model)
    assert all(torch.equal(v, fused[1][k]) for k, v in fused[0].items())


def test_cosine():
    assert cosine(0.1, 0, 10) == pytest.approx(0.1)
    assert cosine(0.1, 5, 10) == pytest.approx(0.05)
    assert 0 < cosine(0.1, 9, 10) < 0.003


def test_pool_of_three_reports_each_architecture():
    done = play("feddf", POOL, "strategy.distill_epochs=1")
    assert done.federation.headline["accuracy/global"] > 0
    assert done.totals["up_bytes"] == done.totals["down_bytes"]


LABELLED = ("transfer.labelled=true", "strategy.validation=0.5")


@pytest.mark.parametrize("option", ["drop_worst=true", "patience=5"])
def test_validation_needs_labels_at_the_server(option):
    with pytest.raises(UserError, match=rf"strategy\.{option} needs labels at the server"):
        server("feddf", f"strategy.{option}")


def test_validation_rows_are_fixed_and_not_distilled():
    strategy = server("feddf", *LABELLED, "strategy.drop_worst=true")
    one = strategy.rows
    strategy.round = 5
    for first, later in zip(one, strategy.rows, strict=True):
        assert torch.equal(first, later)
    assert torch.equal(torch.cat(one).sort().values, torch.arange(24))
    assert [len(rows) for rows in one] == [12, 12]
    assert [len(rows) for rows in server("feddf", "transfer.labelled=true").rows] == [24, 0]  # nothing reads them


@pytest.mark.parametrize(("share", "total", "kept"), [(0.1, 5, 1), (0.3, 7, 2), (0.5, 3, 1)])
def test_validation_takes_its_share_rounded_down_and_at_least_one_row(monkeypatch, share, total, kept):
    strategy = server("feddf", "transfer.labelled=true", f"strategy.validation={share}", "strategy.drop_worst=true")
    monkeypatch.setattr(strategy.workspace, "tensors", lambda split: (torch.zeros(total, 1), None))
    assert [len(rows) for rows in strategy.rows] == [total - kept, kept]


def test_models_at_chance_neither_teach_nor_are_averaged(monkeypatch):
    strategy = server("feddf", *LABELLED, "strategy.drop_worst=true")
    models, seen = variants(strategy, "mlp_small", 3), {}
    found = iter([0.5, 0.119, 0.121])  # of ten classes: the second is below 1.2 times chance
    monkeypatch.setattr(strategy, "accuracy", lambda model: next(found))
    monkeypatch.setattr(
        strategy, "distilled", lambda name, student, x, y, teacher: seen.update(s=student, t=teacher) or student
    )
    strategy.fuse(shares(strategy, *models))
    rows = strategy.rows[0]
    kept = [models[0]["model"], models[2]["model"]]
    outputs = torch.stack([logits_of(strategy, "mlp_small", m)[rows] for m in kept]).mean(0)
    np.testing.assert_allclose(seen["t"], outputs, rtol=1e-4, atol=1e-5)
    for key, value in seen["s"].items():
        torch.testing.assert_close(value, (kept[0][key].double() + kept[1][key].double()).float() / 2)
    assert [value for *_, name, value in strategy.logged if name == "dropped"] == [1]


def test_if_all_are_at_chance_nobody_is_dropped(monkeypatch):
    strategy = server("feddf", *LABELLED, "strategy.drop_worst=true", "strategy.distill_epochs=0")
    models = variants(strategy, "mlp_small", 3)
    monkeypatch.setattr(strategy, "accuracy", lambda model: 0.1)
    strategy.fuse(shares(strategy, *models))
    for key, value in strategy.model.items():
        mean = torch.stack([m["model"][key].double() for m in models]).mean(0)
        torch.testing.assert_close(value, mean.float())
    assert [value for *_, name, value in strategy.logged if name == "dropped"] == [0]


@pytest.mark.parametrize(("curve", "steps", "best"), [([0.2, 0.5, 0.4, 0.3, 0.9], 3, 1), ([0.2, 0.1, 0.1, 0.9], 2, 0)])
def test_a_student_that_gains_nothing_stops_and_its_best_is_kept(curve, steps, best, monkeypatch):
    """A batch an epoch: validated before the first step and after each; two steps without a gain end it."""
    options = ("strategy.patience=2", "strategy.distill_epochs=4", "strategy.distill_batch=12")
    strategy, seen = server("feddf", *LABELLED, *options), []

    def accuracy(model):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return curve[len(seen) - 1]

    monkeypatch.setattr(strategy, "accuracy", accuracy)
    strategy.fuse(shares(strategy, *variants(strategy, "mlp_small", 2)))
    assert len(seen) == steps + 1
    assert all(torch.equal(strategy.model[k], v) for k, v in seen[best].items())
    assert not torch.equal(seen[-1]["head.weight"], seen[best]["head.weight"])
    assert [value for *_, name, value in strategy.logged if name == "steps/mlp_small"] == [best]


def test_patience_beyond_the_budget_still_keeps_the_best():
    many, few = (play("feddf", *LABELLED, f"strategy.patience={p}", POOL) for p in (1000, 1))
    assert many.strategy.inbox.failures == few.strategy.inbox.failures == {"replies": 0, "rejected": 0, "retried": 0}
