"""How many clients are awake and trained at once: what a CPU's caches gain from, what a GPU's memory holds.

On a GPU nothing is guessed: one client's step is made once in a model of its own, the memory that it took is read off,
and stacks are the largest power of two of that which fits into a share of what is free. If it was too much all the
same, stacks are halved.
"""

from __future__ import annotations

import torch

from fedfuse.core.workspace import Workspace
from fedfuse.models.replicas import Replicas, nbytes
from fedfuse.train.abreast import Training
from fedfuse.train.abreast_steps import together
from fedfuse.train.task import task_step

AWAKE = 64  # clients that are awake at once, at most
ROOM = 64 * 2**20  # bytes of their replicas
STACK = 16 * 2**20  # bytes of weights that are trained at once; 8 to 16 clients gain most (docs/performance_history.md)
PLACES = 2560  # of texts that pass a common base at once: more leave the caches (docs/performance_history.md)
DEVICE_AWAKE = 512  # on a GPU, where every step costs its launches whatever it holds
SHARE = 0.7  # of a GPU's free memory
COPIES = 4  # of a client's weights, at most: themselves, gradients, and an optimiser's two moments


class Room:
    """What fits, and what was found not to."""

    def __init__(self) -> None:
        self._seats: dict[str, int] = {}
        self._most: dict[tuple[str, int], int] = {}  # by architecture and batch size

    def awake(self, workspace: Workspace) -> int:
        """How many clients may be awake at once, of whatever architecture."""
        return DEVICE_AWAKE if workspace.device.type == "cuda" else AWAKE

    def seats(self, workspace: Workspace, architecture: str) -> int:
        """How many clients of an architecture may be awake at once; 0 if none of its trainings fits together."""
        if workspace.forward(architecture) is None:
            return 0
        size = max(1, nbytes(workspace.model(architecture)))
        if workspace.device.type != "cuda":
            return 0 if 2 * size > STACK else min(AWAKE, ROOM // size)
        if architecture not in self._seats:  # before replicas take their part of what is free
            fits = int(available(workspace)) // (COPIES * size)
            self._seats[architecture] = 0 if fits < 2 else min(DEVICE_AWAKE, fits)
        return self._seats[architecture]

    def stack(self, workspace: Workspace, architecture: str, asked: Training) -> int:
        """How many trainings like this one may be made at once."""
        key = architecture, asked.batch_size
        if key not in self._most:
            if workspace.device.type == "cuda":
                self._most[key] = _halvable(
                    available(workspace) / max(1, self.measured(workspace, architecture, asked))
                )
            else:
                places = asked.batch_size * asked.x.shape[1] if _tokens(asked.x) else 1
                return max(1, min(STACK // max(1, nbytes(workspace.model(architecture))), PLACES // places))
        return self._most[key]

    def shrink(self, architecture: str, asked: Training, failed: int) -> None:
        """Remember that so many at once were too many."""
        self._most[architecture, asked.batch_size] = max(1, failed // 2)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def measured(self, workspace: Workspace, architecture: str, asked: Training) -> int:
        """Bytes that a step of one client takes on a GPU, its weights and what the optimiser keeps of them with it."""
        forward, device = workspace.forward(architecture), workspace.device
        assert forward is not None
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        replicas = Replicas(workspace.resident(architecture), 1)
        rows = min(len(asked.x), asked.batch_size)
        y = None if _tokens(asked.x) else torch.zeros(rows, dtype=torch.int64, device=device)
        loss = _of_places if y is None else task_step
        for parameter, own in zip(replicas.modules[0].parameters(), asked.model.parameters(), strict=True):
            parameter.requires_grad_(own.requires_grad)
        one = Training(
            replicas.modules[0], asked.x[:rows], y, loss, asked.config, ("measured",), 1, rows, 2, None, None, 2
        )
        together([(0, one)], replicas, forward)
        return torch.cuda.max_memory_allocated(device) - before


def available(workspace: Workspace) -> float:
    """Bytes of the GPU's memory that this process may fill: a share of what is free or only held ready by torch."""
    device, runtime = workspace.device, workspace.scenario.config.runtime
    ready = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    part = runtime.gpu_fraction if runtime.name == "ray" else 1.0
    return (torch.cuda.mem_get_info(device)[0] + ready) * SHARE * min(1.0, part)


def _tokens(x: torch.Tensor) -> bool:
    """Whether examples are texts, each of whose places passes the model as an example does."""
    return x.ndim == 2 and not x.is_floating_point()


def _of_places(logits: torch.Tensor, y: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    """What takes the memory of a cross-entropy, whatever there is to predict."""
    return logits.log_softmax(-1).mean()


def _halvable(count: float) -> int:
    """The largest power of two up to a number: small differences of what is free then change nothing."""
    return min(DEVICE_AWAKE, 1 << max(0, int(count).bit_length() - 1))
