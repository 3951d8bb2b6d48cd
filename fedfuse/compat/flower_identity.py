"""Who this process is to Flower: outside Flower's own runtimes nobody has said so, and `Message(...)` refuses."""

from __future__ import annotations

from flwr.supercore.task_identity import TaskIdentity


def claim_identity() -> None:
    """Let `Message(...)` be made in this process: outside Flower's own runtimes nobody has said who we are.

    Flower 1.41 keeps this in a private, process-wide class; this function is the only place that touches it.
    """
    for name in ("run_id", "task_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, 1)
