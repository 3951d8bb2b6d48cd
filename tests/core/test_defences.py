"""Robust rules on hand-made rows: what each promises, where it breaks, and equal rows give themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedfuse.config.compose import compose
from fedfuse.core.defences import RULES, cronus, geometric_median, least, median, trimmed_mean
from fedfuse.core.defended import Defended
from fedfuse.core.shares import Share
from fedfuse.errors import UserError, WorldError
from tests.federations import play
from tests.halves import random_labels, server

HONEST = torch.tensor([[0.9, 0.1], [1.0, 0.0], [1.1, -0.1], [1.0, 0.1], [0.9, 0.0], [1.1, 0.0], [1.0, -0.1]]).double()
ROBUST = [name for name in RULES if name != "mean"]
FAR = torch.tensor([1e6, -1e6], dtype=torch.float64)


def points(*rows: torch.Tensor) -> torch.Tensor:
    """Clients' rows (n × d) as points of one row each."""
    return torch.stack(list(rows))[:, None]


def shares(strategy, contents, examples=None):
    """Shares with all their records, as they come where a defence is on."""
    counts = examples or [10] * len(contents)
    return Defended(
        iter([Share(k, dict(c), {"num-examples": n}) for k, (c, n) in enumerate(zip(contents, counts, strict=True))]),
        strategy,
    )


@pytest.mark.parametrize("rule", RULES)
def test_equal_rows_give_themselves(rule: str) -> None:
    row = torch.tensor([[0.25, -3.0, 1e-3], [7.0, 0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(RULES[rule](row.expand(7, 2, 3).clone(), 1), row, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("rule", ROBUST)
def test_as_many_liars_as_reckoned_with_move_it_no_farther_than_the_honest(rule: str) -> None:
    """f = 1 of 8 at 10⁶: the result stays among the honest; the mean goes along."""
    x = points(*HONEST, FAR)
    out = RULES[rule](x, 1)[0]
    assert torch.all(out >= HONEST.min(0).values - 1e-3)
    assert torch.all(out <= HONEST.max(0).values + 1e-3)
    assert RULES["mean"](x, 1).abs().max() > 1e5


@pytest.mark.parametrize(
    ("rule", "f", "n"),
    [("median", 3, 7), ("geometric_median", 3, 7), ("trimmed_mean", 3, 7), ("krum", 2, 7), ("multi_krum", 2, 7),
     ("bulyan", 1, 7), ("cronus", 3, 7)],
)  # fmt: skip
def test_the_breakdown_point_is_as_promised(rule: str, f: int, n: int) -> None:
    """The largest f for n = 7 clients holds when liars agree on a far point; a majority of them takes any rule over."""
    assert least(rule, f) <= n < least(rule, f + 1) or least(rule, f) == 1
    held = RULES[rule](points(*HONEST[: n - f], *[FAR] * f), f)[0]
    assert (held - HONEST.mean(0)).norm() < 1.0
    taken = RULES[rule](points(*HONEST[: n - 4], *[FAR] * 4), f)[0]
    assert taken.abs().max() > 1e5


@pytest.mark.parametrize("f", [1, 2, 3])
@pytest.mark.parametrize(
    "rule", ["median", "geometric_median", "trimmed_mean", "krum", "multi_krum", "bulyan", "cronus"]
)
def test_the_fewest_clients_that_a_rule_asks_for_are_enough(rule: str, f: int) -> None:
    """f liars of just as many as docs/robustness.md says, agreed or each far off by itself: 2(n − f)/(n − 2f) radii."""
    n = {"krum": 2 * f + 3, "multi_krum": 2 * f + 3, "bulyan": 4 * f + 3}.get(rule, 2 * f + 1)
    assert least(rule, f) == (1 if "median" in rule else n)  # medians reckon with nobody, and break where most lie
    honest = torch.randn(n - f, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    centre = honest.mean(0)
    bound = 2 * (n - f) / (n - 2 * f) * (honest - centre).norm(dim=1).max()
    for lies in (torch.full((f, 4), 1e6).double(), 1e6 * torch.eye(4, dtype=torch.float64)[:f]):
        assert (RULES[rule](points(*honest, *lies), f)[0] - centre).norm() <= bound


def test_the_median_of_an_even_number_is_between() -> None:
    assert median(points(*torch.tensor([[1.0], [2.0], [4.0], [9.0]]).double())).item() == 3.0


def test_the_geometric_median_is_that_of_a_triangle_and_a_majority() -> None:
    """Of three corners 120° apart it is the centre (Fermat's point); where most agree, it is their point."""
    angles = torch.tensor([0.3, 0.3 + 2 * math.pi / 3, 0.3 + 4 * math.pi / 3], dtype=torch.float64)
    corners = torch.stack([5 + angles.cos(), -2 + angles.sin()], 1)
    torch.testing.assert_close(
        geometric_median(corners[:, None])[0], torch.tensor([5.0, -2.0]).double(), rtol=0, atol=1e-5
    )
    most = points(*[torch.zeros(2).double()] * 3, torch.tensor([9.0, 0.0]).double(), torch.tensor([0.0, 9.0]).double())
    assert geometric_median(most).norm() < 1e-6


@pytest.mark.parametrize("far", [1e8, 1e15, 3e38])
def test_how_far_off_liars_are_does_not_move_the_geometric_median(far: float) -> None:
    """Three of seven a thousand off, or as far as float32 goes."""
    lies = [torch.tensor([1.0, -1.0]).double() * 1e3] * 3
    near = geometric_median(points(*HONEST[:4], *lies))
    off = geometric_median(points(*HONEST[:4], *[lie * (far / 1e3) for lie in lies]))
    torch.testing.assert_close(off, near, rtol=0, atol=1e-3)


def test_a_client_on_the_centre_does_not_hold_the_geometric_median() -> None:
    """Where the iteration begins, at the coordinates' median, may lie a client; the least sum is elsewhere."""
    x = torch.tensor([[-4.0, 1, -7], [7, 1, -8], [9, 6, -7], [-4, 0, 7], [-4, 4, 9]]).double()[:, None]
    assert (median(x) == x[0]).all()
    found = geometric_median(x)
    gradient = torch.nn.functional.normalize(found - x, dim=-1).sum(0)
    assert gradient.norm() < 1e-4


def test_weiszfeld_stops_row_by_row() -> None:
    """A row's result does not depend on which rows stand beside it."""
    x = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = torch.cat([geometric_median(x[:, i : i + 1]) for i in range(6)])
    torch.testing.assert_close(geometric_median(x), alone, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", [7, 29, 100])
def test_the_trimmed_mean_cuts_f_at_both_ends(n: int) -> None:
    """Whatever f/n rounds to: 0.29·100 is 28.999…, of which Flower would cut 28."""
    x = torch.randperm(n, generator=torch.Generator().manual_seed(1)).double()[:, None, None] ** 2
    for f in range((n - 1) // 2 + 1):
        expected = np.mean(np.sort(x.numpy().ravel())[f : n - f])
        assert trimmed_mean(x, f).item() == pytest.approx(expected, rel=1e-14)


def reference(rows: np.ndarray, f: int) -> np.ndarray:
    """Cronus of one row as its rule says, with the covariance itself."""
    for _ in range(2):
        centred = rows - rows.mean(0)
        v = np.linalg.eigh(centred.T @ centred / len(rows))[1][:, -1]
        order = np.argsort(np.abs(centred @ v), kind="stable")
        rows = rows[np.sort(order[: len(rows) - math.ceil(f / 2)])]
    return rows.mean(0)


@pytest.mark.parametrize("f", [1, 2, 3, 4])
@pytest.mark.parametrize("d", [3, 40])
def test_cronus_is_its_rule_in_numpy(f: int, d: int) -> None:
    x = np.random.default_rng(f).normal(size=(9, 5, d))
    out = cronus(torch.from_numpy(x), f).numpy()
    for row in range(5):
        np.testing.assert_allclose(out[row], reference(x[:, row], f), rtol=1e-10)


# -- in a strategy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "theirs"),
    [
        (("median",), ("flwr_fedmedian",)),
        (("trimmed_mean", "defence.fraction=0.2"), ("flwr_fedtrimmedavg", "strategy.beta=0.3")),
        (("krum", "defence.fraction=0.2"), ("flwr_krum", "strategy.num_malicious_nodes=2")),
        (("bulyan", "defence.fraction=0.1"), ("flwr_bulyan", "strategy.num_malicious_nodes=1")),
    ],
    ids=lambda words: words[0],
)
def test_over_weights_it_is_flowers_own_strategy(rule, theirs) -> None:
    """FedAvg under a defence ends where Flower's strategy does, liars and all; f = 2 of 7, or 1."""
    words = ("clients=7", "attack=scale", "attack.clients=[3]")
    ours = play("fedavg", f"defence={rule[0]}", *rule[1:], *words).strategy.model
    flowers = play(theirs[0], *theirs[1:], *words).strategy.model
    for name, value in flowers.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


def test_clients_weigh_alike_and_who_has_no_examples_is_left_out() -> None:
    """A count of 10⁹ buys nothing; the mean of what is published is the median of the others."""
    strategy = server("fedavg", "defence=median")
    w = [{n: torch.full_like(v, float(k)) for n, v in strategy.model.items()} for k in (1, 2, 4, 50)]
    strategy.fuse(shares(strategy, [{"model": one} for one in w], [10, 10, 10**9, 0]))
    assert all(bool((value == 2).all()) for value in strategy.model.values())


def test_soft_labels_stay_distributions_and_logits_are_let_alone() -> None:
    """Per row, the coordinates' median divided by its sum; of logits, the median itself."""
    labels = torch.stack([random_labels(24, 10, seed).float() for seed in range(3)])
    strategy = server("dsfl", "defence=median", "strategy.temperature=1.0")
    found = shares(strategy, [{"labels": {"p": p}} for p in labels]).mean("labels")["p"]
    middle = labels.median(0).values
    torch.testing.assert_close(found, middle / middle.sum(1, keepdim=True))
    logits = server("fedmd", "defence=median")
    made = shares(logits, [{"logits": {"logits": 9 * p}} for p in labels]).mean("logits")["logits"]
    torch.testing.assert_close(made, 9 * middle)


def test_prototypes_are_defended_class_by_class_among_holders() -> None:
    strategy = server("fedproto", "clients=5", "defence=median")
    means = torch.zeros(5, 10, 32)
    counts = torch.zeros(5, 10, dtype=torch.int64)
    for k, value in enumerate((1.0, 2.0, 1e6)):
        means[k, 0], counts[k, 0] = value, 10 if value < 1e6 else 10**9
    means[3, 1], counts[3, 1] = 7.0, 1
    strategy.fuse(
        shares(strategy, [{"prototypes": {"means": m, "counts": c}} for m, c in zip(means, counts, strict=True)])
    )
    out = strategy.published("prototypes")
    assert bool((out["means"][0] == 2).all())
    assert bool((out["means"][1] == 7).all())
    assert out["held"].tolist() == [True, True] + [False] * 8


def test_expguard_remembers() -> None:
    """W_k = e^{−η Σ_t ℓ_k}: after two rounds as after one at twice the rate; kept in `state`, by client."""
    rows = [torch.full((24, 10), value) for value in (0.0, 0.0, 1.0)]
    strategy = server("fedmd", "defence=expguard", "defence.rate=0.5")
    far = math.sqrt(10)  # of client 2 from the median, in each row
    for round in (1, 2):
        made = shares(strategy, [{"logits": {"logits": row}} for row in rows]).mean("logits")["logits"]
        w = math.exp(-0.5 * round * far)
        torch.testing.assert_close(made, torch.full((24, 10), w / (2 + w)))
    torch.testing.assert_close(strategy.state["defence"]["logits"], torch.tensor([0.0, 0.0, -far]).double())


@pytest.mark.parametrize("around", ["median", "geometric_median"])
def test_expguard_holds_as_far_as_what_it_looks_around(around: str) -> None:
    """Three of seven far off weigh e^(−10⁶); four of seven are the middle, and the honest weigh nothing."""
    strategy = server("fedmd", "clients=7", "defence=expguard", f"defence.around={around}")
    for liars, expected in ((3, 1.0), (4, 1e5)):
        strategy.state.pop("defence", None)
        rows = [torch.full((24, 10), 1.0 if k < 7 - liars else 1e5) for k in range(7)]
        made = shares(strategy, [{"logits": {"logits": row}} for row in rows]).mean("logits")["logits"]
        torch.testing.assert_close(made, torch.full((24, 10), expected), rtol=1e-6, atol=1e-6)


def test_whole_numbers_get_their_median() -> None:
    strategy = server(
        "fedavg", "defence=multi_krum", "defence.fraction=0.1", "clients=6", "model=resnet8_bn", "data=digits"
    )
    w = [{n: v.clone() for n, v in strategy.model.items()} for _ in range(6)]
    counters = [n for n, v in w[0].items() if not v.is_floating_point()]
    for k, one in enumerate(w):
        for name in counters:
            one[name] = torch.full_like(one[name], 2**40 if k == 5 else k)
    made = shares(strategy, [{"model": one} for one in w]).mean("model")
    assert counters
    assert all(int(made[name]) == 2 for name in counters)


def test_too_few_answers_are_told() -> None:
    strategy = server("fedmd", "clients=5", "defence=krum")
    with pytest.raises(WorldError, match="4 clients answered with a logits, defence=krum with 1 liars needs 5"):
        shares(strategy, [{"logits": {"logits": torch.zeros(24, 10)}}] * 4).mean("logits")


def test_another_layout_is_excluded() -> None:
    strategy = server("fedmd", "defence=median")
    strategy.inbox._before[1] = "0"
    made = shares(strategy, [{"logits": {"logits": torch.zeros(n, 10)}} for n in (24, 23, 24)]).mean("logits")
    assert made["logits"].shape == (24, 10)
    assert strategy.inbox.failures["rejected"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("strategy=knfu", "defence=median"), "strategy=knfu makes something else of soft_labels"),
        (("strategy=fisher", "defence=median"), "makes something else of fisher, rest, scaled"),
        (("strategy=regmean", "defence=median"), "makes something else of gram"),
        (("strategy=fednova", "defence=median"), "makes something else of update"),
        (("strategy=flora", "defence=median"), "makes something else of adapter"),
        (("strategy=fed_sb", "defence=median", "strategy.init=raw_grad"), "makes something else of gradient"),
        (("strategy=local", "defence=median"), "share nothing"),
        (("strategy=centralized", "defence=median"), "share nothing"),
        (("strategy=fedavg", "defence=krum"), "1 may lie, and the rule needs 5 clients"),
        (("strategy=fedavg", "defence=median", "clients=2"), "of 2 clients a round nobody can be outvoted"),
        (("strategy=fedavg", "defence=cronus", "defence.fraction=0.45"), "2 may lie, and the rule needs 5"),
        (("strategy=fedavg", "defence=cronus", "defence.fraction=0.5"), "defence.fraction=0.5: allowed is"),
        (("strategy=fedavg", "defence=expguard", "defence.around=krum"), "defence.around=krum"),
        (("strategy=fedavg", "defence=median", "clock=devices", "schedule=fedbuff"), "of different rounds are fused"),
        (("strategy=fedavg", "defence=median", "secure=on"), "secure=on the server sees sums alone"),
        (("strategy=fedavg", "defence=median", "privacy.noise=1.0", "privacy.level=client"), "adds noise to a sum"),
    ],
)  # fmt: skip
def test_what_no_rule_stands_in_for_is_refused(words, said: str) -> None:
    name = words[0].split("=")[1]
    with pytest.raises(UserError, match=said):
        server(name, *words[1:])


def test_a_key_that_does_nothing_is_refused_and_a_misspelt_rule_named() -> None:
    with pytest.raises(UserError, match=r"defence\.fraction=0\.3 does nothing here"):
        compose(["strategy=fedavg", "defence=median", "defence.fraction=0.3"])
    with pytest.raises(UserError, match="did you mean 'krum'"):
        compose(["strategy=fedavg", "defence=crum"])


def test_a_defence_says_so() -> None:
    (told,) = [note for note in play("fedmd", "defence=trimmed_mean").notes if note.startswith("defence")]
    assert told.startswith("defence: trimmed_mean, against 1 liars a round, in the place of the mean of logits")


def test_a_run_in_which_everybody_lies_says_so() -> None:
    (told,) = [note for note in play("fedavg", "attack=noise", "attack.fraction=1").notes if note.startswith("attack")]
    assert told.endswith("accuracy/personal_honest is nobody's, since everybody lies")
