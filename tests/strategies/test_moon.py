"""MOON: the contrastive term in closed form, the projection head, and what the term does to representations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fedfuse.strategies.moon import Projected, contrast
from tests.federations import play
from tests.halves import final_states, server, wake


def test_contrast_against_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    z, common, previous = (torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    tau, total = 0.5, 0.0
    for a, b, c in zip(z, common, previous, strict=True):
        near = math.exp(float(a @ b / a.norm() / b.norm()) / tau)
        far = math.exp(float(a @ c / a.norm() / c.norm()) / tau)
        total -= math.log(near / (near + far))
    assert float(contrast(z, common, previous, tau)) == pytest.approx(total / 5, rel=1e-12)


def test_contrast_at_its_limits() -> None:
    z = torch.eye(3, dtype=torch.float64)
    assert float(contrast(z, z, z, 0.5)) == pytest.approx(math.log(2))
    assert float(contrast(z, z, -z, 0.5)) == pytest.approx(math.log1p(math.exp(-4)))
    assert float(contrast(z, -z, z, 0.5)) == pytest.approx(math.log1p(math.exp(4)))
    assert math.isfinite(float(contrast(z, -z, z, 1e-4)))


def test_the_network_has_a_projection_head_under_its_output_layer() -> None:
    """PFLlib and FL-bench leave it out."""
    client = wake(server("moon"))
    model = client.model
    assert isinstance(model, Projected)
    x = client.x[:3]
    assert model.features(x).shape == (3, 256)
    torch.testing.assert_close(model(x), model.head(model.projection(model.encoder.features(x))))
    assert not any(name.startswith("encoder.head") for name in client.weights())
    assert not isinstance(wake(server("moon", "strategy.projection=0")).model, Projected)


def test_initial_projection_depends_on_the_seed_alone() -> None:
    first, again, other = server("moon"), server("moon", "rounds=3"), server("moon", "seed=1")
    assert torch.equal(first.model["projection.0.weight"], again.model["projection.0.weight"])
    assert not torch.equal(first.model["projection.0.weight"], other.model["projection.0.weight"])


def test_without_the_term_and_the_projection_it_is_fedavg() -> None:
    ours = play("moon", "strategy.mu=0", "strategy.projection=0").strategy.model
    theirs = play("fedavg").strategy.model
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_layers_that_fedavg_has_not_are_told() -> None:
    (said,) = server("moon", "strategy.mu=0").notes()
    assert "strategy.projection=256 adds layers" in said
    assert server("moon", "strategy.projection=0").notes() == []
    assert set(server("moon", "strategy.mu=0").model) != set(server("fedavg").model)


def test_the_previous_model_is_the_clients_own_last_one() -> None:
    strategy, states = final_states("moon")
    assert all(set(state["previous"]) == set(strategy.model) for state in states)
    assert not torch.equal(states[0]["previous"]["head.weight"], states[1]["previous"]["head.weight"])
    assert not torch.equal(states[0]["previous"]["head.weight"], strategy.model["head.weight"])


def test_the_first_round_adds_a_constant_only() -> None:
    plain = wake(server("moon", "strategy.mu=0"))
    loss = plain.fit()["loss"]
    client = wake(server("moon", "strategy.mu=2"))
    assert client.fit()["loss"] == pytest.approx(loss + 2 * math.log(2), rel=1e-4)


def test_the_term_keeps_representations_near_the_common_ones() -> None:
    """With a strong term the trained z stay nearer to z_glob than to z_prev, compared with training without."""
    near = {}
    for mu in (0.0, 20.0):
        built = server("moon", f"strategy.mu={mu}", "train.epochs=10")
        previous = {
            k: v + 0.2 * torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
            for k, v in built.model.items()
        }
        client = wake(built, state={"previous": previous})
        common = client.embed(client.x)
        client.load(previous)
        far = client.embed(client.x)
        client.load(client.start)
        client.fit()
        z = client.embed(client.x)
        near[mu] = float((F.cosine_similarity(z, common) - F.cosine_similarity(z, far)).mean())
    assert near[20.0] > near[0.0]


def test_a_model_without_features_is_refused_in_words() -> None:
    from fedfuse.errors import UserError

    with pytest.raises(UserError, match=r"features\(x\)"):
        server("moon", "model=custom", "model.build=tests.halves:featureless")
