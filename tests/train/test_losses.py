"""Each distillation objective in float64: values by hand in NumPy, limits, gradients, state, refusals."""

import math
import sys
import types
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from fedfuse.config.compose import compose, options
from fedfuse.config.schema import LossConfig
from fedfuse.errors import UserError
from fedfuse.train.losses import Loss, loss, names
from fedfuse.train.objective import followed

S = np.array([[1.0, -0.5, 2.0, 0.3], [0.0, 3.0, -1.0, 0.5], [0.2, 0.1, -0.4, 1.5]])
T = np.array([[0.5, 1.5, -1.0, 0.0], [2.0, 2.5, -2.0, 0.1], [-0.3, 3.9, 0.8, 0.7]])
Y = np.array([2, 0, 3])


def t(array, grad=False):
    return torch.tensor(array, dtype=torch.float64, requires_grad=grad)


def soft(z, temperature=1.0):
    e = np.exp(z / temperature - (z / temperature).max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(1)


def entropy(p):
    return -(p * np.log(p)).sum(1)


def value(name, s=S, teacher=T, labels=None, **options):
    return loss(name, **options)(t(s), t(teacher), labels).item()


def every(labels=Y, **options):
    for name in names():
        power = name in ("ttm", "wttm")  # whose power stands for a temperature
        made = loss(name, **{k: v for k, v in options.items() if not (power and k == "temperature")})
        yield name, made, torch.tensor(labels) if made.needs_labels else None


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_forms_by_hand(temperature):
    p, q, tt = soft(S, temperature), soft(T, temperature), temperature**2
    m = (p + q) / 2
    options = {"temperature": temperature}
    assert value("kl", **options) == pytest.approx(tt * kl(q, p).mean(), rel=1e-12)
    assert value("reverse_kl", **options) == pytest.approx(tt * kl(p, q).mean(), rel=1e-12)
    assert value("js", **options) == pytest.approx((kl(p, m) / 2 + kl(q, m) / 2).mean(), rel=1e-12)
    assert value("soft_ce", **options) == pytest.approx(-(q * np.log(p)).sum(1).mean(), rel=1e-12)
    forward = np.where(entropy(q) > entropy(p), 2.0, 1.0)
    reverse = np.where(entropy(q) < entropy(p), 2.0, 1.0)
    both = tt * (forward * kl(q, p) + reverse * kl(p, q)).mean()
    assert value("bdkd", **options) == pytest.approx(both, rel=1e-12)
    assert set(forward) == {1.0, 2.0}  # the example shows both sides
    mixed = soft(0.6 * S + 0.4 * T, temperature)
    assert value("taid", **options) == pytest.approx(tt * kl(mixed, p).mean(), rel=1e-12)


def test_logit_losses_by_hand():
    assert value("mse") == pytest.approx(((S - T) ** 2).mean(), rel=1e-12)
    assert value("mae") == pytest.approx(np.abs(S - T).mean(), rel=1e-12)


def test_batchmean_is_not_the_mean_over_classes():
    torch_kl = nn.functional.kl_div(t(S).log_softmax(1), t(T).softmax(1), reduction="batchmean").item()
    assert value("kl") == pytest.approx(torch_kl, rel=1e-12)
    doubled = [np.concatenate([z, z]) for z in (S, T)]
    for name in ("kl", "reverse_kl", "js", "soft_ce", "mse", "mae", "taid", "bdkd"):
        assert value(name, *doubled) == pytest.approx(value(name), rel=1e-12), name


def test_soft_ce_is_kl_plus_the_teachers_entropy():
    assert value("soft_ce") == pytest.approx(value("kl") + entropy(soft(T)).mean(), rel=1e-12)


def test_js_is_symmetric_and_at_most_log_2_where_the_wrong_port_is_not():
    far = np.array([[60.0, 0.0], [0.0, 60.0]])
    assert value("js", S, T) == pytest.approx(value("js", T, S), rel=1e-12)
    assert value("js", far, -far) == pytest.approx(math.log(2), rel=1e-12)
    assert value("js", far, -far) <= math.log(2)
    # The published port gives kl_div probabilities where it wants logarithms.
    p, q = t(soft(S)), t(soft(T))
    wrong = sum(nn.functional.kl_div(a, (p + q) / 2, reduction="batchmean") for a in (p, q)) / 2
    assert abs(value("js") - wrong.item()) > 0.1
    assert value("js", S, S) == pytest.approx(0, abs=1e-15)
    assert nn.functional.kl_div(p, p, reduction="batchmean").abs() > 0.1  # the port's value at equality


def test_t_squared_keeps_the_scale_of_gradients():
    limit = (S - S.mean(1, keepdims=True) - T + T.mean(1, keepdims=True)) / S.shape[1] / len(S)
    for name in ("kl", "reverse_kl", "taid", "bdkd"):
        scale = {"taid": 0.4, "bdkd": 3.0}.get(name, 1.0)  # τ; and both weights together
        for temperature in (1e4, 1e5):
            s = t(S, grad=True)
            loss(name, temperature=temperature)(s, t(T)).backward()
            # As T grows, p_s − p_t tends to (centred s − centred t) / (C T): Hinton et al. 2015, §2.1.
            assert s.grad.numpy() == pytest.approx(scale * limit, rel=2e-3, abs=1e-4), (name, temperature)


def test_taid_at_both_ends():
    assert value("taid", tau_start=1.0) == pytest.approx(value("kl"), rel=1e-14)
    s = t(S, grad=True)
    start = loss("taid", tau_start=0.0)(s, t(T))
    start.backward()
    assert start.item() == pytest.approx(0, abs=1e-15)
    assert s.grad.abs().max() < 1e-15
    s = t(S, grad=True)  # the student inside q is a constant: the gradient is p_s − q
    loss("taid", tau_start=0.5)(s, t(T)).backward()
    assert s.grad.numpy() == pytest.approx((soft(S) - soft(S / 2 + T / 2)) / len(S), abs=1e-14)


def test_taid_schedule_by_hand():
    made = loss("taid", alpha=0.1, beta=0.9)
    made.after_step(2.0, 0.0)
    assert (made.tau, made.momentum) == (0.4, 0.0)  # the first step only records
    made.after_step(torch.tensor(1.5), 0.0)
    m = 0.1 * 0.25
    tau = 0.4 + 0.1 / (1 + math.exp(-m)) * 0.6
    assert made.momentum == pytest.approx(m, rel=1e-12)
    assert made.tau == pytest.approx(tau, rel=1e-12)
    made.after_step(1.5, 0.5)  # the goal of linear progress, 0.7, is ahead
    assert made.tau == pytest.approx(0.7, rel=1e-12)
    made.after_step(9.0, 0.2)
    assert made.tau > 0.7  # never falls, though loss grew and progress is less
    made.after_step(1e-30, 0.2)
    made.after_step(1e30, 0.2)  # an improvement of −1e45 must not overflow
    made.after_step(float("nan"), 0.2)
    assert math.isfinite(made.tau)
    made.after_step(1.0, 1.0)
    assert made.tau == 1.0


def test_taid_state_goes_on_where_it_stopped():
    steps = [(2.0, 0.0), (1.7, 0.1), (1.9, 0.15), (1.1, 0.2), (1.0, 0.3)]
    for cut in range(len(steps)):
        whole, first, second = (loss("taid", alpha=0.05) for _ in range(3))
        for step in steps:
            whole.after_step(*step)
        for step in steps[:cut]:
            first.after_step(*step)
        state = first.state_dict()
        assert all(value.dtype == torch.float64 and value.isfinite() for value in state.values())
        at_cut = loss("taid", alpha=0.05)(t(S), t(T), state=state).item()
        assert at_cut == first(t(S), t(T)).item()
        second.load_state_dict(state)
        for step in steps[cut:]:
            second.after_step(*step)
        assert second.state_dict() == whole.state_dict()
    assert loss("kl").state_dict() == {}


def test_a_training_tells_its_objectives_how_much_of_the_run_is_done_after_every_step_that_had_something_to_distil():
    made, plain, values, told = loss("taid"), loss("kl"), [], []
    made.after_step = lambda value, progress: told.append((value.item(), progress))
    with followed([plain, made], {}, "receive", (0.5, 0.75)) as options:
        for done in range(1, 5):
            if done != 2:
                values.append(made(t(S), t(T) * done).item())
            options["after_step"](done, 4)
    assert told == list(zip(values, (0.5625, 0.6875, 0.75), strict=True))


def test_sinkhorn_by_hand_and_without_log_space():
    p, q = soft(S, 2.0), soft(T, 2.0)
    cost = np.abs(p[:, None] - q[None]).sum(2)
    plan = np.exp(-cost / 0.1)
    for _ in range(20):
        plan /= plan.sum(1, keepdims=True)
        plan /= plan.sum(0, keepdims=True)
    assert value("sinkhorn") == pytest.approx((plan * cost).sum(), rel=1e-10)
    assert value("sinkhorn", weight=8e-4) == pytest.approx(8e-4 * (plan * cost).sum(), rel=1e-10)


def test_sinkhorn_tends_to_the_optimal_assignment():
    draw = np.random.default_rng(0)
    s, teacher = 3 * draw.normal(size=(2, 8, 5))
    p, q = soft(s, 2.0), soft(teacher, 2.0)
    cost = np.abs(p[:, None] - q[None]).sum(2)
    best = cost[linear_sum_assignment(cost)].sum()
    gaps = [
        value("sinkhorn", s, teacher, epsilon=epsilon, iterations=5000) - best for epsilon in (1.0, 0.1, 1e-2, 1e-3)
    ]
    assert gaps[0] > gaps[1] > gaps[2] > abs(gaps[3])
    assert abs(gaps[3]) < 1e-3  # below 0 by as much as the rows of P still miss 1
    assert np.exp(-cost / 1e-4).sum() == 0  # what log space is for
    assert math.isfinite(value("sinkhorn", s, teacher, epsilon=1e-4))
    shuffled = s[draw.permutation(8)]
    assert value("sinkhorn", s, shuffled, epsilon=1e-3, iterations=2000) == pytest.approx(0, abs=1e-6)


def test_rkd_by_hand():
    draw = np.random.default_rng(1)
    s, teacher = draw.normal(size=(4, 3)), 2 * draw.normal(size=(4, 6))  # features of other sizes

    def relations(z):
        d = np.array([[np.linalg.norm(a - b) for a in z] for b in z])
        angle = np.zeros((4, 4, 4))
        for j in range(4):
            for i in range(4):
                for k in range(4):
                    if i != j and k != j:
                        angle[j, i, k] = (z[i] - z[j]) @ (z[k] - z[j]) / d[i, j] / d[k, j]
        return d / d[d > 0].mean(), angle

    def huber(a, b):
        e = np.abs(a - b)
        return np.where(e < 1, e**2 / 2, e - 0.5).mean()

    (ds, angle_s), (dt, angle_t) = relations(s), relations(teacher)
    by_hand = 25 * huber(ds, dt) + 50 * huber(angle_s, angle_t)
    assert value("rkd", s, teacher) == pytest.approx(by_hand, rel=1e-12)
    assert value("rkd", s, 7 * s + 1) == pytest.approx(0, abs=1e-12)  # blind to scale and shift


def test_rkd_needs_three_rows_and_survives_equal_ones():
    made = loss("rkd")
    s = t(S[:2], grad=True)
    small = made(s, t(T[:2]))
    small.backward()
    assert small.item() == 0
    assert not s.grad.any()
    assert made.min_batch == 3
    s = t(np.ones((4, 3)), grad=True)
    made(s, t(np.ones((4, 3)))).backward()
    assert s.grad.isfinite().all()


def test_dkd_by_hand():
    def parts(z):
        p = soft(z, 4.0)
        target = p[range(3), Y]
        pair = np.stack([target, 1 - target], 1)
        rest = np.array([np.delete(row, y) for row, y in zip(p, Y, strict=True)])
        return pair, rest / rest.sum(1, keepdims=True)

    (pair_s, rest_s), (pair_t, rest_t) = parts(S), parts(T)
    by_hand = 16 * (kl(pair_t, pair_s) + 8 * kl(rest_t, rest_s)).mean()
    assert value("dkd", labels=torch.tensor(Y)) == pytest.approx(by_hand, rel=1e-12)
    # With each sample's own weight, 1 − p_t(y), on the rest, the parts add up to KL: the paper's eq. 7.
    p, q = soft(S, 4.0), soft(T, 4.0)
    together = kl(pair_t, pair_s) + pair_t[:, 1] * kl(rest_t, rest_s)
    assert together == pytest.approx(kl(q, p), rel=1e-12)


@pytest.mark.parametrize("lam", [0.25, 2.0])
def test_ttm_and_wttm_by_hand(lam):
    power = soft(T) ** lam
    q = power / power.sum(1, keepdims=True)
    assert q == pytest.approx(soft(lam * T), rel=1e-12)
    rows = kl(q, soft(S))
    assert value("ttm", lam=lam) == pytest.approx(rows.mean(), rel=1e-12)
    assert value("wttm", lam=lam) == pytest.approx((power.sum(1) * rows).mean(), rel=1e-12)
    assert value("ttm", lam=lam) != pytest.approx(value("kl", temperature=1 / lam), rel=0.1)  # the student is at T = 1
    assert value("ttm") == value("ttm", lam=0.25)
    with pytest.raises(UserError, match=r"temperature=2.0: a power takes its place: set lam"):
        loss("wttm", temperature=2.0)
    with pytest.raises(UserError, match="positive"):
        loss("ttm", lam=0.0)


def test_at_a_power_of_one_ttm_and_wttm_are_kl():
    assert value("ttm", lam=1.0) == pytest.approx(value("kl"), rel=1e-12)
    assert value("wttm", lam=1.0) == pytest.approx(value("kl"), rel=1e-12)


def test_ofa_by_hand_and_as_soft_ce():
    y = torch.tensor(Y)
    assert value("ofa", labels=y, epsilon=1.0) == pytest.approx(value("soft_ce"), rel=1e-12)
    target = np.eye(4)[Y]
    for temperature in (1.0, 3.0):
        weights = (soft(T, temperature) + target) ** 1.5 - target
        by_hand = -(weights * np.log(soft(S, temperature))).sum(1).mean()
        assert value("ofa", labels=y, temperature=temperature) == pytest.approx(by_hand, rel=1e-12)
    with pytest.raises(UserError, match="positive"):
        loss("ofa", epsilon=0.0)


def test_nd_by_hand():
    labels = torch.tensor([1, 0, 1])
    centres = np.stack([(T[0] + T[2]) / 2, T[1], (T[0] + T[2]) / 2])
    along = (S * centres).sum(1) / np.linalg.norm(centres, axis=1)
    longest = np.maximum(np.linalg.norm(S, axis=1), np.linalg.norm(T, axis=1))
    assert value("nd", labels=labels) == pytest.approx((1 - along / longest).mean(), rel=1e-12)


def test_nd_pulls_an_aligned_row_only_while_it_is_shorter():
    labels = torch.tensor([0, 1, 2])
    assert value("nd", 0.5 * T, labels=labels) == pytest.approx(0.5, rel=1e-12)
    assert value("nd", 3 * T, labels=labels) == pytest.approx(0, abs=1e-12)
    assert value("nd", 0 * T, labels=labels) == pytest.approx(1, rel=1e-12)
    assert value("nd", 0 * T, 0 * T, labels=labels) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("temperature", [2.0, 5.0])
def test_dhkd_by_hand(temperature):
    q = 1 / (1 + np.exp(-(S - T) / temperature))
    rows = (0.5 * np.log(0.5 / q) + 0.5 * np.log(0.5 / (1 - q))).sum(1)
    assert value("dhkd", temperature=temperature) == pytest.approx(temperature**2 * rows.mean(), rel=1e-12)
    assert value("dhkd") == value("dhkd", temperature=2.0)
    assert value("dhkd", S, S) == pytest.approx(0, abs=1e-15)
    assert value("dhkd", S + 1, S) > 0.1  # a shift of logits is seen


def test_dhkd_of_an_excluded_class_is_bounded():
    far = np.where(np.arange(4) == 1, -np.inf, T)
    assert value("dhkd", S, far) == pytest.approx(value("dhkd", S, np.maximum(far, -87.0)), rel=1e-12)


@pytest.mark.parametrize("name", ["nd", "ofa"])
def test_what_needs_labels_is_refused_without(name):
    with pytest.raises(UserError, match=rf"{name}.*labels"):
        value(name)


def test_dkd_without_labels_is_refused():
    assert loss("dkd").needs_labels
    with pytest.raises(UserError, match=r"dkd.*labels"):
        value("dkd")


def test_teacher_is_a_constant_and_gradients_are_right():
    for name, made, labels in every():
        s, teacher = t(S, grad=True), t(T, grad=True)
        made(s, teacher, labels).backward()
        assert teacher.grad is None, name
        assert s.grad.abs().sum() > 0, name
        if name != "taid":  # its q hides the student from the gradient, not from the value
            torch.autograd.gradcheck(lambda z, f=made, y=labels: f(z, t(T), y), (t(S, grad=True),))


def test_probabilities_equal_logits_where_the_form_is_in_probabilities():
    for name, made, labels in every(temperature=2.0):
        given = made.from_probabilities(t(S), t(soft(T)), labels).item()
        if name in ("mse", "mae"):
            difference = soft(S, 2.0) - soft(T, 2.0)
            expected = (difference**2).mean() if name == "mse" else np.abs(difference).mean()
        elif name in ("rkd", "nd"):
            expected = value(name, soft(S, 2.0), soft(T, 2.0), labels)
        elif name == "dhkd":
            expected = value(name, np.log(soft(S)), np.log(soft(T)))
        else:
            expected = made(t(S), t(T), labels).item() if name != "taid" else None
        if name == "taid":  # a shift of the teacher's logits per row changes nothing
            expected = made(t(S), t(T), labels).item()
        assert given == pytest.approx(expected, rel=1e-10), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_classes_a_teacher_excludes_give_no_nan(dtype, temperature):
    p = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.2, 0.0, 0.8]], dtype=dtype)
    for name, made, labels in every(temperature=temperature):
        for call, teacher in ((made.from_probabilities, p), (made, p.log())):
            s = torch.tensor(S, dtype=dtype, requires_grad=True)
            out = call(s, teacher, labels)
            out.backward()
            assert out.isfinite(), name
            assert s.grad.isfinite().all(), name
    tempered = p.double().numpy() ** (1 / temperature)
    tempered /= tempered.sum(1, keepdims=True)
    logs = np.log(soft(S, temperature))
    expected = temperature**2 * (tempered * (np.log(np.maximum(tempered, 1e-300)) - logs)).sum(1).mean()
    made = loss("kl", temperature=temperature).from_probabilities(torch.tensor(S, dtype=dtype), p)
    assert made.item() == pytest.approx(expected, rel=1e-5)


def test_broadcasting_is_refused():
    for _, made, labels in every():
        with pytest.raises(ValueError, match="shape"):
            made(t(S), t(T[:1]), labels)
        if made.same_width:
            with pytest.raises(ValueError, match="shape"):
                made(t(S), t(T[:, :1]), labels)
    assert loss("kl").same_width


@pytest.mark.parametrize(
    ("name", "options", "line"),
    [
        ("kll", {}, "did you mean 'kl'"),
        ("kl", {"epsilon": 1.0}, "no option 'epsilon'"),
        ("kl", {"temperature": 0.0}, "positive"),
        ("kl", {"temperature": "2"}, "must be a number"),
        ("kl", {"weight": -1.0}, "non-negative"),
        ("sinkhorn", {"epsilon": 0.0}, "positive"),
        ("taid", {"tau_start": 0.9, "tau_end": 0.5}, "tau_start ≤ tau_end"),
        ("taid", {"beta": 1.0}, "below 1"),
        ("custom", {}, "loss.build"),
        ("kl", {"build": "torch.nn:L1Loss"}, "loss=custom"),
        ("nowhere_at_all:Loss", {}, "cannot import"),
        ("torch.nn:Linear", {}, "failed"),
        ("builtins:dict", {}, "not a torch.nn.Module"),
    ],
)
def test_bad_names_and_options(name, options, line):
    with pytest.raises(UserError, match=line):
        loss(name, **options)


def test_options_left_empty_take_the_losses_own_default():
    assert loss("dkd", temperature=None).temperature == 4.0
    assert loss("sinkhorn", temperature=None).temperature == 2.0
    assert loss("kl", temperature=LossConfig().temperature).temperature == 1.0


def test_any_torch_module_by_dotted_path():
    made = loss("custom", build="torch.nn:SmoothL1Loss", beta=0.5, weight=2.0)
    assert made(t(S), t(T)).item() == 2 * nn.functional.smooth_l1_loss(t(S), t(T), beta=0.5).item()
    assert isinstance(loss("torch.nn:L1Loss"), Loss)


def test_modules_that_take_labels_or_dictionaries():
    class Labelled(nn.Module):
        def forward(self, s, teacher, y):
            return (s - teacher)[range(len(y)), y].sum()

    class Dictionaries(nn.Module):
        student_module_path = "head"

        def forward(self, student_io_dict, teacher_io_dict, targets=None):
            return (student_io_dict["head"]["output"] - teacher_io_dict["."]["output"]).sum()

    module = types.ModuleType("users_losses")

    class Alone(nn.Module):
        def forward(self, s):
            return s.mean()

    class Rows(nn.Module):
        def forward(self, s, teacher):
            return (s - teacher).square().mean(1)

    module.Labelled, module.Dictionaries, module.Alone, module.Rows = Labelled, Dictionaries, Alone, Rows
    sys.modules["users_losses"] = module
    try:
        labelled = loss("users_losses:Labelled")(t(S), t(T), torch.tensor(Y)).item()
        assert labelled == pytest.approx((S - T)[range(3), Y].sum())
        assert loss("users_losses:Dictionaries")(t(S), t(T)).item() == pytest.approx((S - T).sum())
        with pytest.raises(UserError, match=r"users_losses:Alone: its forward takes \(s\); \(student, teacher\)"):
            loss("users_losses:Alone")  # before anything is trained
        with pytest.raises(UserError, match=r"Rows gives shape \(3,\); take its mean"):
            loss("users_losses:Rows")(t(S), t(T))
    finally:
        del sys.modules["users_losses"]


def test_shipped_configurations_build():
    assert set(options("loss")) == {*names(), "default", "custom"}
    for name in options("loss"):
        content = compose([f"loss={name}", "strategy=fedmd"]).loss
        if name in names():
            made = loss(name, temperature=content.temperature, **content.options)
            plain = loss(name)
            for field in fields(plain):
                if field.name != "weight":  # sinkhorn's is the paper's where a user chooses it
                    assert getattr(made, field.name) == getattr(plain, field.name)
