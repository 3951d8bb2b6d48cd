"""Leading singular triples: randomised against exact, of factors without their product, and what is never held."""

from __future__ import annotations

import pytest
import torch

from fedfuse.train import svd
from fedfuse.train.basis import basis_of, energy, first_steps, joint, told


def falling(d: int, k: int, rank: int = 40) -> torch.Tensor:
    """A matrix whose singular values halve."""
    draw = torch.Generator().manual_seed(d + k)
    u, _ = torch.linalg.qr(torch.randn(d, rank, generator=draw, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(k, rank, generator=draw, dtype=torch.float64))
    return u * 0.5 ** torch.arange(rank) @ v.T


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_randomised_triples_are_the_exact_ones_where_the_spectrum_falls(shape: tuple[int, int]) -> None:
    matrix = falling(*shape)
    exact, fast = svd.leading(matrix, 6), svd.leading(matrix, 6, "randomised")
    for one, other in zip(exact, fast, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-8
    u, s, vt = fast
    assert torch.allclose(s, 0.5 ** torch.arange(6, dtype=torch.float64))
    assert (u.T @ u - torch.eye(6)).abs().max() < 1e-12
    assert (vt @ vt.T - torch.eye(6)).abs().max() < 1e-12
    again = svd.leading(matrix, 6, "randomised")
    torch.manual_seed(5)  # nobody's generator matters
    assert all(torch.equal(one, other) for one, other in zip(again, svd.leading(matrix, 6, "randomised"), strict=True))


def test_a_flat_spectrum_costs_little_energy() -> None:
    signs = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).sign()
    best, near = (energy(signs, u, vt) for u, _, vt in (svd.leading(signs, 8, way) for way in ("exact", "randomised")))
    assert 0.95 * best < near <= best + 1e-12


def test_auto_is_exact_for_small_layers_and_where_much_is_wanted() -> None:
    small, large = falling(80, 70), falling(svd.LARGE, svd.LARGE + 9)
    assert torch.equal(svd.leading(small, 4, "auto")[0], svd.leading(small, 4)[0])
    assert torch.equal(svd.leading(large, 4, "auto")[0], svd.leading(large, 4, "randomised")[0])
    assert not torch.equal(svd.leading(large, 4, "auto")[0], svd.leading(large, 4)[0])
    much = svd.LARGE // 4
    assert torch.equal(svd.leading(large, much, "auto")[0], svd.leading(large, much)[0])
    assert torch.equal(svd.leading(small, 65, "randomised")[0], svd.leading(small, 65)[0])  # nothing to be saved


def test_factors_have_the_triples_of_their_product() -> None:
    draw = torch.Generator().manual_seed(0)
    b, a = torch.randn(30, 5, generator=draw).double(), torch.randn(5, 44, generator=draw).double()
    for one, other in zip(svd.leading(b @ a, 4), svd.of_factors((b, a), 4), strict=True):
        assert (one - other).abs().max() < 1e-10
    assert torch.allclose(svd.square_norm((b, a)), svd.square_norm(b @ a))


def clients(count: int, d: int = 40, k: int = 30) -> tuple[list[dict], torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    gradients = [torch.randn(d, 2, generator=draw) @ torch.randn(2, k, generator=draw) for _ in range(count)]
    sent = [told({"l": g}, 3.0 + i, 6) for i, g in enumerate(gradients)]
    return sent, sum(gradients).double() / sum(3.0 + i for i in range(count))  # type: ignore[union-attr]


@pytest.mark.parametrize("init", ["raw_grad", "sign_grad"])
@pytest.mark.parametrize("count", [2, 7])
def test_sketches_side_by_side_are_their_sum(init: str, count: int) -> None:
    sent, mean = clients(count)
    found = joint(sent)["l"]
    assert isinstance(found, tuple) == (6 * count < 30)  # thinner than the layer
    product = found[0] @ found[1] if isinstance(found, tuple) else found
    assert (product - mean).abs().max() < 1e-5
    arrays, latents, captured = basis_of(first_steps({"l": found}, init, 0.5), 3)
    plain, plain_latents, plain_captured = basis_of(first_steps({"l": product}, init, 0.5), 3)
    for one, other in ((arrays, plain), (latents, plain_latents)):
        assert all((one[name] - other[name]).abs().max() < 1e-5 for name in other)
    assert captured["l"] == pytest.approx(plain_captured["l"], abs=1e-9)


def test_layers_are_made_one_at_a_time() -> None:
    held: list[str] = []

    class Layers(dict):
        def items(self):
            for name in super().copy():
                held.append(name)
                yield name, self[name]

    steps = first_steps(Layers(a=torch.ones(4, 3), b=torch.ones(4, 3)), "sign_grad", 1.0)
    assert held == []
    next(steps)
    assert held == ["a"]
