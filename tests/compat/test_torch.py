"""Guards: the names of torch that compat/ touches; what they are used for equals torch's own way; and life without."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedfuse.compat import torch_draws, torch_hooks, torch_lists, torch_norms, torch_optimizers, torch_state
from fedfuse.compat.torch_draws import first_of_permutation
from fedfuse.compat.torch_writes import writes
from fedfuse.models.in_place import overlay, variable


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3, bias=False))


def test_contents_are_what_state_dict_says() -> None:
    assert torch_state.known()
    made = model()
    found, theirs = torch_state.contents(made), made.state_dict()
    assert found is not None
    assert list(found) == list(theirs)
    assert all(found[name].data_ptr() == theirs[name].data_ptr() for name in theirs)


def test_writes_in_place_are_counted_through_views_too() -> None:
    value = torch.ones(2, 3)
    arrays = {"a": torch.zeros(1), "v": value}
    before = writes(arrays.values())
    assert writes([*arrays.values(), torch.from_numpy(value.numpy())]) == before
    _ = value * 2, value.clone().mul_(2), value.detach().sum()
    assert writes(arrays.values()) == before
    for write in (lambda: value.mul_(2), lambda: value[0].fill_(1), lambda: value.detach().view(-1).add_(1)):
        write()
        assert writes(arrays.values()) > before
        before = writes(arrays.values())
    with torch.inference_mode():
        assert writes([torch.ones(1)]) == 0


@pytest.mark.parametrize("known", [True, False])
def test_parameters_are_those_of_torch(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    monkeypatch.setattr(torch_state, "known", lambda: known)
    made = model()
    assert set(map(id, torch_state.parameters(made))) == set(map(id, made.parameters()))


class Scaled(nn.Linear):
    """Saved in its own way."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}double"] = 2 * self.weight.detach()


def test_hooks_on_gradients_are_found_emptied_and_carried_to_a_copy() -> None:
    bare, parameter, called = (nn.Parameter(torch.ones(2)) for _ in range(2)), nn.Parameter(torch.ones(2)), list[str]()
    assert torch_state.hooked(bare) == []
    parameter.register_hook(lambda gradient: 3 * gradient)
    parameter.register_post_accumulate_grad_hook(lambda one: called.append("after"))
    parameter.rate = 0.5  # type: ignore[attr-defined]
    made = copy.deepcopy(parameter)
    torch_state.carry(parameter, made)
    for found in torch_state.hooked([parameter]):
        found.clear()
    for one, gradient in ((parameter, 1.0), (made, 3.0)):
        one.sum().backward()
        assert one.grad is not None
        assert one.grad.tolist() == [gradient, gradient]
    assert (called, made.rate) == (["after"], 0.5)  # type: ignore[attr-defined]
    assert torch_state.hooked([parameter]) == []


PASSES = ("forward_pre", "forward", "full_backward_pre", "full_backward")


@pytest.mark.parametrize("when", PASSES)
def test_a_hook_on_a_pass_is_seen_and_can_be_taken_off_for_a_while(when: str) -> None:
    assert torch_hooks.known()
    made, called = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), list[str]()
    assert not torch_hooks.has_hooks(made[0])
    getattr(made[0], f"register_{when}_hook")(lambda *_: called.append(when))
    assert [torch_hooks.has_hooks(module) for module in (made, *made)] == [False, True, False]
    with torch_hooks.without_hooks(made):
        made(torch.ones(1, 2, requires_grad=True)).sum().backward()
        assert called == []
    made(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert called == [when]


def test_without_the_names_every_module_is_taken_for_one_with_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_hooks, "known", lambda: False)
    made, called = nn.Linear(2, 2), list[int]()
    assert torch_hooks.has_hooks(made)
    made.register_forward_hook(lambda *_: called.append(1))
    with torch_hooks.without_hooks(made):
        made(torch.ones(1, 2))
    assert called == [1]


def test_a_module_with_a_hook_or_a_way_of_its_own_is_left_to_torch() -> None:
    assert torch_state.contents(nn.Sequential(Scaled(2, 2))) is None
    hooked = nn.Linear(2, 2)
    hooked.register_state_dict_post_hook(lambda *args: None)
    assert torch_state.contents(hooked) is None
    hooked = nn.Linear(2, 2)
    hooked.register_load_state_dict_post_hook(lambda *args: None)
    assert torch_state.contents(hooked) is None


def test_without_the_names_a_model_is_read_and_written_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    source, other = model(), model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    monkeypatch.setattr(torch_state, "known", lambda: False)
    monkeypatch.delattr(torch, "_foreach_copy_")
    monkeypatch.delattr(torch, "_foreach_add_")
    overlay(other, variable(source))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), other.state_dict().values(), strict=True)
    )
    into, values = [torch.ones(2), torch.ones(3)], [torch.full((2,), 4.0), torch.full((3,), 2.0)]
    torch_lists.add_all(into, values, alpha=0.5)
    assert [t.tolist() for t in into] == [[3.0, 3.0], [2.0, 2.0, 2.0]]


def test_lists_are_copied_and_added() -> None:
    assert hasattr(torch, "_foreach_copy_")
    assert hasattr(torch, "_foreach_add_")
    into = [torch.zeros(2), torch.zeros(3)]
    torch_lists.copy_all(into, [torch.ones(2), torch.ones(3)])
    torch_lists.add_all(into, [torch.full((2,), 4.0), torch.full((3,), 2.0)], alpha=0.5)
    assert [t.tolist() for t in into] == [[3.0, 3.0], [2.0, 2.0, 2.0]]


def test_a_layer_of_ones_own_is_known_for_what_it_derives_from() -> None:
    from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

    for layer in (_BatchNorm(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm1d()):
        assert isinstance(layer, torch_norms.BATCH_NORMS)
        assert isinstance(layer, torch_norms.KEEP_STATISTICS)
    for layer in (_NormBase(2), nn.InstanceNorm2d(2)):
        assert isinstance(layer, torch_norms.KEEP_STATISTICS)
        assert not isinstance(layer, torch_norms.BATCH_NORMS)
    assert not isinstance(nn.GroupNorm(1, 2), torch_norms.KEEP_STATISTICS)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_bare_optimiser_steps_as_torchs_own(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    assert torch_optimizers.KNOWN
    calls: list[str] = []

    def stepped(made: type) -> torch.Tensor:
        weight = torch.tensor([1.0, -2.0], requires_grad=True)
        optimizer = made([weight], lr=0.1)
        optimizer.register_step_post_hook(lambda *args: calls.append("step"))
        for _ in range(3):
            optimizer.zero_grad()
            (weight**2).sum().backward()
            optimizer.step()
        return weight.detach()

    bare = torch_optimizers.bare(kind)
    assert bare is not kind
    assert torch.equal(stepped(bare), stepped(kind))
    assert len(calls) == 6
    monkeypatch.setattr(torch_optimizers, "KNOWN", False)
    assert torch_optimizers.bare(kind) is kind


@pytest.mark.parametrize(("n", "k"), [(1000, 50), (1001, 51), (200, 1), (9, 2), (8, 8), (50, 30), (100_003, 500)])
def test_the_first_of_a_permutation_are_torchs_own(n, k):
    for seed in range(5):
        whole = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        assert first_of_permutation(n, k, torch.Generator().manual_seed(seed)) == whole[:k].tolist()


def test_a_permutation_that_torch_makes_otherwise_is_drawn_whole(monkeypatch):
    monkeypatch.setattr(torch_draws, "_first", lambda n, k, draw: list(range(k)))
    torch_draws.known.cache_clear()
    try:
        whole = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
        assert first_of_permutation(1000, 10, torch.Generator().manual_seed(3)) == whole[:10].tolist()
    finally:
        torch_draws.known.cache_clear()


def test_torch_permutes_as_we_say():
    assert torch_draws.known()
