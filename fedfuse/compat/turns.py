"""Random numbers of clients that take turns in one process: each finds torch's, Python's and NumPy's as it left them.

Likewise torch's modes: gradients, default dtype and device, threads, deterministic algorithms, precision of products,
autocast. A default device is a mode on a stack. That there is none is seen by the stack's length, which takes 0.03 µs
(`torch._C._len_torch_function_stack`), and `torch.get_default_device` 2.8. If the name is gone, torch is asked always.

Reading and writing NumPy's whole state takes 130 µs a turn, more than a small client's work. Nearly nobody draws from
it: its state is looked at where it lies, by the address that NumPy's bit generators give for that (`ctypes`, in
NumPy's documentation; the layout, 624 words and a position, is not), and is copied only where it is not just seeded.
If a name is gone, it is copied always. Python's own is copied as it lies behind its object's head, a position and 624
words, 1 µs in place of the 50 of `getstate` and `setstate`; where another generator's does not lie so, by these. Guard:
`tests/compat/test_turns.py`.
"""

from __future__ import annotations

import ctypes
import functools
import random
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

Played = TypeVar("Played")
WORDS = 624  # of MT19937; its position stands there too until the first draw
SIZE = 4 * (WORDS + 1)


def fresh(seed: int) -> bool:
    """Whether NumPy's global generator is as `np.random.seed(seed)` left it."""
    found = _look()
    return found is not None and found[WORDS] == WORDS and found[0] == seed


def _look() -> Any:
    """Words and position of NumPy's global generator, in place; None if they are not where we know them."""
    try:
        return _words(np.random.get_bit_generator())  # type: ignore[attr-defined]
    except (AttributeError, TypeError):  # pragma: no cover - another NumPy
        return None


@functools.lru_cache(1)
def _words(generator: Any) -> Any:
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.cast(generator.ctypes.state_address, ctypes.POINTER(ctypes.c_uint32))


@functools.cache
def _lying() -> int | None:
    """Where Python's global generator has its position and words; None if a known one does not have them there."""
    try:
        known, owner = random.Random(1), random._inst  # type: ignore[attr-defined]
        known.random()
        *words, position = known.getstate()[1]
        head = object.__basicsize__
        if type(owner) is not random.Random or ctypes.string_at(id(known) + head, SIZE) != bytes(
            (ctypes.c_uint32 * (WORDS + 1))(position, *words)
        ):
            return None
        return id(owner) + head
    except (AttributeError, TypeError, ValueError):  # pragma: no cover - another Python
        return None


def _python() -> Any:
    place = _lying()
    if place is None:
        return random.getstate()
    return ctypes.string_at(place, SIZE), random._inst.gauss_next  # type: ignore[attr-defined]


def _go_on(state: Any) -> None:
    place = _lying()
    if place is None or not isinstance(state[0], bytes):
        random.setstate(state)
        return
    ctypes.memmove(place, state[0], SIZE)
    random._inst.gauss_next = state[1]  # type: ignore[attr-defined]


Modes = tuple[bool, torch.dtype, int, int, str, bool, bool, torch.device | None]
_any_mode = getattr(torch._C, "_len_torch_function_stack", lambda: 1)


def modes() -> Modes:
    """Torch's grad mode, default dtype, threads, determinism, precision, autocast on CPU and GPU, default device."""
    return (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_deterministic_debug_mode(),
        _precision(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_default_device() if _any_mode() else None,
    )


def _precision() -> str:
    """Of float32 products; empty where backends were told apart, which torch has no one word for."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return ""


def set_modes(found: Modes) -> None:
    """Set torch's modes to what they were found to be."""
    if modes() != found:
        torch.set_grad_enabled(found[0])
        torch.set_default_dtype(found[1])
        torch.set_num_threads(found[2])
        torch.set_deterministic_debug_mode(found[3])
        if found[4]:
            torch.set_float32_matmul_precision(found[4])
        torch.set_autocast_enabled("cpu", found[5])
        torch.set_autocast_enabled("cuda", found[6])
        torch.set_default_device(found[7])


class Turns:
    """The global generators of one of several clients, and its modes."""

    def __init__(self) -> None:
        self._kept: tuple[Any, ...] | None = None

    def leave(self) -> None:
        """Keep the generators' states: it is another's turn."""
        found = _look()
        numpy: Any = int(found[0]) if found is not None and fresh(int(found[0])) else np.random.get_state()
        self._kept = torch.default_generator.get_state(), _python(), numpy, _devices(), modes()

    def take(self) -> None:
        """Go on with them; at the first turn there is nothing to go on with."""
        if self._kept is None:
            return
        set_modes(self._kept[4])
        torch.default_generator.set_state(self._kept[0])
        _go_on(self._kept[1])
        if isinstance(self._kept[2], int):
            np.random.seed(self._kept[2])
        else:
            np.random.set_state(self._kept[2])
        for generator, (seed, offset) in zip(_generators(), self._kept[3], strict=False):
            if generator.initial_seed() != seed:
                generator.manual_seed(seed)
            if generator.get_offset() != offset:
                generator.set_offset(offset)


def aside(played: Iterator[Played]) -> Iterator[Played]:
    """What somebody else plays between two looks at it; whoever looks finds the global generators as they were."""
    mine = Turns()
    while True:
        mine.leave()
        try:
            made = next(played)
        except StopIteration:
            return
        finally:
            mine.take()
        yield made


def _generators() -> Sequence[Any]:
    """Generators of the GPUs in use: a seed and how far they are, which is all that they are."""
    return torch.cuda.default_generators if torch.cuda.is_initialized() else ()


def _devices() -> list[tuple[int, int]]:
    return [(one.initial_seed(), one.get_offset()) for one in _generators()]
