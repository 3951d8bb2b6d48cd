"""No private name of a dependency is touched outside compat/."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")
FILES = sorted(
    path
    for room in ("fedfuse", "strategies")
    for path in (ROOT / room).rglob("*.py")
    if not any(part in ("compat", "experiments") or (room, part) == ("fedfuse", "strategies") for part in path.parts)
)
OTHERS = ("flwr", "ray", "torch", "numpy", "hydra", "omegaconf", "opacus", "transformers", "peft", "tokenizers")
OBJECTS = ("np", "nn", "message", "metadata", "reply", "module", "layer", "model", "optimizer", "tensor")
DOCUMENTED = {"_replace", "_fields", "_asdict", "_make", "_exit"}  # of Python's named tuples, and of `os`


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name != "_"


@cache
def of_torch() -> frozenset[str]:
    """Private names of torch's modules, tensors and optimisers; nothing of ours may be called so."""
    weight = nn.Parameter(torch.ones(1))
    objects = (nn.Module(), nn.BatchNorm1d(1), weight, torch.optim.SGD([weight], 0.1))
    return frozenset(filter(private, (name for one in objects for name in dir(one))))


@cache
def of_ours() -> frozenset[str]:
    """Private names that a file outside compat/ defines, or assigns to on an object of its own."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls"):
                found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return frozenset(filter(private, found)) - of_torch()


def foreign(name: str) -> bool:
    """Whether a private name is nobody's of FedFuse, so that whoever reads it reads a dependency's."""
    return private(name) and name not in of_ours() and name not in DOCUMENTED


def faults(source: str) -> list[str]:
    """Where a source touches a private name of a dependency.

    These are imports of private modules or names; attributes, arguments and keys with an underscore that FedFuse does
    not define, or that are read from what is called like an object of a dependency; names of torch's in strings; and
    making an object without its `__init__`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            for name in (f"{module}.{alias.name}".strip(".") for alias in node.names):
                parts = name.split(".")
                if parts[0] in OTHERS and any(map(private, parts)):
                    found.append(f"{line}: {name}")
                if parts[0] == "flwr" and (not name.startswith(PUBLIC) or len(parts) > 4):
                    found.append(f"{line}: {name}")
        elif isinstance(node, ast.Attribute):
            base = ast.unparse(node.value)
            theirs = base.split(".")[0] in (*OTHERS, *OBJECTS) and private(node.attr) and node.attr not in DOCUMENTED
            if foreign(node.attr) or theirs:
                found.append(f"{line}: {base}.{node.attr}")
            if node.attr == "__new__" and base != "super()":
                found.append(f"{line}: {base}.__new__")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if " " not in text and text.startswith(("flwr.super", "flwr.common", "ray._", "torch._")):
                found.append(f"{line}: {text!r}")
            if text in of_torch():
                found.append(f"{line}: {text!r}")
        elif isinstance(node, ast.Call):
            names = [word.arg for word in node.keywords if word.arg]
            if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr", "delattr"):
                names += [str(one.value) for one in node.args[1:2] if isinstance(one, ast.Constant)]
            found += [f"{line}: {ast.unparse(node.func)} {name}" for name in names if foreign(name)]
        elif isinstance(node, ast.Subscript | ast.Dict):
            keys = node.keys if isinstance(node, ast.Dict) else [node.slice]
            names = [str(key.value) for key in keys if isinstance(key, ast.Constant)]
            found += [f"{line}: key {name!r}" for name in names if foreign(name)]
    return found


def test_no_private_name_is_touched_outside_the_cellar() -> None:
    assert len(FILES) > 150
    found = {str(path.relative_to(ROOT)): faults(path.read_text(encoding="utf-8")) for path in FILES}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from ray._private import services",
        "import torch._dynamo",
        "from torch.optim.optimizer import _global_optimizer_post_hooks",
        "from flwr.supercore.task_identity import TaskIdentity",
        "import torch\ntorch._foreach_copy_(a, b)",
        "message.metadata.__dict__['_message_id'] = 'm'",
        "module._parameters['w']",
        "one.two()._forward_hooks.clear()",
        "for kind in anything._buffers: ...",
        "self._non_persistent_buffers_set",
        "HOOKS = ('_forward_hooks', '_forward_pre_hooks')",
        "whatever._a_name_that_fedfuse_does_not_define",
        "ray.init(_temp_dir='/tmp')",
        "options['_system_config'] = {}",
        "options |= {'_system_config': {}}",
        "import numpy as np\nnp._core",
        "from flwr.serverapp.strategy.bulyan import aggregate_n_closest_weights",
        "Message.__new__(Message)",
        "import importlib\nimportlib.import_module('flwr.supernode.start_client_internal')",
        "getattr(raylet, '_port')",
    ],
)
def test_each_way_to_touch_one_is_seen(source: str) -> None:
    assert faults(source)
