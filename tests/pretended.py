"""A device that is not there: tensors told to be on it lie on the CPU, and what a device refuses is refused.

A real device refuses to mix its tensors with the CPU's, to be indexed into by what is elsewhere, and to be read as
NumPy's. Every torch function passes by here; where a tensor is said to be is written on the tensor. Gradients that
torch's engine makes are nowhere until they are seen with something that is somewhere, and then are where that is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

THERE, HERE = torch.device("xpu"), torch.device("cpu")
# what takes tensors from elsewhere: copies, and whatever hands one over
COPIES = {Tensor.copy_, torch._foreach_copy_, Tensor.__setitem__, Tensor.data.__set__, Tensor.grad.__set__}  # type: ignore
UNREADABLE = {Tensor.numpy, Tensor.__array__, torch.utils.dlpack.to_dlpack}


class Mixed(RuntimeError):
    """Tensors of two devices met."""


class Pretended(TorchFunctionMode):
    """While it is entered, `THERE` is a device.

    Attributes
    ----------
    moved : int
        Tensors that were sent there.
    """

    moved = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return THERE if _place(first) == THERE else HERE
        if func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return _place(first) != THERE
        if func in UNREADABLE and _place(first) == THERE:
            raise TypeError("can't convert a tensor of another device to numpy")
        if func in (Tensor.to, Tensor.cpu):
            return self._sent(func, first, args[1:], kwargs)
        wanted = kwargs.get("device")
        if wanted is not None:
            wanted = kwargs["device"] = torch.device(wanted)
            if wanted == THERE:
                kwargs["device"] = HERE
                if kwargs.get("generator") is not None:
                    raise Mixed(f"{func.__name__}: a CPU generator, and a result on another device")
        found = list(_tensors((args, list(kwargs.values()))))
        places = {_place(one) for one in found if one.ndim or _place(one) == THERE} - {None}
        if len(places) > 1 and func not in COPIES and not (func == Tensor.__getitem__ and _place(first) == THERE):
            raise Mixed(f"{func.__name__}: expected all tensors to be on the same device")
        if THERE in places and isinstance(kwargs.get("generator"), torch.Generator):
            raise Mixed(f"{func.__name__}: a CPU generator for a tensor on another device")
        if wanted is None:
            wanted = _place(first) if func in COPIES or func == Tensor.__getitem__ else None
            wanted = wanted or (places.pop() if places else None if found and found[0].ndim else HERE)
        out = func(*args, **kwargs)
        if func == Tensor.data.__set__ and isinstance(args[1], Tensor):  # type: ignore[attr-defined]
            first.place = _place(args[1])  # type: ignore[union-attr]
        for one in _tensors([out]):
            if _place(one) is None or one is not first:
                one.place = wanted  # type: ignore[attr-defined]
        return out

    def _sent(self, func: Any, tensor: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """What `to` and `cpu` return: another tensor, if it is to go somewhere else."""
        rest: list[Any] = []
        target = HERE if func is Tensor.cpu else None
        for word in (*args, kwargs.pop("device", None)):
            if isinstance(word, Tensor):
                target, rest = _place(word), [*rest, word.dtype]
            elif isinstance(word, str | torch.device):
                target = torch.device(word)
            elif word is not None:
                rest.append(word)
        kwargs.pop("non_blocking", None)
        rest = [word for word in rest if not isinstance(word, bool)]
        out = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        place = _place(tensor) if target is None else target
        if out is tensor and place != (_place(tensor) or place):
            out = tensor.clone()
        self.moved += place == THERE
        if out is not tensor or _place(out) is None:
            out.place = place
        return out


def _place(tensor: Any) -> Any:
    return getattr(tensor, "place", None)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
