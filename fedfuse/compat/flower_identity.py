"""Who this process is to Flower: without an answer, it lets nobody make a `Message`.

Internal name of Flower 1.41: `flwr.supercore.task_identity.TaskIdentity`, a process-wide class with `run_id`,
`task_id` and `node_id`, which Flower's own runtimes set. It buys all: our engines are no runtime of Flower's, and
without an identity `Message(...)` raises in them. If the class is gone, so is the question, and nothing is claimed;
if messages are then refused for another reason, the first round says so. Guard: `tests/compat/test_flower.py`.
"""

from __future__ import annotations

try:
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:  # pragma: no cover - another Flower
    TaskIdentity = None  # type: ignore[assignment,misc]


def claim_identity() -> None:
    """Let `Message(...)` be made in this process: outside Flower's own runtimes nobody has said who we are."""
    if TaskIdentity is None:
        return
    for name in ("run_id", "task_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, 1)
