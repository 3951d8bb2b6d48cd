"""FedOV's terms and its vote in closed form; what destroys images; what the released code chose on test is not read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedfuse.errors import UserError
from fedfuse.strategies import fedov
from fedfuse.train import training
from tests.federations import play
from tests.halves import PLAIN, server, shares, wake

ONCE = ("rounds=1", "train.epochs=1", "strategy.distill_epochs=1")


def t(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_label_is_first_and_the_unknown_second() -> None:
    z, y = t([2.0, -1.0, 0.5, 0.3], [0.0, 1.5, -2.0, 1.0]), torch.tensor([0, 2])
    first = -(z[0, 0] - z[0].logsumexp(0)) - (z[1, 2] - z[1].logsumexp(0))
    rest = -(z[0, 3] - z[0, 1:].logsumexp(0)) - (z[1, 3] - z[1, [0, 1, 3]].logsumexp(0))
    torch.testing.assert_close(fedov.own_loss(z, y), (first + rest) / 2, rtol=1e-12, atol=1e-12)


def test_features_are_mixed_across_classes_alone() -> None:
    h, y = t([1.0, 0.0], [0.0, 4.0], [2.0, 2.0]), torch.tensor([0, 0, 1])
    got = fedov.mixed(h, y, torch.tensor([1, 2, 0]), t([0.5, 0.25, 0.75])[0])
    torch.testing.assert_close(got, t([1.5, 2.5], [1.75, 1.5]), rtol=0, atol=0)
    assert len(fedov.mixed(h, y, torch.tensor([1, 0, 2]), t([0.5, 0.5, 0.5])[0])) == 0


def test_the_vote_by_hand() -> None:
    p = torch.stack([
        t([0.1, 0.2, 0.7], [0.6, 0.3, 0.1]),
        t([0.5, 0.1, 0.4], [0.2, 0.3, 0.5]),
        t([0.3, 0.4, 0.3], [0.1, 0.1, 0.8]),
    ])  # fmt: skip
    torch.testing.assert_close(fedov.open_vote(p, 1), t([3 / 7, 4 / 7], [2 / 3, 1 / 3]), rtol=1e-12, atol=0)
    torch.testing.assert_close(fedov.open_vote(p, 2), t([8 / 13, 5 / 13], [8 / 14, 6 / 14]), rtol=1e-12, atol=0)
    everybody = p[..., :-1].sum(0)
    torch.testing.assert_close(fedov.open_vote(p, 9), everybody / everybody.sum(1, keepdim=True))


def test_who_knows_nothing_of_a_row_is_not_asked() -> None:
    sure, clueless = t([0.9, 0.05, 0.05]), t([0.0, 1e-9, 1 - 1e-9])
    assert fedov.open_vote(torch.stack([clueless, sure]), 1).argmax(1).tolist() == [0]


@pytest.mark.parametrize("kind", fedov.KINDS)
def test_what_destroys_an_image_changes_every_row_and_stays_finite(kind: str) -> None:
    x = torch.rand(40, 2, 8, 10, generator=draw(1)) + torch.linspace(0, 1, 10)
    out = fedov.destroyed(x, kind, draw(2))
    assert out.shape == x.shape
    assert bool(torch.isfinite(out).all())
    assert bool((out != x).flatten(1).any(1).all())
    assert torch.equal(out, fedov.destroyed(x, kind, draw(2)))
    assert not torch.equal(out, fedov.destroyed(x, kind, draw(3)))


def test_what_each_kind_leaves() -> None:
    x = torch.rand(200, 1, 12, 12, generator=draw(1)) + 0.1
    gone = (fedov.destroyed(x, "erase", draw()) == 0).double().mean((1, 2, 3))
    assert 0.28 < float(gone.min()) <= float(gone.max()) < 0.56  # 0.33 to 0.5, in whole pixels
    blurred = fedov.destroyed(x, "blur", draw())
    torch.testing.assert_close(blurred.mean((1, 2, 3)), x.mean((1, 2, 3)), rtol=0.1, atol=0)
    assert float(blurred.var((1, 2, 3)).max()) < 0.05 * float(x.var((1, 2, 3)).min())
    turned = {float(torch.rot90(x[0], k, (1, 2)).sub(fedov.destroyed(x[:1], "rotate", draw(s))[0]).abs().max()) < 1e-4
              for s in range(9) for k in (1, 2, 3)}  # fmt: skip
    assert True in turned
    moved = fedov.destroyed(x, "cut", draw())
    assert 0.05 < float((moved != x).double().mean()) < 0.34
    crop = fedov.destroyed(x, "crop", draw())
    assert float(crop.max()) <= float(x.max())


def test_each_row_is_destroyed_in_its_own_way() -> None:
    x, rng = torch.rand(30, 2, 8, 10, generator=draw(1)), draw(4)
    kinds, want = torch.randint(5, (30,), generator=rng), x.clone()
    assert len(kinds.unique()) == 5
    for i, kind in enumerate(fedov.KINDS):
        want[kinds == i] = fedov.destroyed(x[kinds == i], kind, rng)
    assert torch.equal(fedov.outliers(x, draw(4)), want)


def test_a_blur_is_a_gaussian_of_each_rows_own_width() -> None:
    x = torch.rand(3, 1, 30, 40, generator=draw(1), dtype=torch.float64)
    sigma = torch.empty(3, 1, 1).uniform_(10, 100, generator=draw(2)).flatten().double().numpy()
    found = fedov.destroyed(x, "blur", draw(2))
    for image, width, got in zip(x[:, 0].numpy(), sigma, found[:, 0].numpy(), strict=True):
        down, across = (
            np.array([[np.exp(-((i - j) ** 2) / (2 * width**2)) for j in range(size)] for i in range(size)])
            for size in image.shape
        )
        down, across = down / down.sum(1, keepdims=True), across / across.sum(1, keepdims=True)
        np.testing.assert_allclose(got, down @ image @ across.T, rtol=1e-5)


def test_one_step_is_the_gradient_of_the_five_terms() -> None:
    words = ("strategy.adversarial_steps=2", "strategy.adversarial_step=0.03", "strategy.lam=0.5", "train.epochs=1")
    half = wake(server("fedov", *PLAIN, *words))
    model, x, y = half.model, half.x, half.y
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    rng, n = half.generator("outliers"), len(y)
    order = next(iter(_order(half)))
    x, y = x[order], y[order]
    nobody = torch.full((n,), 10)
    strange = fedov.outliers(x, rng)
    beta, partner = torch.rand(n, generator=rng), torch.randperm(n, generator=rng)
    z = fedov.opened(model, model.features(x))
    value = F.cross_entropy(z, y) + F.cross_entropy(z - 1e4 * F.one_hot(y, 11), nobody)
    value = value + F.cross_entropy(fedov.opened(model, model.features(strange)), nobody)
    features, apart = model.features(x), y != y[partner]
    between = beta[:, None] * features + (1 - beta)[:, None] * features[partner]
    value = value + 0.5 * F.cross_entropy(fedov.opened(model, between[apart]), nobody[apart])
    for _ in range(2):
        strange = strange.detach().requires_grad_()
        F.cross_entropy(fedov.opened(model, model.features(strange)), nobody).backward()
        strange = strange + 0.03 * strange.grad.sign()
    value = value + F.cross_entropy(fedov.opened(model, model.features(strange.detach())), nobody)
    names, values = zip(*model.named_parameters(), strict=True)
    slopes = torch.autograd.grad(value, values)
    half.fit()
    for name, slope in zip(names, slopes, strict=True):
        want = start[name] - half.training.lr * slope
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), want, rtol=1e-4, atol=1e-6)


def _order(half):
    yield from training.batches(len(half.y), 1000, 1, half.seed, "train", half.client, half.round)


def test_clients_find_the_unknown_unknown() -> None:
    half = wake(server("fedov", "train.epochs=30", "partition=shards", "strategy.adversarial_steps=1"))
    half.fit()
    x, y = half.workspace.tensors("test")
    known = torch.isin(y, half.y.unique())
    with torch.no_grad():
        p = fedov.opened(half.model, half.model.features(x)).softmax(1)[:, -1]
    assert float(p[~known].mean()) > float(p[known].mean()) + 0.2


def test_the_student_learns_the_vote_and_reads_no_test_set() -> None:
    strategy = server("fedov", *ONCE, "strategy.distill_epochs=3")
    models = [dict(wake(strategy, who).share()["model"]) for who in range(3)]
    before = dict(strategy.model)
    strategy.fuse(shares(strategy, *({"model": m} for m in models)))
    assert any(not torch.equal(v, before[k]) for k, v in strategy.model.items())
    # the released code tries m = 1 … 10 on the test set and distils on its images
    assert play("fedov", *ONCE).digest == play("fedov", *ONCE, "data.test_limit=30").digest


def test_further_rounds_are_said() -> None:
    assert play("fedov", *ONCE).strategy.notes() == []
    (said,) = play("fedov", *ONCE, "rounds=2").strategy.notes()
    assert "rounds=2 is no one shot" in said


def test_clients_without_examples_do_not_vote() -> None:
    first, second = server("fedov", *ONCE), server("fedov", *ONCE)
    models = [{"model": {k: v + i for k, v in first.model.items()}} for i in range(3)]
    first.fuse(shares(first, *models, examples=[5, 0, 7]))
    second.fuse(shares(second, models[0], models[2], examples=[5, 7]))
    assert all(torch.equal(v, second.model[k]) for k, v in first.model.items())


def test_what_is_no_image_is_refused(tmp_path) -> None:
    rows = np.random.default_rng(0).normal(size=(80, 3)).astype("float32")
    np.savez(tmp_path / "table.npz", x=rows, y=np.arange(80) % 2)
    with pytest.raises(UserError, match="fedov destroys images, data=npz has features"):
        server("fedov", "data=npz", f"data.root={tmp_path}", "transfer.size=8", "data.limit=60", "data.test_limit=null")
