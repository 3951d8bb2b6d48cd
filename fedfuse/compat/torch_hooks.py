"""Hooks on what passes forward and backward through a module: whether it has any, and a while in which none is called.

Private names of torch 2.7 to 2.13: a module's `_forward_pre_hooks`, `_forward_hooks`, `_backward_pre_hooks` and
`_backward_hooks`. They buy two things. A model with a hook is trained by itself: a computation of many models at once
would pass the hook by. And a pass in which FLOPs are counted calls no hook, as a strategy's hooks add up what passes.
If a name is gone, each module is taken for one that has hooks, and hooks are called in a counted pass too. Guard:
`tests/compat/test_torch.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache

from torch import nn

_ON_PASSES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@cache
def known() -> bool:
    """Whether torch keeps a module's hooks where we know them."""
    return vars(nn.Module()).keys() >= set(_ON_PASSES)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook is called when something passes through this module itself; those inside it are not looked at."""
    own = vars(module)
    return not known() or any(own[name] for name in _ON_PASSES)


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Take the hooks off a model and all modules inside it for a while."""
    names = _ON_PASSES if known() else ()
    taken = [(vars(module), name, vars(module)[name]) for module in model.modules() for name in names]
    for own, name, hooks in taken:
        own[name] = type(hooks)()
    try:
        yield
    finally:
        for own, name, hooks in taken:
            own[name] = hooks
