"""Objectives whose teachers stand row by row: of several clients at once they have the bits of each one's own."""

from __future__ import annotations

import pytest
import torch

from fedfuse.config.schema import TrainConfig
from fedfuse.seeding import generator
from fedfuse.train import abreast_steps, row_targets
from fedfuse.train.divergences import KL
from fedfuse.train.losses import loss
from tests.train.test_abreast import abreast, examples, net, same

torch.set_num_threads(1)

ROW_BY_ROW = [("kl", {"temperature": 3.0, "weight": 0.3}), ("reverse_kl", {}), ("js", {"weight": 2.0}),
              ("soft_ce", {"temperature": 1.5}), ("mae", {}), ("ttm", {})]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), ROW_BY_ROW)
@pytest.mark.parametrize("given", ["logits", "probabilities", "softened"])
def test_teachers_by_row_are_compared_with_at_once(name, options, given, monkeypatch):
    at_once = []
    real = row_targets.losses_of

    def watched(losses, out, rows):
        found = real(losses, out, rows)
        at_once.append(found is not None)
        return found

    monkeypatch.setattr(abreast_steps, "losses_of", watched)
    teachers = [4 * torch.randn(40, 8, generator=generator("teacher", k)) for k in range(3)]
    teachers[1][3, 2] = -torch.inf

    def own(k):
        made = loss(name, **options)
        if given == "logits":
            return made.towards_logits(teachers[k])
        return made.towards(teachers[k].softmax(1), softened=2.0 if given == "softened" else 1.0)

    config = TrainConfig(lr=0.5, batch_size=10, momentum=0.9)
    data = [(examples(n, 64, 8, k)[0], None) for k, n in enumerate((20, 32, 17))]
    assert same(*abreast(net(64, 33, 8), data, own=own, config=config))
    if name == "mae" and given != "logits":
        assert not at_once  # probabilities are compared
    else:
        assert set(at_once) == {True, False}  # 17 leaves 7 · 8 numbers, the last of which torch may round otherwise


def test_an_objective_with_a_way_of_its_own_is_asked_client_by_client():
    class Doubled(KL):
        def value(self, student, teacher, labels):
            return 2 * super().value(student, teacher, labels)

    teacher = torch.randn(40, 8)
    assert row_targets.kind_of(KL().towards(teacher)) is not None
    for own in (Doubled(), loss("wttm"), loss("mse"), loss("taid")):
        assert row_targets.kind_of(own.towards(teacher)) is row_targets.kind_of(own.towards_logits(teacher)) is None
    assert row_targets.kind_of(KL().towards(teacher)) != row_targets.kind_of(KL(2.0).towards(teacher))
    assert row_targets.kind_of(KL()) is None
    looks = KL()
    looks.prior = torch.ones(8)  # which may be another client's
    assert row_targets.kind_of(looks.towards(teacher)) is None


def test_losses_and_gradients_are_those_of_the_formula_and_none_where_numbers_are_left_over():
    z, teachers = torch.randn(2, 4, 4, requires_grad=True), [torch.randn(6, 4), torch.randn(6, 4)]
    rows = [torch.tensor([5, 0, 3, 3]), torch.tensor([1, 2, 4, 0])]
    made = [loss("mae", weight=0.5).towards_logits(t) for t in teachers]
    found = row_targets.losses_of(made, z, rows)
    apart = torch.stack([t[r] for t, r in zip(teachers, rows, strict=True)])
    assert torch.allclose(found, 0.5 * (z.detach() - apart).abs().mean((1, 2)))
    assert torch.allclose(z.grad, 0.5 * (z.detach() - apart).sign() / 16)
    z.grad = None
    assert row_targets.losses_of(made, z[:, :3], [r[:3] for r in rows]) is None, "12 numbers"
    assert row_targets.losses_of([loss("mae").towards_logits(torch.randn(6, 2))] * 2, z, rows) is None, "other classes"
    assert z.grad is None
    soft = [loss("kl", temperature=2.0).towards(t.softmax(1)) for t in teachers]
    assert row_targets.kind_of(soft[0]) == row_targets.kind_of(soft[1]) is not None
    assert row_targets.kind_of(soft[0]) != row_targets.kind_of(loss("kl", temperature=2.0).towards_logits(teachers[0]))
    assert row_targets.kind_of(soft[0]) != row_targets.kind_of(soft[0].loss.towards(teachers[0], softened=2.0))
    assert row_targets.kind_of(soft[0]) != row_targets.kind_of(soft[0].loss.towards(teachers[0][:, :3]))
    assert row_targets.kind_of(loss("mae").towards(teachers[0])) is None, (
        "probabilities are compared in a way of its own"
    )
    assert row_targets.kind_of(loss("mae").towards_logits(teachers[0])) is not None
