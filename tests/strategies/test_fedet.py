"""Fed-ET (reconstruction): confidence weights, consensus and diversity by hand; the common layer; pools."""

from __future__ import annotations

import torch

from fedfuse.config import registry
from fedfuse.strategies.fedet import consensus, layer, weights_of
from tests.federations import play
from tests.halves import server, wake

POOL = "model.pool=[mlp_small,mlp,mlp_wide]"


def test_confidence_is_the_variance_of_the_logits() -> None:
    logits = torch.tensor([[[2.0, 0.0, -2.0]], [[1.0, 0.0, -1.0]]], dtype=torch.float64)  # variances 8/3 and 2/3
    torch.testing.assert_close(weights_of(logits), torch.tensor([[0.8], [0.2]], dtype=torch.float64))
    torch.testing.assert_close(weights_of(torch.zeros(4, 2, 3)), torch.full((4, 2), 0.25))


def test_weights_ignore_a_common_shift() -> None:
    logits = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights_of(logits), weights_of(logits + 7))
    torch.testing.assert_close(weights_of(logits).sum(0), torch.ones(5, dtype=torch.float64))


def test_consensus_and_those_who_disagree() -> None:
    """Two confident clients outvote two hesitant ones; only the latter make the diversity term."""
    z = torch.tensor([[4.0, 0.0, -4.0], [4.0, 0.0, -4.0], [0.0, 1.0, -1.0], [-1.0, 1.0, 0.0]], dtype=torch.float64)[
        :, None
    ]
    label, diverse, there = consensus(z)
    a = weights_of(z)[:, 0]
    assert label.tolist() == [0]
    assert there.tolist() == [True]
    expected = ((a[2] * z[2, 0] + a[3] * z[3, 0]) / (a[2] + a[3])).softmax(0)
    torch.testing.assert_close(diverse[0], expected)


def test_unanimity_has_no_diversity_term() -> None:
    z = torch.tensor([[[3.0, 0.0]], [[1.0, 0.0]]], dtype=torch.float64)
    _, diverse, there = consensus(z)
    assert there.tolist() == [False]
    assert bool(torch.isfinite(diverse).all())


def test_the_large_models_common_layer_goes_to_every_architecture() -> None:
    strategy = play("fedet", POOL).strategy
    large = layer(strategy.state["large"])
    assert set(large) == {"common.weight", "common.bias"}
    for name in strategy.names:
        sent = strategy.published("model", name)
        assert all(torch.equal(sent[key], value) for key, value in large.items())
    start = layer(strategy.workspace.initial(strategy.large))
    assert not torch.equal(start["common.weight"], large["common.weight"])


def test_the_layers_put_in_pass_on_what_the_encoder_says() -> None:
    """Rows differ behind them about as much as before: what is a sixth of that, networks do not learn from in time."""
    strategy = server("fedet", "model=mlp")
    model = strategy.workspace.loaded("mlp", strategy.workspace.initial("mlp"))
    x = strategy.workspace.tensors("transfer")[0]
    with torch.no_grad():
        before, after = model.encoder.features(x), model.features(x)
    assert (after.var(0).sum() > 0.3 * before.var(0).sum()).item()


def test_without_distillation_models_are_fedavgs_within_an_architecture() -> None:
    """The common layer is then the mean of all: with one architecture everything is its mean."""
    strategy = play("fedet", "strategy.distill_epochs=0", "rounds=1").strategy
    shares = []
    for client in range(3):
        built = server("fedet", "strategy.distill_epochs=0", "rounds=1")
        awake = wake(built, client)
        n = awake.fit()["num-examples"]
        shares.append((n, awake.weights()))
    total = sum(n for n, _ in shares)
    for name, value in strategy.model.items():
        mean = sum(n * arrays[name].double() for n, arrays in shares) / total
        torch.testing.assert_close(value, mean.float(), rtol=1e-5, atol=1e-6)


def test_the_server_scores_a_larger_model() -> None:
    strategy = play("fedet", "strategy.large=mlp_wide").strategy
    ((architecture, arrays),) = strategy.server_models().values()
    assert architecture == "mlp_wide"
    assert sum(v.numel() for v in arrays.values()) > sum(v.numel() for v in strategy.model.values())


def test_the_diversity_term_changes_the_large_model_only_where_somebody_disagrees() -> None:
    with_term, without = (play("fedet", f"strategy.lam={lam}").strategy.state["large"] for lam in (1.0, 0.0))
    assert any(not torch.equal(v, without[k]) for k, v in with_term.items())


def test_the_large_model_repeats_the_consensus_on_its_own_rows() -> None:
    """Its paper's effort is not known; ten steps of the clients' SGD left it at one class for all rows."""
    strategy = server("fedet", "transfer.size=100", "strategy.lam=0")
    x, _ = strategy.workspace.tensors("transfer")
    teacher = torch.randn(x[0].numel(), 10, generator=torch.Generator().manual_seed(1))
    label = ((x - x.mean(0)).flatten(1) @ teacher).argmax(1)
    nobody = torch.zeros(len(x), dtype=torch.bool)
    taught = strategy._teach(x, label, torch.zeros(len(x), 10, dtype=torch.float64), nobody)
    predicted = strategy.predict(strategy.workspace.loaded(strategy.large, taught), x, 64).argmax(1)
    assert (predicted == label).double().mean() > 0.6
    assert predicted.unique().numel() > 4


def test_it_says_that_it_is_a_reconstruction() -> None:
    listed = registry.listed()["fedet"]
    assert "reconstruction" in listed.summary
    assert "reconstruction" in listed.paper


def test_a_client_without_examples_neither_counts_nor_teaches() -> None:
    from fedfuse.core.strategy import Share, Shares

    strategy = server("fedet", "strategy.distill_epochs=1")
    strategy.round, strategy.outbox.groups = 1, {0: 0, 1: 0}
    strong = {k: v + 100 for k, v in strategy.model.items()}
    told = [(strategy.model, 5), (strong, 0)]
    shares = [Share(i, {"model": arrays}, {"num-examples": n}) for i, (arrays, n) in enumerate(told)]
    before = {k: v.clone() for k, v in strategy.model.items() if not k.startswith("common.")}
    strategy.fuse(Shares(iter(shares), {}))
    assert all(torch.equal(strategy.model[k], v) for k, v in before.items())


def test_of_two_architectures_each_has_its_own_model() -> None:
    strategy = server("fedet", "model.pool=[mlp_small,mlp]")
    for name in ("mlp_small", "mlp"):
        sent = strategy.published("model", to=name)
        assert all(torch.equal(sent[key], value) for key, value in layer(strategy.state["large"]).items())
    small, other = ({k: v.shape for k, v in strategy.published("model", to=n).items()} for n in ("mlp_small", "mlp"))
    assert small != other
