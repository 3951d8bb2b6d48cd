"""torch's optimisers without what is wrapped around their methods.

Private names of torch 2.7 to 2.13: `torch.optim.optimizer._global_optimizer_pre_hooks` and
`_global_optimizer_post_hooks`, an optimiser's `_optimizer_step_pre_hooks` and `_optimizer_step_post_hooks`; and
`profile_hook_step`, which has no line in torch's documentation.

The wrappers that tell torch.compile to stay out import torch._dynamo at their first call, 2 s in every process that
trains. The profiler's labels take a quarter of a small client's time. If a name is gone, `bare` returns torch's own
class: slower, and the same. Guard: `tests/compat/test_torch.py`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

try:
    from torch.optim.optimizer import _global_optimizer_post_hooks as _post_hooks
    from torch.optim.optimizer import _global_optimizer_pre_hooks as _pre_hooks

    # asked of the class: making an optimiser would import torch's compiler
    KNOWN = hasattr(torch.optim.Optimizer, "profile_hook_step") and all(
        name in torch.optim.Optimizer.__annotations__
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    )
except ImportError:  # pragma: no cover - another torch
    KNOWN = False


def bare(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """An optimiser of torch's that pays for no wrapper; step hooks run where there are any."""
    if not KNOWN:
        return kind
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step")
    plainly: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    plain = torch.no_grad()(plainly["step"])
    hooked = kind.profile_hook_step(plain)

    def step(self: Any, closure: Any = None) -> Any:
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        return (hooked if own or _pre_hooks or _post_hooks else plain)(self, closure)

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        if not set_to_none:
            plainly["zero_grad"](self, False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    step.hooked = True  # type: ignore[attr-defined]  # torch wraps a class's `step` that does not say so
    return type(kind.__name__, (kind,), {**plainly, "step": step, "zero_grad": zero_grad})
