"""Batches of several clients in step: each client's own rows, in its own order."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedfuse.seeding import generator, seed_of
from fedfuse.train.abreast import Training
from fedfuse.train.batch import sizes_of
from fedfuse.train.row_targets import kind_of
from fedfuse.train.task import IGNORED, task_step

ROOM = 32 * 2**20  # bytes of examples that are put in order for an epoch ahead, where they would fit into a cache
DEVICE_ROOM = 2 * 2**30  # the same on a GPU
LARGE = 64 * 2**10  # bytes of a client's batch that are better put in order just before they are looked at
UNPINNED = 2**16  # bytes


class Member:
    """One client of a stack: its training, its place, and how far it is."""

    def __init__(self, asked: Training, slot: int) -> None:
        self.asked, self.slot = asked, slot
        self.sizes = sizes_of(asked.x.shape[0], asked.batch_size, asked.least)
        self.planned = asked.epochs * len(self.sizes) if asked.max_steps is None else asked.max_steps
        self.own = asked.loss is not task_step  # a loss of the client's own, which is asked client by client
        self.kind = kind_of(asked.loss)
        if self.own:  # what it draws at random, it draws from the streams that it would alone
            self.seed = seed_of(*asked.seed_parts, "layers")
            self.stream = torch.Generator().manual_seed(self.seed).get_state()
            self.drawn = 0  # of the device's stream

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Let its loss go on with its own streams."""
        torch.default_generator.set_state(self.stream)
        device = self.asked.x.device
        generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else None
        if generator is not None:
            generator.manual_seed(self.seed).set_offset(self.drawn)
        yield
        self.stream = torch.default_generator.get_state()
        if generator is not None:
            self.drawn = generator.get_offset()

    def order(self, epoch: int) -> Tensor:
        """Rows of an epoch."""
        return torch.randperm(self.asked.x.shape[0], generator=generator(*self.asked.seed_parts, epoch))


class Feed:
    """The members' batches, step by step; examples of an epoch are put in order at once where there is room."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self.at = [(0, 0)] * len(members)  # step within the epoch, first row of it
        self.rows: list[Tensor] = [torch.empty(0)] * len(members)
        first = members[0].asked
        self.alike = all(member.sizes == members[0].sizes for member in members)
        self.device = first.x.device
        longest = max(member.asked.x.shape[0] for member in members)
        size = sum(t[:1].numel() * t.element_size() for t in (first.x, first.y) if t is not None)
        self.x = self.y = None
        self.starts: Tensor | None = None  # where each member's examples begin in `pool`, on a GPU
        if self._ahead(len(members) * longest * size, first.batch_size * size):
            self.x = _scratch("x", first.x, len(members), longest)
            self.y = None if first.y is None else _scratch("y", first.y, len(members), longest)
            if _gathers(self.device):
                self._gather()

    def _ahead(self, all_of_it: int, batch: int) -> bool:
        """Whether examples are put in order for an epoch ahead, of so many bytes, and of so many a client's batch."""
        return all_of_it <= DEVICE_ROOM if self.device.type == "cuda" else all_of_it <= ROOM and batch < LARGE

    def _gather(self) -> None:
        """Lay the members' examples behind each other, so that one call puts all of an epoch in order."""
        counts = torch.tensor([0, *(len(member.asked.x) for member in self.members[:-1])])
        self.starts = counts.cumsum(0)
        self.pool = torch.cat([member.asked.x for member in self.members])
        ys = [y for member in self.members if (y := member.asked.y) is not None]
        self.pool_y = torch.cat(ys) if ys else None

    def groups(self, step: int, alive: int) -> Iterator[tuple[list[int], int]]:
        """Who has a batch of the same size at this step: places among the members, and the size."""
        if self.alike:  # all at the same place of equal epochs
            sizes = self.members[0].sizes
            epoch, within = divmod(step, len(sizes))
            if within == 0:
                self._begin_all(list(range(alive)), [epoch] * alive)
            else:
                self.at = [(within, self.at[0][1] + sizes[within - 1])] * len(self.members)
            yield list(range(alive)), sizes[within]
            return
        yield from ((places, size) for size, places in self._by_size(step, alive).items())

    def _by_size(self, step: int, alive: int) -> dict[int, list[int]]:
        sizes: dict[int, list[int]] = {}
        beginning: list[int] = []
        for k in range(alive):
            member = self.members[k]
            within = step % len(member.sizes)
            if within == 0:
                beginning.append(k)
            else:
                self.at[k] = within, self.at[k][1] + member.sizes[within - 1]
            sizes.setdefault(member.sizes[within], []).append(k)
        self._begin_all(beginning, [step // len(self.members[k].sizes) for k in beginning])
        return sizes

    def _begin_all(self, places: list[int], epochs: list[int]) -> None:
        if self.starts is None or not places:
            for k, epoch in zip(places, epochs, strict=True):
                self._begin(k, epoch)
            return
        assert self.x is not None
        orders = [self.members[k].order(epoch) for k, epoch in zip(places, epochs, strict=True)]
        first, own = self.starts[torch.tensor(places)], torch.zeros(len(places), self.x.shape[1], dtype=torch.int64)
        if self.alike:
            torch.stack(orders, out=own)
        else:
            for i, order in enumerate(orders):
                own[i, : len(order)] = order
        here = sent(torch.stack([own, own + first[:, None]]), self.device)  # of a member's own, and of the pool
        for i, (k, order) in enumerate(zip(places, orders, strict=True)):
            self.rows[k], self.at[k] = here[0, i, : len(order)] if self.members[k].own else order, (0, 0)
        whole, flat = len(places) == len(self.members), here[1].flatten()
        index = None if whole else sent(torch.tensor(places), self.device)
        for into, pool in ((self.x, self.pool), (self.y, self.pool_y)):
            if into is not None and pool is not None:
                if index is None:
                    torch.index_select(pool, 0, flat, out=into.flatten(0, 1))
                else:
                    found = pool.index_select(0, flat).unflatten(0, (len(places), -1))
                    into.index_copy_(0, index, found)

    def _begin(self, k: int, epoch: int) -> None:
        asked = self.members[k].asked
        order = self.members[k].order(epoch)
        self.rows[k], self.at[k] = order.to(self.device), (0, 0)
        if self.x is not None:
            count = order.shape[0]
            torch.index_select(asked.x, 0, self.rows[k], out=self.x[k, :count])
            if self.y is not None and asked.y is not None:
                torch.index_select(asked.y, 0, self.rows[k], out=self.y[k, :count])

    def named(self, k: int, size: int) -> Tensor:
        """Rows of a member's batch."""
        first = self.at[k][1]
        return self.rows[k][first : first + size]

    def batches(self, places: list[int], size: int) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """`batch` of members whose inputs have one shape: texts are cut to the longest of a member's own, if asked."""
        x, y = self.batch(places, size)
        if y is None or y.ndim == 2 or not self.members[0].asked.trim:
            yield places, x, y
            return
        lengths = _lengths(y).tolist()
        for length in sorted(set(lengths)):
            of = [i for i, one in enumerate(lengths) if one == length]
            some = slice(None) if len(of) == len(places) else of
            yield [places[i] for i in of], x[some, :, :length], y[some, :, :length]

    def batch(self, places: list[int], size: int) -> tuple[Tensor, Tensor | None]:
        """Inputs (g, B, …) and labels of the batches of one size."""
        if self.x is None:
            asked = [self.members[k].asked for k in places]
            rows = [self.named(k, size) for k in places]
            x = _scratch("x", asked[0].x, len(places), size)
            for one, a, r in zip(x.unbind(), asked, rows, strict=True):
                torch.index_select(a.x, 0, r, out=one)
            ys = [a.y.index_select(0, r) for a, r in zip(asked, rows, strict=True) if a.y is not None]
            return x, torch.stack(ys) if ys else None
        return _cut(self.x, places, self.at, size), None if self.y is None else _cut(self.y, places, self.at, size)


def _lengths(y: Tensor) -> Tensor:
    """Places of each member's texts (g, B, T) that its batch is cut to (`fedfuse.train.task.trimmed`)."""
    counted = (y != IGNORED).any(1)
    return torch.where(counted, torch.arange(1, y.shape[2] + 1, device=y.device), 0).amax(1).clamp(min(2, y.shape[2]))


def _gathers(device: torch.device) -> bool:
    """Whether examples of all members are put in order by one call: where a call costs more than what it does."""
    return device.type == "cuda"


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's on a device, on its way there when this returns.

    CUDA takes a copy of a small one at once; to pin it would cost more.
    """
    if device.type == "cuda" and tensor.numel() * tensor.element_size() > UNPINNED:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


_kept: dict[str, Tensor] = {}  # pages that are there already: fresh ones for every stack take as long as its products


def _scratch(name: str, like: Tensor, members: int, rows: int) -> Tensor:
    """Room for so many members' rows, in whatever state the stack before left it."""
    shape, held = (members, rows, *like.shape[1:]), _kept.get(name)
    size = math.prod(shape)
    if held is None or held.dtype != like.dtype or held.device != like.device or held.numel() < size:
        held = _kept[name] = like.new_empty(size)
    return held[:size].view(shape)


def _cut(stack: Tensor, places: list[int], at: Sequence[tuple[int, int]], size: int) -> Tensor:
    first = at[places[0]][1]
    if places[-1] - places[0] == len(places) - 1 and all(at[k][1] == first for k in places):
        return stack[places[0] : places[-1] + 1, first : first + size]
    return torch.stack([stack[k, at[k][1] : at[k][1] + size] for k in places])
