"""FedD2S: which layers take part when, that the others get nothing from the federation, and its rules by hand."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from fedfuse import UserError
from fedfuse.cli import main
from fedfuse.strategies.fedd2s import active, federated, followed, representation
from fedfuse.train.losses import loss
from fedfuse.wire.records import InvalidArrays, record, tensors
from tests.federations import answer, federation, intercept, play
from tests.halves import PLAIN, client, final_states, server, shares, take, wake

DEEP = ("model=mlp", "strategy.tau=1")  # layers body.1, body.3, head; one leaves after each round


def test_the_deepest_active_layer_leaves_first_and_none_comes_back():
    for depth, tau in ((3, 1), (5, 2), (1, 4)):
        sets = [set(range(1, active(depth, round, tau) + 1)) for round in range(1, 20)]
        assert sets[0] == set(range(1, depth + 1))
        for now, then in itertools.pairwise(sets):
            assert then <= now
            assert now - then <= {max(now)}
            assert then
        assert sets[-1] == {1}
    assert [active(5, round, 2) for round in range(1, 7)] == [5, 5, 4, 4, 3, 3]


def test_layers_are_followed_from_shallow_to_deep():
    for model in ("mlp", "cnn"):
        one = client("fedd2s", f"model={model}").model
        x = torch.randn(3, 1, 8, 8)
        given, logits = followed(one, 2, x)
        assert [h.shape[1] for h in given] == list(one.depths.values())[:2]
        torch.testing.assert_close(given[0], representation(one.body[:2](x) if model == "mlp" else one.body[0](x)))
        whole, _ = followed(one, len(one.depths), x)
        torch.testing.assert_close(whole[-1], logits)
        torch.testing.assert_close(logits, one(x))
    image = torch.tensor([[[[-3.0, 1.0], [5.0, 2.0]]]])
    assert representation(image).tolist() == [[2.0]]  # rectified first: (0 + 1 + 5 + 2)/4


def test_the_federations_term_by_hand():
    rng = np.random.default_rng(0)
    h = [rng.normal(size=(5, 3)), rng.normal(size=(5, 4))]
    w = [rng.normal(size=(3, 4)), np.eye(4)]
    q = rng.dirichlet(np.ones(4), (2, 4))
    y, held = np.array([0, 2, 3, 1, 2]), np.array([True, True, True, False])
    expected = 0.0
    for layer in (0, 1):
        z = h[layer] @ w[layer]
        log = z - np.log(np.exp(z).sum(1, keepdims=True))
        for i in range(5):
            if held[y[i]]:
                p = q[layer, y[i]]
                expected += (p * (np.log(p) - log[i])).sum() / 5
    heads = [lambda x: x @ torch.tensor(w[0]), lambda x: x]
    given = [torch.tensor(one) for one in h]
    got = federated(heads, given, torch.tensor(y), torch.tensor(q), torch.tensor(held), loss("kl"))
    assert got.item() == pytest.approx(expected, rel=1e-12)
    none = federated(heads, given, torch.tensor(y), torch.tensor(q), torch.zeros(4, dtype=torch.bool), loss("kl"))
    assert none == 0


@pytest.mark.parametrize(("round", "reached"), [(1, 3), (2, 2), (3, 1), (9, 1)])
def test_a_dropped_layer_gets_no_gradient_from_the_federation(round, reached):
    one = client("fedd2s", *DEEP, round=round)
    q = torch.randn(3, 10, 10).softmax(2)
    given, _ = followed(one.model, one._active, one.x)
    value = federated(one._heads, given, one.y, q, torch.ones(10, dtype=torch.bool), loss("kl"))
    value.backward()
    for depth, name in enumerate(one.model.depths):
        got = one.model.get_submodule(name).weight.grad
        if depth < reached:
            assert got.abs().sum() > 0
        else:
            assert got is None, name


def test_a_step_moves_dropped_layers_as_local_training_does():
    """The whole of `fit`, round 2 of three layers: μ changes the two that take part, and not the third."""
    q = torch.randn(3, 10, 10, generator=torch.Generator().manual_seed(0)).softmax(2)
    after = []
    for mu in (0, 5):
        one = client("fedd2s", *DEEP, *PLAIN, f"strategy.mu={mu}", round=2)
        take(one, "labels", q=q, held=torch.ones(10, dtype=torch.bool))
        one.fit()
        after.append(one.weights())
    moved = {name for name in after[0] if not torch.equal(after[0][name], after[1][name])}
    assert {"body.1.weight", "body.3.weight"} <= moved
    assert not {name for name in moved if name.startswith("head.")}


def test_without_the_divergence_it_is_local_training():
    """Heads read layers and do not shape them."""
    _, alone = final_states("local")
    _, free = final_states("fedd2s", "strategy.mu=0")
    _, taught = final_states("fedd2s", "strategy.mu=1")
    for own, other, third in zip(alone, free, taught, strict=True):
        own, other, third = (state.get("model", state) for state in (own, other, third))
        common = [name for name in own if name in other]
        assert len(common) == 4
        assert all(torch.equal(own[name], other[name]) for name in common)
        assert any(not torch.equal(own[name], third[name]) for name in common)


def test_what_a_client_says_is_a_mean_over_each_class():
    one = client("fedd2s", *DEEP, round=2)
    one.begin("train")
    sent = one.share()["layers"]
    given, _ = followed(one.model.eval(), 2, one.x)
    assert sent["h"].shape == (10, 128 + 64)
    assert sent["p"].shape == (2, 10, 10)
    for c in range(10):
        mine = one.y == c
        assert sent["counts"][c] == mine.sum()
        if mine.any():
            expected = torch.cat([h[mine].mean(0) for h in given])
            torch.testing.assert_close(sent["h"][c], expected, rtol=1e-4, atol=1e-5)
            soft = one.model.layer_heads[1](given[1][mine]).softmax(1).mean(0)
            torch.testing.assert_close(sent["p"][1, c], soft, rtol=1e-4, atol=1e-6)


def contents(count=2, classes=10, sizes=((3, 0, 5), (1, 2, 0))):
    """What two clients say of `count` layers of mlp_small (32, 10): classes 3 to 9 are held by nobody."""
    draw, out = torch.Generator().manual_seed(1), []
    for counts in sizes:
        widths = (32, 10)[:count]
        n = torch.zeros(classes, dtype=torch.int64)
        n[:3] = torch.tensor(counts)
        h = torch.randn(classes, sum(widths), generator=draw).relu() * (n > 0)[:, None]
        p = torch.randn(count, classes, classes, generator=draw).softmax(2) * (n > 0)[:, None]
        out.append({"layers": {"h": h, "p": p, "counts": n}})
    return out


def test_the_server_weighs_what_its_heads_say_by_examples():
    """Without an epoch of teaching g is what it was: q_l[c] = Σ_n |D_nc|·softmax g_l(h̄_nlc) / Σ_n |D_nc|."""
    built = server("fedd2s", "strategy.head_epochs=0")
    g = nn.Linear(32, 10)
    built.state["heads"] = {"0": {name: value.clone() for name, value in g.state_dict().items()}}
    sent = contents()
    built.fuse(shares(built, *sent))
    out = built.published("labels")
    assert out["held"].tolist() == [True] * 3 + [False] * 7
    for c, counts in enumerate(((3, 1), (0, 2), (5, 0))):
        said = torch.stack([g(one["layers"]["h"][c, :32]).softmax(0) for one in sent])
        expected = sum(n * p for n, p in zip(counts, said, strict=True)) / sum(counts)
        torch.testing.assert_close(out["q"][0, c], expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out["q"][1, :3], torch.full((3, 10), 0.1))  # a new g knows nothing


def test_the_servers_loss_by_hand(monkeypatch):
    """CE to the class plus λ·KL to the clients' mean soft label, over the pairs (n, c) that there are."""
    built, seen = server("fedd2s", "strategy.lam=0.7"), []
    monkeypatch.setattr(built, "distil", lambda g, x, y, loss, **o: seen.append((x, y, loss)) or g.state_dict())
    sent = contents()
    built.fuse(shares(built, *sent))
    x, y, step = seen[0]
    assert y.tolist() == [0, 2, 0, 1]
    z = torch.randn(4, 10, dtype=torch.float64)
    soft = [one["layers"]["p"][0].double().numpy() for one in sent]
    teacher = {0: (3 * soft[0][0] + soft[1][0]) / 4, 1: soft[1][1], 2: soft[0][2]}
    log = z.numpy() - np.log(np.exp(z.numpy()).sum(1, keepdims=True))
    ce = -np.mean([log[i, c] for i, c in enumerate(y.tolist())])
    kl = np.mean([(teacher[c] * (np.log(teacher[c]) - log[i])).sum() for i, c in enumerate(y.tolist())])
    assert step(z, y, torch.arange(4)).item() == pytest.approx(ce + 0.7 * kl, rel=1e-6)
    assert torch.equal(x[1], sent[0]["layers"]["h"][2, :32])


def test_a_class_nobody_holds_keeps_its_last_q_and_dropped_layers_are_not_sent():
    built = server("fedd2s", "strategy.tau=1")
    built.fuse(shares(built, *contents()))
    before = built.published("labels")
    built.round = 2
    built.messages(range(3), "train", {})
    built.fuse(shares(built, *contents(count=1, sizes=((0, 4, 0), (0, 1, 0)))))
    after = built.published("labels")
    assert after["q"].shape == (1, 10, 10)
    assert after["held"].tolist() == [True] * 3 + [False] * 7
    assert torch.equal(after["q"][0, [0, 2]], before["q"][0, [0, 2]])
    assert not torch.equal(after["q"][0, 1], before["q"][0, 1])
    built.fuse(shares(built))  # nobody: nothing to learn
    awake = wake(built)
    awake.round = 2
    assert awake._active == 1


def test_bytes_are_those_of_the_active_layers():
    played = play("fedd2s", "model=mlp", "strategy.tau=1")
    each = [sum(10 * (d + 10) * 4 for d in widths) + 8 * 10 for widths in ((128, 64, 10), (128, 64))]
    assert played.totals["up_bytes"] == 3 * sum(each)
    assert played.totals["down_bytes"] == 3 * (3 * 100 * 4 + 10)  # round 1's q, in round 2's message


def test_a_client_that_speaks_of_other_layers_is_left_out():
    with federation("fedd2s", "strategy.tau=1") as (built, _):

        def deeper(reply):
            sent = {key: value.clone() for key, value in tensors(reply.content["layers"]).items()}
            h, p = torch.cat([sent["h"], torch.zeros(10, 10)], 1), torch.cat([sent["p"]] * 2)
            return answer(reply, layers=record({**sent, "h": h, "p": p}))

        intercept(built, deeper, kind="train", round=2, client=1)
        built.run()
        assert built.strategy.inbox.failures["rejected"] == 1
        assert "2 layers, expected 1" in built.strategy.inbox.left_out[0]
        assert built.strategy.published("labels")["q"].shape[0] == 1


def test_what_does_not_fit_is_refused():
    built = server("fedd2s")
    scope = built.workspace.scope(0, built.hyper)
    (good, _) = contents()
    type(built).examine(scope, good)
    for change, said in (
        ({"counts": -good["layers"]["counts"]}, "negative"),
        ({"h": good["layers"]["h"][:, :-1]}, "41 columns for 2 layers, expected 42"),
        ({"p": 2 * good["layers"]["p"]}, "no distributions"),
    ):
        with pytest.raises(InvalidArrays, match=said):
            type(built).examine(scope, {"layers": {**good["layers"], **change}})


class Twice(nn.Module):
    """A network that uses one layer twice."""

    def __init__(self, classes):
        super().__init__()
        self.flat, self.step, self.head = nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.step(self.step(self.flat(x))).relu())


def twice(shape, classes):
    return Twice(classes)


def test_layers_that_cannot_be_ordered_are_refused_before_anything_runs(tmp_path, capsys):
    words = ["strategy=fedd2s", "model=custom", "model.build=tests.strategies.test_fedd2s:twice", "runtime=inline"]
    assert main(["run", *words, f"out={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err.strip()
    assert "layers of Twice cannot be ordered: step works 2 times" in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


def test_pools_are_refused_and_a_run_says_what_it_is():
    with pytest.raises(UserError, match="one architecture"):
        play("fedd2s", "model.pool=[mlp_small,mlp]")
    assert any("FedD2S-style: a reconstruction" in note for note in play("fedd2s", "rounds=1").notes)
