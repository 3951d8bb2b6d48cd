"""No private name of Flower, Ray or torch is touched outside compat/."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")
FILES = sorted(
    path
    for room in ("fedfuse", "strategies")
    for path in (ROOT / room).rglob("*.py")
    if not any(part in ("compat", "experiments") or (room, part) == ("fedfuse", "strategies") for part in path.parts)
)
OTHERS = ("flwr", "ray", "torch")


def faults(source: str) -> list[str]:
    """Imports of private modules or names, attributes with an underscore that are theirs, writes to `__dict__`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            for name in names:
                theirs = name.split(".")[0] in OTHERS
                if theirs and any(part.startswith("_") and part != "__version__" for part in name.split(".")):
                    found.append(f"{line}: {name}")
                if name.startswith("flwr.") and not name.startswith(PUBLIC):
                    found.append(f"{line}: {name}")
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            base = ast.unparse(node.value)
            of_theirs = base.split(".")[0] in (*OTHERS, "nn", "message", "metadata", "reply", "module", "model")
            if node.attr.startswith("_") and not node.attr.startswith("__") and not own and of_theirs:
                found.append(f"{line}: {base}.{node.attr}")
            if node.attr == "__new__" and base != "super()":
                found.append(f"{line}: {base}.__new__")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if " " not in text and text.startswith(("flwr.super", "flwr.common", "ray._", "torch._")):
                found.append(f"{line}: {text!r}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if (
                isinstance(name, ast.Constant)
                and str(name.value).startswith("_")
                and not str(name.value).startswith("__")
            ):
                found.append(f"{line}: {node.func.id} {name.value}")
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            private = str(node.slice.value).startswith("_")
            if private and isinstance(node.value, ast.Attribute) and node.value.attr == "__dict__":
                found.append(f"{line}: __dict__[{node.slice.value!r}]")
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
        "Message.__new__(Message)",
        "import importlib\nimportlib.import_module('flwr.supernode.start_client_internal')",
        "getattr(raylet, '_port')",
    ],
)
def test_each_way_to_touch_one_is_seen(source: str) -> None:
    assert faults(source)
