"""Trainings of several clients in step: one forward pass, one backward pass and one step of an optimiser for all.

Batches are those of each client alone, and so are losses: sums never leave a client's own rows. At every step the
clients whose batches have one size are one computation. Elementwise work is done on whole stacks; where torch would
round the last numbers of a tensor otherwise than the rest, on each client's row.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedfuse.models.replicas import Replicas
from fedfuse.train import training
from fedfuse.train.abreast import Training
from fedfuse.train.abreast_batches import Feed, Member, sent
from fedfuse.train.abreast_layers import Forward
from fedfuse.train.abreast_passes import written_out
from fedfuse.train.mean_loss import added_in_order
from fedfuse.train.row_targets import losses_of
from fedfuse.train.task import IGNORED, task_loss
from fedfuse.train.towards import Towards

WIDTH = 16  # numbers that a processor's widest instruction takes; what is left over is rounded by itself


class Stack:
    """The members' weights, as leaves of one graph, and their optimiser.

    Members stand in the order of their numbers of steps, longest first, so that who is still training is always a
    front part. Where that is their order in memory too, weights are trained where they lie.
    """

    def __init__(self, members: Sequence[Member], replicas: Replicas, forward: Forward) -> None:
        self.members, self.replicas, self.forward = members, replicas, forward
        named = replicas.parameters[members[0].slot]
        slots = [member.slot for member in members]
        self.moved = slots != list(range(slots[0], slots[0] + len(slots)))
        self.index = sent(torch.tensor(slots), members[0].asked.x.device)
        self.weights = {
            name: stack.index_select(0, self.index) if self.moved else stack[slots[0] : slots[-1] + 1]
            for name, stack in replicas.stacks.items()
        }
        self.names = [name for name, p in named.items() if p.requires_grad and name in self.weights]
        self.common = {name: p for name, p in named.items() if name not in self.weights}
        looks = [(member.own and member.kind is None) or member.asked.after_backward is not None for member in members]
        self.seen = any(looks)  # at the models
        if self.moved and self.seen:  # what is called with a client's model finds in it what is being trained
            self._point(self.weights, range(len(members)))
        self.alive = 0
        self.passes = written_out(forward, {name: self.weights[name] for name in self.names})
        self.gradients = {name: torch.empty_like(self.weights[name]) for name in self.names} if self.passes else {}
        self.held: dict[tuple[str, int], Tensor] = {}  # what the optimiser steps: whole stacks, or rows of them
        self.optimizer: torch.optim.Optimizer | None = None

    def _point(self, stacks: Mapping[str, Tensor], places: Sequence[int]) -> None:
        for member, place in zip(self.members, places, strict=True):
            for name in self.names:
                self.replicas.parameters[member.slot][name].data = stacks[name][place]

    def close(self) -> None:
        """Leave the weights where the clients' models have them."""
        if self.moved:
            for name in self.names:
                self.replicas.stacks[name].index_copy_(0, self.index, self.weights[name])
            if self.seen:
                self._point(self.replicas.stacks, [member.slot for member in self.members])

    def shorten(self, alive: int) -> None:
        """Go on with the members before `alive`, and with what their optimiser remembers."""
        if alive == self.alive:
            return
        before, old = self.held, self.optimizer
        self.alive = alive
        self.leaves = {name: self.weights[name][:alive].detach().requires_grad_() for name in self.names}
        self.rest = {n: w[:alive] for n, w in self.weights.items() if n not in self.leaves}
        self.held = {}
        for name, leaf in self.leaves.items():
            if leaf[0].numel() % WIDTH and not leaf.is_cuda:
                self.held |= {(name, k): row for k, row in enumerate(leaf.detach().unbind())}
            else:
                self.held[name, -1] = leaf
        self.optimizer = training.optimizer(self.held.values(), self.members[0].asked.config)
        if old is None:
            return
        for key, value in self.held.items():
            kept = old.state.get(before[key], {})
            same = before[key].shape
            self.optimizer.state[value] = {
                n: v[:alive] if key[1] < 0 and isinstance(v, Tensor) and v.shape == same else v for n, v in kept.items()
            }

    def backward(self, places: list[int], x: Tensor, y: Tensor | None, named: Sequence[Tensor]) -> Tensor:
        """Put the gradients of one group's batches where the step finds them; return losses by member or by row."""
        whole = len(places) == self.alive
        if whole:
            leaves, rest = self.leaves, self.rest
        else:
            index = sent(torch.tensor(places), x.device)
            leaves = {n: leaf.detach().index_select(0, index).requires_grad_() for n, leaf in self.leaves.items()}
            rest = {name: w.index_select(0, index) for name, w in self.rest.items()}
        passes = self.passes if self.passes is not None and self.passes.suits(x.shape[1], leaves) else None
        if passes is None:
            out = self.forward({**leaves, **rest, **self.common}, x)
        else:
            plain = {name: leaf.detach() for name, leaf in leaves.items()}
            out = passes.forward(plain, x).requires_grad_()
        members = [self.members[k] for k in places]
        if members[0].own:
            found = self._own_losses(members, out, y, named)
        else:
            assert y is not None
            if y.ndim == 3:  # texts: a mean over the places of one's own that count
                each = torch.stack([task_loss(*one) for one in zip(out.unbind(), y.unbind(), strict=True)])
                each.sum().backward()
                found = each.detach()
            else:
                each = F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none")
                # from a single number: given a gradient for each, torch imports sympy to compare shapes, 0.3 s
                (each.sum() * (1 / out.shape[1])).backward()
                found = each.detach().view(len(places), -1)
        if passes is not None and out.grad is not None:
            room = {n: self.gradients[n][: len(places)] if whole else torch.empty_like(w) for n, w in plain.items()}
            passes.backward(plain, out.grad, room)
            for name, leaf in leaves.items():
                leaf.grad = room[name]
        if not whole:
            for name, leaf in self.leaves.items():
                gradient = leaves[name].grad
                if gradient is None:
                    raise RuntimeError(f"{name} has no gradient")
                if leaf.grad is None:
                    leaf.grad = torch.empty_like(leaf)
                leaf.grad.index_copy_(0, index, gradient)
        return found

    def _own_losses(self, members: Sequence[Member], out: Tensor, y: Tensor | None, named: Sequence[Tensor]) -> Tensor:
        if len({member.kind for member in members}) == 1 and members[0].kind is not None:
            found = losses_of([cast(Towards, member.asked.loss) for member in members], out, named)
            if found is not None:
                return found
        values, ys = [], [None] * len(members) if y is None else y.unbind()
        for member, own, labels, rows in zip(members, out.unbind(), ys, named, strict=True):
            with member.drawing():
                values.append(member.asked.loss(own, labels, rows))
        found = torch.stack(values)
        found.sum().backward()
        return found.detach()

    def step(self) -> None:
        """What was asked for between `backward` and the step, and the step."""
        assert self.optimizer is not None
        if self.seen:
            self._hooks()
        for (name, k), value in self.held.items():
            if k >= 0:
                gradient = self.leaves[name].grad
                value.grad = None if gradient is None else gradient[k]
        self.optimizer.step()
        for leaf in self.leaves.values():
            leaf.grad = None

    def _hooks(self) -> None:
        for k, member in enumerate(self.members[: self.alive]):
            named, hook = self.replicas.parameters[member.slot], member.asked.after_backward
            for name, leaf in self.leaves.items():
                gradient, besides = leaf.grad, named[name].grad
                if gradient is None:
                    raise RuntimeError(f"{name} has no gradient")
                if besides is not None:  # its loss looked at the model itself, too
                    gradient[k].add_(besides)
                named[name].grad = gradient[k]
            if hook is not None:
                hook(member.asked.model)
                for name, leaf in self.leaves.items():
                    now = named[name].grad
                    if now is None:
                        raise RuntimeError(f"{name} has no gradient any more")
                    if leaf.grad is not None and now.data_ptr() != leaf.grad[k].data_ptr():
                        leaf.grad[k] = now
            for name in self.leaves:
                named[name].grad = None


def together(asked: Sequence[tuple[int, Training]], replicas: Replicas, forward: Forward) -> list[dict[str, Any]]:
    """Make trainings that fit together, each in the replica of its slot.

    Returns
    -------
    list of dict
        `steps` and `loss` of each, as `fedfuse.train.training.train` returns them; `rows` passed through the model.

    Raises
    ------
    Exception
        Whatever one of them raises; their weights are then between two states.
    """
    members = [Member(one, slot) for slot, one in asked]
    device = members[0].asked.x.device
    ordered = sorted(members, key=lambda member: -member.planned)  # stable: equals stay in memory's order
    labels = [y for member in members if not member.own and (y := member.asked.y) is not None and y.ndim == 1]
    if labels and bool((torch.cat(labels) == IGNORED).any()):
        raise RuntimeError("some labels do not count, and a mean is over those that do")
    drawn = _drawn(members)
    for member in ordered:
        if not member.asked.model.training:
            training.training_mode(member.asked.model)
    stack, feed, losses = Stack(ordered, replicas, forward), Feed(ordered), Losses(len(ordered), device)
    steps = [0] * len(ordered)
    own = any(member.own for member in ordered)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=own):
        for step in range(ordered[0].planned):
            alive = sum(member.planned > step for member in ordered)
            stack.shorten(alive)
            for places, size in feed.groups(step, alive):
                for some, x, y in feed.batches(places, size):
                    named = [feed.named(k, size) for k in some] if own else []
                    losses.keep(some, stack.backward(some, x, y, named))
            stack.step()
            steps[:alive] = [step + 1] * alive
            if _ended(ordered[:alive], step + 1):
                break
    stack.close()
    if _drawn(members) != drawn:
        raise RuntimeError("a loss draws from Python's or NumPy's random numbers, which clients abreast share")
    made = {
        id(member): _result(member, done, total)
        for member, done, total in zip(ordered, steps, losses.totals(), strict=True)
    }
    return [made[id(member)] for member in members]


class Losses:
    """Sums over steps of the members' losses, in float64; rows' losses are added up all at once in the end."""

    def __init__(self, members: int, device: torch.device) -> None:
        self.sums = torch.zeros(members, dtype=torch.float64, device=device)
        self.found: list[tuple[list[int], Tensor]] = []

    def keep(self, places: list[int], losses: Tensor) -> None:
        """Remember one group's losses of a step, by member, (g,), or by row, (g, B)."""
        self.found.append((places, losses))

    def totals(self) -> list[float]:
        """Each member's sum; the first moment at which the processor waits for a GPU."""
        sizes: dict[int, list[Tensor]] = {}
        for _, losses in self.found:
            if losses.ndim > 1:
                sizes.setdefault(losses.shape[1], []).append(losses)
        means = {size: iter(added_in_order(torch.cat(all)).split([len(v) for v in all])) for size, all in sizes.items()}
        for places, losses in self.found:
            value = next(means[losses.shape[1]]) if losses.ndim > 1 else losses
            if places[-1] == len(places) - 1:
                self.sums[: len(places)] += value
            else:
                self.sums.index_add_(0, sent(torch.tensor(places), value.device), value.double())
        found: list[float] = self.sums.tolist()
        return found


def _drawn(members: Sequence[Member]) -> Any:
    """The state of what clients abreast have no streams of their own of while they train; None if nobody looks."""
    if not any(member.own or member.asked.after_step or member.asked.after_backward for member in members):
        return None
    _, words, *rest = cast(tuple[Any, ...], np.random.get_state())
    return random.getstate(), words.tobytes(), rest


def _ended(members: Sequence[Member], done: int) -> bool:
    """Whether this step was the last for everybody who takes part in it."""
    if all(member.asked.after_step is None for member in members):
        return False
    said = {bool(m.asked.after_step(done, m.planned)) if m.asked.after_step is not None else False for m in members}
    if len(said) > 1:
        raise RuntimeError("some clients end their training before others")
    return said.pop()


def _result(member: Member, steps: int, total: float) -> dict[str, Any]:
    epochs, rest = divmod(steps, len(member.sizes))
    rows = epochs * sum(member.sizes) + sum(member.sizes[:rest])
    return {"steps": steps, "loss": total / steps if steps else float("nan"), "rows": rows}
