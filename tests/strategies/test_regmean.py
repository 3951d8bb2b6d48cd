"""RegMean against pooled least squares, its equal and singular Grams, its layers; Fisher merging beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedfuse.cli import main
from fedfuse.core.workspace import Workspace
from fedfuse.errors import UserError
from fedfuse.strategies import fisher, regmean
from fedfuse.train import curvature
from fedfuse.wire.records import InvalidArrays
from tests.federations import TINY, play, scenario_of
from tests.halves import server, shares, wake

ROWS, D, K = (40, 70, 55), 3, 6


def regressions(equal: bool = False):
    """Inputs X_i, targets Y_i of three clients whose inputs differ in scale and direction, and their own solutions."""
    draw = torch.Generator().manual_seed(1)
    xs, ys = [], []
    for i, n in enumerate(ROWS):
        x = torch.randn(n, K, generator=draw, dtype=torch.float64) * torch.arange(1, K + 1) ** (i / 2)
        x[:, 0] += i * x[:, 1]
        x = torch.linalg.qr(x)[0] if equal else x
        w = torch.randn(D, K, generator=draw, dtype=torch.float64)
        xs.append(x)
        ys.append(x @ w.T + 0.1 * torch.randn(n, D, generator=draw, dtype=torch.float64))
    own = [torch.linalg.lstsq(x, y).solution.T for x, y in zip(xs, ys, strict=True)]
    return xs, ys, own


def merged(xs, own, a=1.0, ridge=0.0, mean=False):
    """RegMean's server on what such clients send."""
    grams = [regmean.damped(x.T @ x / (len(x) if mean else 1), a, ridge) for x in xs]
    total = sum(regmean.unpacked(regmean.packed(g)) for g in grams)
    return regmean.solved(total, sum(w @ g for w, g in zip(own, grams, strict=True)), 1e-15)


def test_summed_grams_give_the_pooled_least_squares_where_means_and_the_plain_mean_do_not() -> None:
    xs, ys, own = regressions()
    pooled = torch.linalg.lstsq(torch.cat(xs), torch.cat(ys)).solution.T
    torch.testing.assert_close(merged(xs, own), pooled, rtol=0, atol=1e-10)
    assert float((merged(xs, own, mean=True) - pooled).abs().max()) > 0.01  # the released code
    assert float((sum(own) / 3 - pooled).abs().max()) > 0.1


@pytest.mark.parametrize(("a", "ridge"), [(1.0, 0.0), (0.9, 0.01)])
def test_equal_grams_give_the_plain_mean(a: float, ridge: float) -> None:
    xs, _, own = regressions(equal=True)
    torch.testing.assert_close(merged(xs, own, a, ridge), sum(own) / 3, rtol=0, atol=1e-10)


def test_equal_weights_stay_whatever_the_grams() -> None:
    xs, _, own = regressions()
    for a, ridge in ((1.0, 0.0), (0.1, 0.0), (0.9, 0.1)):
        torch.testing.assert_close(merged(xs, [own[0]] * 3, a, ridge), own[0], rtol=0, atol=1e-10)


def test_damping_by_hand() -> None:
    g = torch.tensor([[4.0, 2.0], [2.0, 8.0]])
    assert torch.allclose(regmean.damped(g, 0.5, 0.1), torch.tensor([[4.6, 1.0], [1.0, 8.6]]))
    assert regmean.packed(g).tolist() == [4.0, 2.0, 8.0]
    big = torch.arange(25.0).view(5, 5)
    big = big + big.T
    assert torch.equal(regmean.unpacked(regmean.packed(big)), big)


def test_the_diagonal_alone_weighs_entry_by_entry() -> None:
    g, p = torch.tensor([2.0, 4.0]), torch.tensor([[2.0, 8.0], [1.0, 4.0]])
    assert regmean.solved(g, p, 1e-7).tolist() == [[1.0, 2.0], [0.5, 1.0]]
    assert regmean.solved(torch.tensor([2.0, 0.0]), p, 1e-7) is None


def test_singular_grams_are_seen_at_every_scale() -> None:
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twin = torch.cat([x, 1e-4 * (x[:, :1] + x[:, 1:2])], 1)
    p = torch.ones(1, 5, dtype=torch.float64)
    assert regmean.solved(twin.T @ twin, p, 1e-9) is None
    small = torch.cat([x, 1e-4 * torch.randn(9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))], 1)
    assert regmean.solved(small.T @ small, p, 1e-9) is not None  # small is not singular


def test_a_singular_gram_is_named_by_its_layer_and_leaves_no_result(tmp_path, capsys) -> None:
    """It shows in the data, not in the words: exit 1, one line with what to set, and no summary."""
    words = ["strategy=regmean", "strategy.a=1", "strategy.ridge=0", "rounds=1", "data.limit=90", "clients=2"]
    words += ["train.epochs=0", "transfer.size=0", "runtime=inline", f"out={tmp_path / 'run'}"]
    assert main(["run", *words]) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("fedfuse: layer body.1: the sum of the clients' Gram matrices (64 × 64) is singular: set ")
    assert said.endswith("if they are, a client sent numbers beside which the others' vanish")
    assert (tmp_path / "run" / "config.yaml").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_what_a_client_sends_is_its_layers_grams_and_weights() -> None:
    strategy = server("regmean", "strategy.a=0.7", "strategy.ridge=0.02")
    client = wake(strategy)
    client.fit()
    sent, end = client.share(), client.weights()
    assert set(sent["rest"]) == {"body.1.bias", "head.bias"}
    x = client.x.flatten(1).double()
    g = x.T @ x
    g = 0.7 * g + torch.diag(0.3 * g.diagonal() + 0.02 * g.diagonal().mean())
    torch.testing.assert_close(regmean.unpacked(sent["gram"]["body.1.weight"].double()), g, rtol=1e-5, atol=1e-3)
    want = end["body.1.weight"].double() @ g
    torch.testing.assert_close(sent["product"]["body.1.weight"].double(), want, rtol=1e-5, atol=1e-3)
    diag = wake(server("regmean", "strategy.gram=diag", "strategy.ridge=0")).share()
    torch.testing.assert_close(diag["gram"]["body.1.weight"].double(), x.square().sum(0), rtol=1e-5, atol=1e-3)
    mean = wake(server("regmean", "strategy.weighting=uniform", "strategy.a=1", "strategy.ridge=0")).share()
    gram = regmean.unpacked(mean["gram"]["body.1.weight"].double())
    torch.testing.assert_close(gram, x.T @ x / len(x), rtol=1e-5, atol=1e-4)
    assert wake(strategy).model.training == client.model.training  # hooks and modes are as before
    assert not client.model.get_submodule("head")._forward_hooks


@pytest.mark.parametrize(("words", "lam"), [((), 0.3), (("strategy.lam=1",), 1.0)])
def test_a_round_of_the_server_against_its_formula(words: tuple[str, ...], lam: float) -> None:
    strategy = server("regmean", *words)
    start = {k: v.double() for k, v in strategy.model.items()}
    strategy.publish("model", start)
    strategy.round = 2
    draw, told = torch.Generator().manual_seed(3), []
    for n in ROWS:
        one: dict = {"gram": {}, "product": {}, "rest": {}}
        for name, old in strategy.model.items():
            w = torch.randn(old.shape, generator=draw, dtype=old.dtype)
            if not name.endswith("weight"):
                one["rest"][name] = w
                continue
            x = torch.randn(2 * n, old.shape[1], generator=draw, dtype=old.dtype)
            one["gram"][name], one["product"][name] = regmean.packed(x.T @ x), w @ (x.T @ x)
        told.append(one)
    strategy.fuse(shares(strategy, *told, examples=[3, 7, 5]))
    for name in ("body.1.weight", "head.weight"):
        g = sum(regmean.unpacked(one["gram"][name]) for one in told)
        want = torch.linalg.solve(g, sum(one["product"][name] for one in told).T).T
        torch.testing.assert_close(strategy.model[name], (1 - lam) * start[name] + lam * want, rtol=0, atol=1e-10)
    want = sum(n * one["rest"]["head.bias"] for n, one in zip((3, 7, 5), told, strict=True)) / 15
    torch.testing.assert_close(strategy.model["head.bias"], want, rtol=0, atol=1e-12)


def test_bytes_are_the_model_and_the_triangles() -> None:
    plain = play("fedavg").totals
    assert play("regmean").totals["up_bytes"] == plain["up_bytes"] + 6 * 4 * (64 * 65 // 2 + 32 * 33 // 2)
    assert play("regmean", "strategy.gram=diag").totals["up_bytes"] == plain["up_bytes"] + 6 * 4 * (64 + 32)
    assert play("regmean").totals["down_bytes"] == plain["down_bytes"]


def test_a_convolution_is_a_matrix_over_its_patches() -> None:
    torch.manual_seed(0)
    for options in ({"padding": 1}, {"stride": 2, "dilation": 2}, {}):
        layer = nn.Conv2d(2, 5, 3, bias=False, **options).double()
        x = torch.randn(4, 2, 9, 9, dtype=torch.float64)
        rows = curvature.inputs_of(layer, x)
        out = layer(x)
        want = out.permute(0, 2, 3, 1).reshape(-1, 5)
        torch.testing.assert_close(rows @ layer.weight.flatten(1).T, want, rtol=0, atol=1e-12)
    played = play("regmean", "model=cnn", "strategy.layers='body.*'", "rounds=1")
    assert played.strategy.inbox.failures["rejected"] == 0, played.strategy.inbox.left_out


def test_layers_that_cannot_be_merged_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.Conv1d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=2))
    model.append(nn.Linear(4, 4))
    model[4].weight = model[0].weight
    there = model.state_dict()
    for pattern, words in (
        ("1", "layer 1 is GroupNorm"),
        ("2", "layer 2 is Conv1d: a Gram matrix needs nn.Linear, or nn.Conv2d without groups"),
        ("3", "layer 3 is Conv2d"),
        ("4", "strategy.layers=4: 4 shares its weight with another layer"),
        ("nowhere", "no such layer; those with weights: 0, 1, 2, 3, 4"),
        ("auto", "strategy.layers=auto: no such layer"),
    ):
        with pytest.raises(UserError, match=words):
            regmean.layers(model, pattern, there)
    for options in ({"padding": "same"}, {"padding_mode": "circular", "padding": 1}):
        with pytest.raises(UserError, match="layer c is Conv2d"):
            curvature.check_layer("c", nn.Conv2d(2, 2, 3, **options))
    curvature.check_layer("c", nn.Conv2d(2, 2, 3))
    with pytest.raises(UserError, match=r"strategy.layers=body.7: no such layer; those with weights: body.1, head"):
        play("regmean", "strategy.layers=body.7")


def test_grams_that_are_no_sums_of_squares_are_refused() -> None:
    strategy = server("regmean")
    scope, client = strategy.workspace.scope(0, strategy.hyper), wake(server("regmean"))
    sent = client.share()
    strategy.examine(scope, sent)
    at = {"head.weight": 0}
    for place, value in ((0, -1.0), (1, 1e6)):
        bad = sent["gram"]["head.weight"].clone()
        bad[place] = value
        with pytest.raises(InvalidArrays, match=r"gram/head\.weight: no sum of squares and products"):
            strategy.examine(scope, {"gram": dict.fromkeys(at, bad)})
    assert strategy.discloses == ("second moments of features",)


# --- Fisher -------------------------------------------------------------------------------------------------


def network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    return model, torch.randn(7, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 2])


@pytest.mark.parametrize("expected", [True, False])
def test_fisher_is_the_mean_of_each_examples_square(expected: bool, monkeypatch) -> None:
    model, x, y = network()
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    model.eval()
    for i in range(len(x)):
        log_p = model(x[i : i + 1]).log_softmax(1)[0]
        for c in range(3):
            weight = float(log_p[c].detach().exp()) if expected else float(c == y[i])
            slopes = torch.autograd.grad(log_p[c], list(model.parameters()), retain_graph=True)
            for slot, slope in zip(want.values(), slopes, strict=True):
                slot += weight * slope**2 / len(x)
    model.train()
    for room in (2**22, 1):  # all at once, or one by one
        monkeypatch.setattr(curvature, "_ROOM", room)
        found = curvature.fisher(model, x, y, expected=expected)
        for name, value in found.items():
            torch.testing.assert_close(value, want[name], rtol=0, atol=1e-14)
    assert model[3].training
    nothing = curvature.fisher(model, x[:0], y[:0])
    assert all(not bool(value.any()) for value in nothing.values())
    model[1].requires_grad_(False)
    assert set(curvature.fisher(model, x, y)) == {"4.weight", "4.bias"}


def test_the_square_of_a_batchs_mean_gradient_vanishes_where_the_fisher_does_not() -> None:
    """The released code's: at an optimum it says that no weight matters."""
    model, x, y = (
        nn.Linear(2, 2, bias=False).double(),
        torch.ones(4, 2, dtype=torch.float64),
        torch.tensor([0, 1, 0, 1]),
    )
    nn.init.zeros_(model.weight)  # p = ½, as the labels have it
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [model.weight])
    assert float(slope.square().max()) == 0
    found = curvature.fisher(model, x, y, expected=False)["weight"]
    torch.testing.assert_close(found, torch.full((2, 2), 0.25, dtype=torch.float64))


def test_next_tokens_are_taken_one_by_one() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert int(x.max()) < 5  # as language models do, and vmap cannot
            return self.out(self.embed(x))

    torch.manual_seed(0)
    model, x = Words().double(), torch.tensor([[0, 1, 2], [3, 4, 1]])
    want = torch.zeros_like(model.out.weight)
    for row in x:
        logits = model(row[None])[:, :-1].flatten(0, 1)
        (slope,) = torch.autograd.grad(nn.functional.cross_entropy(logits, row[1:]), [model.out.weight])
        want += slope**2 / 2
    torch.testing.assert_close(curvature.fisher(model, x, x, expected=False)["out.weight"], want, rtol=0, atol=1e-14)


def fisher_server(fs, weighting="examples"):
    strategy = server("fisher", f"strategy.weighting={weighting}")
    start = {k: v.double() for k, v in strategy.model.items()}
    strategy.publish("model", start)
    strategy.round = 2
    draw, told, thetas = torch.Generator().manual_seed(2), [], []
    for i in range(3):
        theta = {k: torch.randn(v.shape, generator=draw, dtype=v.dtype) for k, v in start.items()}
        f = {k: fs(i, v, draw) for k, v in start.items()}
        told.append({"fisher": f, "scaled": {k: f[k] * theta[k] for k in f}, "rest": {}})
        thetas.append(theta)
    strategy.fuse(shares(strategy, *told, examples=[3, 7, 5]))
    return strategy.model, thetas, told


@pytest.mark.parametrize(("weighting", "n"), [("examples", (3, 7, 5)), ("uniform", (1, 1, 1))])
def test_fisher_merging_against_its_formula(weighting: str, n: tuple[int, ...]) -> None:
    def drawn(i, like, draw):
        return torch.rand(like.shape, generator=draw, dtype=like.dtype) * 10.0 ** (i - 4) + 1e-6

    model, thetas, told = fisher_server(drawn, weighting)
    for name, value in model.items():
        top = sum(k * one["fisher"][name] * theta[name] for k, one, theta in zip(n, told, thetas, strict=True))
        bottom = sum(k * one["fisher"][name] for k, one in zip(n, told, strict=True))
        torch.testing.assert_close(value, top / bottom, rtol=1e-12, atol=1e-12)


def test_where_no_example_moves_a_weight_it_is_the_mean_and_not_drawn_to_zero() -> None:
    """F = 0 at all: the released code's θ = Σ F θ / (Σ F + 1e-10) is 0."""
    client = wake(server("fisher", "strategy.scale=raw", "strategy.floor=1e-6"))
    client.load({name: torch.zeros_like(v) if name == "head.weight" else v for name, v in client.weights().items()})
    sent = client.share()  # a head of zeros: nothing below it moves the loss
    assert bool((sent["fisher"]["body.1.weight"] == 1e-6).all())
    assert bool((sent["fisher"]["head.bias"] > 1e-3).all())
    model, thetas, _ = fisher_server(lambda i, like, draw: torch.full_like(like, 1e-6))
    for name, value in model.items():
        want = sum(k * theta[name] for k, theta in zip((3, 7, 5), thetas, strict=True)) / 15
        torch.testing.assert_close(value, want, rtol=0, atol=1e-12)


def test_a_client_sends_f_and_f_times_its_weights() -> None:
    client = wake(server("fisher", "strategy.samples=5", "strategy.scale=raw", "strategy.floor=1e-6"))
    client.fit()
    sent, end = client.share(), client.weights()
    draw = client.generator("fisher")
    rows = torch.randperm(len(client.x), generator=draw)[:5].sort().values
    want = curvature.fisher(client.model, client.x[rows], client.y[rows])
    for name, value in sent["fisher"].items():
        torch.testing.assert_close(value.double(), want[name].clamp_min(1e-6), rtol=1e-4, atol=1e-9)
        assert torch.equal(sent["scaled"][name], value * end[name])
    as_is = ("strategy.scale=raw", "strategy.floor=1e-6")
    everyone = wake(server("fisher", "strategy.samples=null", "strategy.labels=data", *as_is))
    all_rows = curvature.fisher(everyone.model, everyone.x, everyone.y, expected=False)
    torch.testing.assert_close(
        everyone.share()["fisher"]["head.bias"].double(), all_rows["head.bias"].clamp_min(1e-6), rtol=1e-4, atol=1e-9
    )


def test_a_clients_fisher_has_root_mean_square_one() -> None:
    """Over all its parameters together: 3, 4 and ten zeros have √(25/12); where all are zeros they stay."""
    f = {"a": torch.tensor([[3.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([4.0] + 7 * [0.0])}
    found = fisher.scaled(f)
    torch.testing.assert_close(found["a"][0, 0].item(), 3 / (25 / 12) ** 0.5)
    torch.testing.assert_close(found["b"][0].item(), 4 / (25 / 12) ** 0.5)
    nothing = {"a": torch.zeros(2)}
    assert torch.equal(fisher.scaled(nothing)["a"], torch.zeros(2))


def test_how_well_a_client_fits_its_examples_does_not_weigh() -> None:
    """Gradients a hundred times smaller, F ten thousand times: what is sent is the same by default, and not raw."""
    sent, real = {}, fisher.curvature.fisher
    for how in ("alike", "raw"):
        client = wake(server("fisher", f"strategy.scale={how}", "strategy.floor=1e-12", "strategy.samples=null"))
        before = client.share()["fisher"]["head.bias"]
        with pytest.MonkeyPatch.context() as patched:
            smaller = lambda *a, **k: {n: v / 1e4 for n, v in real(*a, **k).items()}  # noqa: E731
            patched.setattr(fisher.curvature, "fisher", smaller)
            sent[how] = before, client.share()["fisher"]["head.bias"]
    torch.testing.assert_close(*sent["alike"], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(sent["raw"][0] / 1e4, sent["raw"][1], rtol=1e-4, atol=1e-9)


def test_below_its_root_mean_square_a_weight_is_averaged_plainly() -> None:
    sent = wake(server("fisher")).share()["fisher"]
    least = min(value.min().item() for value in sent.values())
    assert least == 1.0
    assert max(value.max().item() for value in sent.values()) > 3


def test_fisher_refuses_what_is_no_square() -> None:
    strategy = server("fisher")
    scope = strategy.workspace.scope(0, strategy.hyper)
    strategy.examine(scope, {"fisher": {"a": torch.tensor([1.0, 1e-6])}})
    for bad in (0.0, -1.0):
        with pytest.raises(InvalidArrays, match="fisher/a: not positive"):
            strategy.examine(scope, {"fisher": {"a": torch.tensor([1.0, bad])}})


def test_a_fisher_over_all_tokens_of_a_vocabulary_is_refused() -> None:
    for labels in ("expected", "data"):
        config, scenario = scenario_of((*TINY, "strategy=fisher", f"strategy.labels={labels}"))
        data = scenario.data
        texts = replace(scenario, data=replace(data, dataset=replace(data.dataset, next_token=True)))
        workspace = Workspace(texts)
        if labels == "expected":
            with pytest.raises(UserError, match=r"strategy\.labels=expected: .* allowed: data"):
                fisher.Fisher(config.strategy, workspace)
        else:
            fisher.Fisher(config.strategy, workspace)


def test_what_is_no_parameter_is_averaged_by_examples() -> None:
    strategy, told = server("fisher"), []
    for value in (1.0, 5.0):
        like = {name: torch.ones_like(v) for name, v in strategy.model.items() if name != "head.bias"}
        told.append({"fisher": like, "scaled": like, "rest": {"head.bias": torch.full((10,), value)}})
    strategy.fuse(shares(strategy, *told, examples=[30, 10]))
    assert torch.equal(strategy.published("model")["head.bias"], torch.full((10,), 2.0))
    assert set(strategy.published("model")) == set(strategy.model)
