"""Clients of a group abreast (`runtime.vectorize=auto`): each runs until it asks for a training.

Every client is a greenlet with a replica of the model, random streams and context variables of its own; only one runs
at a time. Who asks for what fits together waits; who asks for anything else computes alone, at once, as without all
this. When nobody can go on, the largest set of trainings that fit is made, all at once, and its clients go on.

What a client computes depends on itself alone, not on who is there: layers are such that a batch of many gives each
the bits of a batch of one (`fedfuse.train.abreast_layers`). If a computation of several fails, for want of memory or
by one client's fault, its clients start anew from their committed states: for want of memory in stacks of half the
size, otherwise in stacks of one; and who fails in a stack of one, without any. Their replies say why.
"""

from __future__ import annotations

import contextvars
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from fedfuse.compat.turns import Modes, Turns, modes, set_modes
from fedfuse.config.schema import TrainConfig
from fedfuse.core.abreast_room import Room
from fedfuse.core.abreast_trial import PART, Trials
from fedfuse.core.workspace import Workspace
from fedfuse.errors import in_words
from fedfuse.models.as_built import built_of
from fedfuse.train import abreast, training
from fedfuse.train.abreast import Apart, Training
from fedfuse.train.abreast_steps import together
from fedfuse.train.task import task_step
from fedfuse.wire.records import Arrays

KEPT = 64  # configurations whose text is kept


class Seat:
    """One client that takes its turns."""

    def __init__(self, place: int, slot: int, architecture: str) -> None:
        self.place, self.slot, self.architecture = place, slot, architecture
        self.turns = Turns()
        self.green: Any = None
        self.alone = self.off = False  # in stacks of one; without any
        self.why = ""  # it was taken out of a stack
        self.asked: Training | None = None
        self.answer: Any = None
        self.left, self.away = 0.0, 0.0
        self.begun = False


class Abreast:
    """The desk of a process: who sits at it, and what they ask for."""

    def __init__(self) -> None:
        self.workspace: Workspace | None = None
        self.now: Seat | None = None
        self.hub: Any = None
        self.busy = False
        self.room, self.trials = Room(), Trials()
        self.seats: list[Seat] = []
        self.heard: set[str] = set()  # architectures of which somebody asked, in this run or the last
        self._filled: dict[str, tuple[Arrays, set[int]]] = {}  # what replicas hold that nobody has touched since
        self._told: dict[int, tuple[TrainConfig, str]] = {}

    # -- what clients ask for --------------------------------------------------------------------------------

    def replica(self, workspace: Any, architecture: str) -> nn.Module | None:
        """The replica of the client that runs now."""
        seat = self.now
        if (
            seat is None
            or self.workspace is None
            or workspace is not self.workspace
            or architecture != seat.architecture
        ):
            return None
        found: nn.Module = self.workspace.replicas(architecture, seat.slot + 1).modules[seat.slot]
        return found

    def filled(self, architecture: str, arrays: Arrays) -> bool:
        """Whether the replica of the client that runs now holds these arrays, which no client has touched yet.

        The first who asks has the replicas of all filled who have not begun.
        """
        seat = self.now
        if seat is None or self.workspace is None or architecture != seat.architecture:
            return False
        if architecture not in self._filled:
            slots = [s.slot for s in self.seats if s.architecture == architecture and (s is seat or not s.begun)]
            replicas = self.workspace.replicas(architecture, 1)
            if slots != list(range(seat.slot, seat.slot + len(slots))) or not replicas.fill(slots, arrays):
                return False
            self._filled[architecture] = arrays, set(slots)
        known, slots_left = self._filled[architecture]
        if known is not arrays or seat.slot not in slots_left:
            return False
        slots_left.remove(seat.slot)
        return True

    def away(self) -> float:
        """Seconds that the client that runs now has waited for others."""
        return 0.0 if self.now is None else self.now.away

    def apart(self) -> str:
        """Why the client that runs now was taken out of a stack."""
        return "" if self.now is None else self.now.why

    def train(self, asked: Training) -> dict[str, Any] | None:
        """Wait until it is made together with what fits; None if it is none that could be."""
        seat = self.now
        if seat is None or seat.off or self.busy or not self._fits(seat, asked):
            return None
        self.heard.add(seat.architecture)
        if seat.alone:
            return self._make([seat], [asked])[0]
        if not asked.x.is_cuda:
            kind = self._tried(seat, asked)
            if self.trials.pays(kind) is False:
                return None
            if self.trials.wants_alone(kind):
                return self._measured(asked, kind)
        seat.asked, seat.answer = asked, None
        self.hub.switch(seat)
        if isinstance(seat.answer, BaseException):
            raise seat.answer
        return seat.answer

    def _tried(self, seat: Seat, asked: Training) -> Any:
        """What is measured apart: an architecture with one size of batches, and whose loss it is."""
        return seat.architecture, asked.batch_size, asked.loss is task_step

    def _measured(self, asked: Training, kind: Any) -> dict[str, Any]:
        """Make a training without any stack, as its client would, and remember the time."""
        started, self.busy = time.thread_time(), True
        try:
            made = training.train(
                asked.model, asked.x, asked.y, asked.loss, asked.config, asked.seed_parts, epochs=asked.epochs,
                batch_size=asked.batch_size, least=asked.least, after_backward=asked.after_backward,
                after_step=asked.after_step, max_steps=asked.max_steps, trim=asked.trim,
            )  # fmt: skip
        finally:
            self.busy = False
        self.trials.measured(kind, 1, time.thread_time() - started, made["steps"])
        return {**made, "rows": 0}  # counted there

    def _fits(self, seat: Seat, asked: Training) -> bool:
        assert self.workspace is not None
        if asked.model is not self.replica(self.workspace, seat.architecture) or asked.config.precision == "bf16":
            return False
        if torch.is_inference_mode_enabled() or torch.is_autocast_enabled() or not torch.is_grad_enabled():
            return False
        if not built_of(asked.model).intact():  # a stack passes through the layers as they were built, without hooks
            return False
        if asked.loss is task_step:
            return asked.y is not None and asked.y.ndim <= 2
        return True

    # -- turns -----------------------------------------------------------------------------------------------

    def run(self, workspace: Callable[[], Workspace], jobs: Sequence[tuple[str, Callable[[], Any]]]) -> list[Any]:
        """Run jobs of clients abreast, given with their architectures; return what each returns, in order."""
        slots: dict[str, int] = {}
        seats = []
        for place, (architecture, job) in enumerate(jobs):
            seats.append(seat := Seat(place, slots.get(architecture, 0), architecture))
            slots[architecture] = seat.slot + 1
            seat.green = greenlet(partial(self._work, seat, job))
            seat.green.gr_context = contextvars.copy_context()
        self.workspace, self.hub = workspace(), getcurrent()
        self.seats, self._filled, self.heard = seats, {}, set()
        for architecture, count in slots.items():
            self.workspace.replicas(architecture, count)
        out: list[Any] = [None] * len(jobs)
        mine = Turns()
        mine.leave()
        abreast.desk, collecting = self, gc.isenabled()
        gc.disable()  # all are alive at once, and few leave rings behind: looking through them again and again is waste
        try:
            ready, waiting = list(seats), list[Seat]()
            while ready:
                found = modes()
                for seat in ready:
                    value = self._turn(seat, found)
                    if seat.green.dead:
                        out[seat.place], seat.green = value, None
                    else:
                        waiting.append(seat)
                ready = self._answered(waiting)
                waiting = [seat for seat in waiting if seat not in ready]
            return out
        finally:
            for seat in seats:
                if seat.green and not seat.green.dead:
                    seat.green.throw()
            abreast.desk, self.now, self.hub = None, None, None
            self.seats, self._filled = [], {}
            mine.take()
            if collecting:
                gc.enable()

    def _work(self, seat: Seat, job: Callable[[], Any]) -> Any:
        while True:
            try:
                return job()
            except Apart as error:
                seat.why = error.why
                if not error.smaller:
                    seat.alone, seat.off = True, seat.alone

    def _turn(self, seat: Seat, found: Modes) -> Any:
        """Let a client go on until it asks or is done; torch's modes are then as they were found."""
        seat.turns.take()
        if seat.left:
            seat.away += time.perf_counter() - seat.left
        self.now, seat.begun = seat, True
        try:
            return seat.green.switch()
        finally:
            self.now = None
            if not seat.green.dead:
                seat.turns.leave()
                seat.left = time.perf_counter()
            set_modes(found)

    def _answered(self, waiting: Sequence[Seat]) -> list[Seat]:
        """Make the largest set of trainings that fit together, and answer those who asked for them."""
        sets: dict[Any, list[Seat]] = {}
        for seat in waiting:
            assert seat.asked is not None
            sets.setdefault(self._kind(seat, seat.asked), []).append(seat)
        if not sets:
            return []
        crew = max(sets.values(), key=len)
        crew.sort(key=lambda seat: seat.slot)
        if len(crew) == 1 and crew[0].asked is not None and not crew[0].asked.x.is_cuda:
            crew[0].asked = crew[0].answer = None  # nobody to sit beside: it goes on alone, at less cost
            return crew
        torch.set_grad_enabled(True)
        for part in self._parts(crew):
            started, ticks = time.perf_counter(), time.thread_time()
            asked = [seat.asked for seat in part if seat.asked is not None]
            try:
                made: list[Any] = self._make(part, asked)
                if len(part) > 1:  # what is left over says nothing of stacks
                    steps = sum(one["steps"] for one in made)
                    self.trials.measured(self._tried(part[0], asked[0]), len(part), time.thread_time() - ticks, steps)
            except Exception as error:
                crowded = isinstance(error, torch.OutOfMemoryError) and len(part) > 1
                why = f"a stack of {len(part)} failed: {in_words(error)}"
                made = [Apart(why, crowded) for _ in part]
            if isinstance(made[0], Apart) and made[0].smaller:  # not before what the failure held is gone
                self.room.shrink(part[0].architecture, asked[0], len(part))
            share = (time.perf_counter() - started) / len(part)
            for seat, answer in zip(part, made, strict=True):
                seat.answer, seat.asked = answer, None
                seat.away -= share  # of what it waits, this much was its own
        return crew

    def _kind(self, seat: Seat, asked: Training) -> Any:
        trained = tuple(p.requires_grad for p in built_of(asked.model).own)
        y = None if asked.y is None else (asked.y.dtype, asked.y.shape[1:])
        own = asked.loss is not task_step
        shape = asked.x.dtype, asked.x.shape[1:]
        return seat.architecture, self._said(asked.config), trained, own, shape, y, asked.trim

    def _said(self, config: TrainConfig) -> str:
        """A configuration as text, read once while it is the same for all."""
        known = self._told.get(id(config))
        if known is None or known[0] is not config:
            if len(self._told) > KEPT:
                self._told.clear()
            known = self._told[id(config)] = config, repr(config)
        return known[1]

    def _parts(self, crew: list[Seat]) -> Iterator[list[Seat]]:
        assert self.workspace is not None
        assert crew[0].asked is not None
        while crew:  # as equal as can be: a stack of one costs more than its client alone
            most = self.room.stack(self.workspace, crew[0].architecture, crew[0].asked)
            if not crew[0].asked.x.is_cuda and self.trials.pays(self._tried(crew[0], crew[0].asked)) is None:
                most = min(most, PART)
            size = -(-len(crew) // -(-len(crew) // most))
            part, crew = crew[:size], crew[size:]
            yield part

    def _make(self, crew: Sequence[Seat], asked: Sequence[Training]) -> list[dict[str, Any]]:
        assert self.workspace is not None
        architecture = crew[0].architecture
        forward, replicas = self.workspace.forward(architecture), self.workspace.replicas(architecture, 1)
        assert forward is not None
        self.busy = True  # what a loss asks for in its turn is computed at once
        try:
            return together([(s.slot, a) for s, a in zip(crew, asked, strict=True)], replicas, forward)
        except Exception as error:
            if len(crew) > 1 or not crew[0].alone:
                raise
            raise Apart(f"a stack of 1 failed: {in_words(error)}") from error
        finally:
            self.busy = False
