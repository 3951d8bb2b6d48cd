"""One thread in every process that computes: the bits of a sum depend on how many share it."""

from __future__ import annotations


def single_thread() -> None:
    """Compute on one thread: equal bits on any number of workers, and the fastest for small models."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    threadpool_limits(1)
