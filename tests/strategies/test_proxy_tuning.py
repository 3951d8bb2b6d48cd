"""Proxy-tuning: what is added to a large model's logits, in closed form; and that nothing of it travels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedfuse.errors import UserError
from fedfuse.strategies.proxy_tuning import GRID, by_perplexity, divergence, fused, searched
from tests.federations import federation, play
from tests.halves import server
from tests.strategies.test_fedmkt import words  # noqa: F401  (a fixture)

DRAW = torch.Generator().manual_seed(5)


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAW, dtype=torch.float64)


def test_one_expert_is_a_difference_of_logits() -> None:
    large, base, expert = logits(4, 5), logits(4, 5), logits(1, 4, 5)
    one = torch.ones(1, 4, dtype=torch.float64)
    assert torch.allclose(fused(large, base, expert, one, 1.0), large + expert[0] - base)
    assert torch.equal(fused(large, base, expert, one, 0.0), large)
    assert torch.allclose(fused(base, base, expert, one, 1.0), expert[0])  # a large model that is the base
    two, w = logits(2, 4, 5), torch.tensor([[0.2], [0.8]], dtype=torch.float64).expand(2, 4)
    want = large + 0.5 * (0.2 * (two[0] - base) + 0.8 * (two[1] - base))
    assert torch.allclose(fused(large, base, two, w, 0.5), want)


def test_the_dynamic_weight_moves_the_large_model_as_far_as_the_small_one() -> None:
    base, expert = logits(6, 5), logits(1, 6, 5)
    one = torch.ones(1, 6, dtype=torch.float64)
    assert torch.allclose(fused(base, base, expert, one, None), expert[0])  # α = 1 where large is the base
    large, shift = logits(6, 5), expert[0] - base
    moved = divergence(expert[0], base)
    found = searched(large, shift, moved)
    for row in range(6):
        p0 = large[row].softmax(0)
        misses = []
        for alpha in GRID.tolist():
            p = (large[row] + alpha * shift[row]).softmax(0)
            misses.append(((p * (p / p0).log()).sum() - moved[row]).square().item())
        assert found[row].item() == GRID[misses.index(min(misses))].item()
    assert torch.allclose(fused(large, base, expert, one, None), large + found[:, None] * shift)
    assert searched(large, torch.zeros_like(large), torch.zeros(6, dtype=torch.float64)).tolist() == [0.0] * 6
    assert (GRID[0].item(), GRID[-1].item(), len(GRID)) == (0.0, 2.0, 21)


def test_several_experts_move_it_by_their_mean_distance() -> None:
    large, base, experts = logits(3, 4), logits(3, 4), logits(2, 3, 4)
    w = torch.tensor([[0.3], [0.7]], dtype=torch.float64).expand(2, 3)
    moved = 0.3 * divergence(experts[0], base) + 0.7 * divergence(experts[1], base)
    shift = 0.3 * (experts[0] - base) + 0.7 * (experts[1] - base)
    want = large + searched(large, shift, moved)[:, None] * shift
    assert torch.allclose(fused(large, base, experts, w, None), want)


def test_each_expert_has_an_alpha_of_its_own() -> None:
    large, base, experts = logits(3, 4), logits(3, 4), logits(2, 3, 4)
    w = torch.tensor([[0.3], [0.7]], dtype=torch.float64).expand(2, 3)
    alphas = [searched(large, one - base, divergence(one, base)) for one in experts]
    assert not torch.equal(*alphas)
    want = large + sum(w[k, 0] * alphas[k][:, None] * (experts[k] - base) for k in range(2))
    assert torch.allclose(fused(large, base, experts, w, None, apart=True), want)
    assert not torch.allclose(fused(large, base, experts, w, None), want)
    # where large is the base, each α is 1 and the experts' logits are averaged
    assert torch.allclose(fused(base, base, experts, w, None, apart=True), 0.3 * experts[0] + 0.7 * experts[1])
    one = torch.ones(1, 3, dtype=torch.float64)
    assert torch.equal(fused(large, base, experts[:1], one, None, apart=True),
                       fused(large, base, experts[:1], one, None))  # fmt: skip
    assert torch.equal(fused(large, base, experts, w, 0.5, apart=True), fused(large, base, experts, w, 0.5))


def test_weights_by_perplexity_of_what_was_read() -> None:
    z, tokens = logits(2, 1, 3, 4), torch.tensor([[2, 0, 3]])
    w = by_perplexity(z, tokens, tau=0.5)
    log_p = z.log_softmax(-1)
    assert w[:, 0, 0].tolist() == [0.5, 0.5]  # nothing is told yet
    ce = [[-log_p[k, 0, 0, 0].item(), -(log_p[k, 0, 0, 0] + log_p[k, 0, 1, 3]).item() / 2] for k in range(2)]
    for place in (1, 2):
        e = [math.exp(-ce[k][place - 1] / 0.5) for k in range(2)]
        assert w[:, 0, place].tolist() == pytest.approx([one / sum(e) for one in e])
    later = z.clone()
    later[:, :, 2] += logits(2, 1, 4)  # what the last place says is of a token that nobody has read
    assert torch.equal(by_perplexity(later, tokens, 0.5), w)


@pytest.mark.parametrize("weights", ["uniform", "perplexity"])
def test_experts_of_texts_weigh_alike_or_by_perplexity(weights: str) -> None:
    strategy = server("proxy_tuning", "strategy.alpha=0.7")
    tau = {"tau": 0.5} if weights == "perplexity" else {}
    strategy.hyper = replace(strategy.hyper, experts="each", weights=weights, **tau)
    (large, base), experts, tokens = logits(2, 2, 3, 5), logits(3, 2, 3, 5), torch.tensor([[2, 0, 3], [1, 1, 4]])
    w = by_perplexity(experts, tokens, 0.5) if weights == "perplexity" else torch.full((3, 2, 3), 1 / 3)
    want = large + 0.7 * sum(w[k][..., None] * (experts[k] - base) for k in range(3))
    found = strategy.together([large, base, *experts], tokens)
    torch.testing.assert_close(found, want.float())


@pytest.mark.parametrize("name", ["proxy_tuning", "fedet"])
def test_the_large_model_is_a_network_of_images_where_they_are_larger_than_eight(name: str, tmp_path) -> None:
    for shape, large in (((3,), "mlp_wide"), ((1, 8, 9), "cnn_large")):
        folder = tmp_path / "x".join(map(str, shape))
        folder.mkdir()
        rows = np.random.default_rng(0).random((80, *shape)).astype("float32")
        np.savez(folder / "data.npz", x=rows, y=np.arange(80) % 2)
        data = ("data=npz", f"data.root={folder}", "transfer.size=8", "data.limit=60", "data.test_limit=null")
        assert server(name, *data).large == large
    assert server(name).large == "mlp_wide"  # digits: 8 × 8


def test_with_the_clients_own_architecture_it_is_federated_averaging() -> None:
    plain = play("fedavg", "clients=2")
    proxy = play("proxy_tuning", "clients=2", "strategy.large=mlp_small")
    assert proxy.strategy.model.keys() == plain.strategy.model.keys()
    assert all(torch.equal(proxy.strategy.model[name], value) for name, value in plain.strategy.model.items())
    strategy = proxy.strategy
    x = strategy.workspace.tensors("test")[0][:7]
    with torch.no_grad():
        want = strategy.workspace.loaded("mlp_small", strategy.model).eval()(x)
    large = strategy.workspace.loaded(*strategy.server_models()["large"])
    for _ in range(2):  # the network still holds the large model
        assert torch.allclose(strategy.predict(large, x, 3), want, atol=1e-5)
    assert proxy.federation.headline["accuracy/global"] == pytest.approx(plain.federation.headline["accuracy/global"])


def test_nothing_of_the_large_model_travels() -> None:
    small = play("proxy_tuning", "strategy.large=mlp_small")
    large = play("proxy_tuning", "strategy.large=mlp_wide")
    weights = sum(v.nbytes for v in small.strategy.model.values())
    for one in (small, large):
        assert one.totals["up_bytes"] == one.totals["down_bytes"] == 2 * 3 * weights
    assert small.digest == large.digest
    assert set(large.strategy.board.items) == {("model", "")}


def test_every_client_may_be_an_expert() -> None:
    with federation("proxy_tuning", "strategy.experts=each", "strategy.alpha=0.5", "rounds=1") as (built, _):
        built.run()
        strategy = built.strategy
    assert len(strategy.members()) == 3
    x = strategy.workspace.tensors("test")[0][:5]

    def said(name: str, arrays) -> torch.Tensor:
        with torch.no_grad():
            return strategy.workspace.loaded(name, arrays).eval()(x).double().clone()

    base, big = said("mlp_small", strategy.workspace.initial("mlp_small")), strategy.server_models()["large"]
    experts = torch.stack([said("mlp_small", arrays) for arrays in strategy.members()])
    want = said(*big) + 0.5 * (experts - base).mean(0)
    assert torch.allclose(strategy.predict(strategy.workspace.loaded(*big), x, 2).double(), want, atol=1e-5)
    # what is published is their mean, by examples
    counts = [strategy.scenario.examples(c) for c in range(3)]
    for name, value in strategy.model.items():
        mean = sum(n * m[name].double() for n, m in zip(counts, strategy.members(), strict=True)) / sum(counts)
        assert torch.allclose(value.double(), mean, atol=1e-6)


def test_refusals(words) -> None:  # noqa: F811
    for word in ("strategy.experts=each", "strategy.alpha=null"):
        with pytest.raises(UserError, match=r"search=together is of several experts: set strategy.experts=each"):
            play("proxy_tuning", "strategy.search=together", word)
    base = (*words, "model.pool=[causal_lm]")
    with pytest.raises(UserError, match=r"large=null: name the server's language model, as causal_lm@<word>"):
        play("proxy_tuning", "model.paths={}", base=base)
    with pytest.raises(UserError, match=r"strategy\.large=causal_lm@own: causal_lm has another vocabulary"):
        play("proxy_tuning", "strategy.large=causal_lm@own", base=base)
    with pytest.raises(UserError, match=r"weights=perplexity weighs several experts of texts"):
        play("proxy_tuning", "strategy.weights=perplexity", "strategy.experts=each")
    with pytest.raises(UserError, match=r"weights=perplexity weighs several experts of texts"):
        play("proxy_tuning", "strategy.weights=perplexity", "strategy.large=causal_lm", "model.paths={}", base=base)


def test_texts_by_experts_weighed_by_perplexity(words) -> None:  # noqa: F811
    base = (*words, "model.pool=[causal_lm@own]", "rounds=1", "strategy.large=causal_lm@own", "strategy.experts=each")
    scores = [
        play("proxy_tuning", *more, base=base).federation.headline["bits_per_byte/global"]
        for more in (
            (), ("strategy.weights=perplexity", "strategy.tau=0.05"), ("strategy.alpha=null",),
            ("strategy.alpha=null", "strategy.search=together"),
        )
    ]  # fmt: skip
    assert all(math.isfinite(score) for score in scores)
    assert scores[2] == scores[0]  # the large model is the base: each α is 1
    assert len(set(scores)) == 3
