"""Clients on a GPU: together, one at a time, and in a bare torch loop; how much of the device they use, and whether
what comes out is the same.

    python -m fedfuse.bench.gpu [--device cuda] [--seconds 20] [--out gpu.json] [--small]

Sides take turns in one process; ratios are medians over rounds. `--small` plays tiny sizes, to see that it runs.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedfuse.bench import contestants
from fedfuse.bench.contestants import EXAMPLES, WORKLOADS, Workload, build, fedfuse_side, plain_side
from fedfuse.core import abreast
from fedfuse.train import work
from fedfuse.train.abreast_layers import stacked

AUTO = "runtime.vectorize=auto"
WARM, LEAST, MOST = 2, 3, 25
CONTESTS = (("mlp", 50), ("cnn", 50), ("mlp", 500), ("cnn", 500))


def synchronized(device: str) -> None:
    """Wait until the device has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


def contest(name: str, cohort: int, clients: int, device: str, seconds: float) -> dict[str, Any]:
    """Let the three sides take turns.

    Returns
    -------
    dict
        Milliseconds a client (median of rounds) by side, `ratio`s of each to `auto` within rounds, TFLOP/s of `auto`
        over a whole round and over the stacks alone, and the most memory that was taken.
    """
    workload = WORKLOADS[name]
    sides: dict[str, Callable[[], None]] = {
        "auto": fedfuse_side(workload, clients, "inline", cohort, AUTO, device=device),
        "off": fedfuse_side(workload, clients, "inline", cohort, device=device),
        "loop": plain_side(workload, clients, cohort, device),
    }
    took: dict[str, list[float]] = {side: [] for side in sides}
    inside: list[float] = []
    began, peak = time.perf_counter(), 0
    with StacksTimed(device) as stacks:
        for played in range(WARM + MOST):
            if played >= WARM + LEAST and time.perf_counter() - began > seconds:
                break
            for side, play in sides.items():
                if side != "auto" and played == 0:
                    continue  # what is built in the first round is built in the second as well
                stacks.clear()
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                synchronized(device)
                started = time.perf_counter()
                play()
                synchronized(device)
                took[side].append(time.perf_counter() - started)
                if side == "auto":
                    inside.append(sum(second for _, second in stacks))
                    sizes = [size for size, _ in stacks]
                    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    warm = {side: values[WARM if side == "auto" else WARM - 1 :] for side, values in took.items()}
    flops = EXAMPLES * flops_of(workload)
    whole, alone = statistics.median(warm["auto"]), statistics.median(inside[WARM:])
    return {
        "workload": name, "cohort": cohort, "clients": clients, "rounds": len(warm["auto"]), "stacks": sizes,
        "ms_per_client": {side: statistics.median(values) / cohort * 1e3 for side, values in warm.items()},
        "best_ms_per_client": {side: min(values) / cohort * 1e3 for side, values in warm.items()},
        "ms_per_client_in_stacks": alone / cohort * 1e3,
        "ratio_to_auto": {
            side: statistics.median(a / b for a, b in zip(values, warm["auto"], strict=True))
            for side, values in warm.items()
        },
        "mflops_per_client": flops / 1e6,
        "tflops": flops * cohort / whole / 1e12, "tflops_in_stacks": flops * cohort / max(alone, 1e-9) / 1e12,
        "peak_memory_mb": peak / 1e6,
    }  # fmt: skip


class StacksTimed:
    """Notes size and seconds of every stack that is made inside."""

    def __init__(self, device: str) -> None:
        self.device, self.found = device, list[tuple[int, float]]()

    def __enter__(self) -> list[tuple[int, float]]:
        """Begin."""
        self.real = abreast.together

        def timed(asked: Sequence[Any], *rest: Any) -> Any:
            synchronized(self.device)
            started = time.perf_counter()
            made = self.real(asked, *rest)
            synchronized(self.device)
            self.found.append((len(asked), time.perf_counter() - started))
            return made

        abreast.together = timed  # type: ignore[assignment]
        return self.found

    def __exit__(self, *_: object) -> None:
        """Put everything back."""
        abreast.together = self.real


def flops_of(workload: Workload) -> int:
    """FLOPs of one example, forward and backward."""
    return work.flops(build(workload), torch.zeros(1, *workload.shape), True)


def ceiling(device: str, side: int) -> dict[str, float]:
    """TFLOP/s of one large product, with float32's own units and, on CUDA, with TF32."""
    found = {}
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    for name, allowed in (("float32", False), ("tf32", True)):
        torch.backends.cuda.matmul.allow_tf32 = allowed
        times = []
        for _ in range(8):
            synchronized(device)
            started = time.perf_counter()
            a @ b
            synchronized(device)
            times.append(time.perf_counter() - started)
        found[name] = 2 * side**3 / statistics.median(times[3:]) / 1e12
        if device != "cuda":
            break
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def agreement(name: str, device: str, clients: int, rounds: int) -> dict[str, Any]:
    """Play the same rounds together and one at a time: how far apart are the models, and how good.

    Returns
    -------
    dict
        `difference`: largest difference of a parameter over the largest parameter; `accuracy` of both on examples
        that a random linear teacher has labelled, as all clients' were; `twice`: whether `auto` gave the same bits
        when it was played again.
    """
    workload, models, right = WORKLOADS[name], [], []
    teacher = torch.randn(torch.Size(workload.shape).numel(), 10, generator=torch.Generator().manual_seed(7))

    def taught(asked: Workload) -> tuple[Any, Any]:
        x, _ = original(asked)
        return x, (torch.from_numpy(x).flatten(1) @ teacher).argmax(1).numpy()

    original, contestants.pool = contestants.pool, taught  # type: ignore[assignment]
    try:
        x, y = (torch.from_numpy(one) for one in taught(workload))
        for words in ((AUTO,), (AUTO,), ()):
            play = fedfuse_side(workload, clients, "inline", clients, *words, device=device)
            for _ in range(rounds):
                play()
            arrays = {k: v.clone() for k, v in play.strategy.board.items["model", ""].arrays.items()}  # type: ignore[attr-defined]
            models.append(arrays)
            net = build(workload)
            net.load_state_dict(arrays)
            with torch.no_grad():
                right.append(float((net(x).argmax(1) == y).float().mean()))
    finally:
        contestants.pool = original
    first, again, alone = models
    most = max(float(value.abs().max()) for value in alone.values())
    apart = max(float((first[key] - alone[key]).abs().max()) for key in alone)
    return {
        "workload": name, "rounds": rounds, "clients": clients, "difference": apart / most,
        "accuracy": {"auto": right[0], "off": right[2]},
        "twice": all(torch.equal(first[key], again[key]) for key in first),
    }  # fmt: skip


def bits_by_size(name: str, device: str, sizes: Sequence[int]) -> dict[str, bool]:
    """Whether a client's output and gradient have the same bits in stacks of every size as in the largest."""
    workload = WORKLOADS[name]
    net = build(workload).to(device)
    forward = stacked(net)
    assert forward is not None
    most = max(sizes)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(most, 10, *workload.shape, generator=draw).to(device)
    stacks = {k: (1 + 0.1 * torch.randn(most, *v.shape, generator=draw)).to(device) * v for k, v in _named(net)}
    found: dict[int, list[Any]] = {}
    for size in sizes:
        leaves = {k: v[:size].detach().requires_grad_() for k, v in stacks.items()}
        out = forward(leaves, x[:size])
        out.square().sum().backward()
        found[size] = [out.detach(), *(leaf.grad for leaf in leaves.values())]
    whole = found[most]
    return {str(size): all(torch.equal(a, b[:size]) for a, b in zip(found[size], whole, strict=True)) for size in sizes}


def _named(net: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, value.detach()) for name, value in net.named_parameters()]


def kernels(device: str, clients: int) -> list[dict[str, Any]]:
    """Convolutions of the CNN forward and backward, as products over windows, as one grouped call, one by one: ms."""
    import torch.nn.functional as F

    from fedfuse.train.abreast_images import windows_products

    out = []
    for channels, outputs, side in ((1, 32, 28), (32, 64, 14)):
        x = torch.randn(clients, 10, side, side, channels, device=device).movedim(-1, 2).requires_grad_(channels > 1)
        w = torch.randn(clients, outputs, channels, 5, 5, device=device, requires_grad=True)
        b = torch.randn(clients, outputs, device=device, requires_grad=True)

        def grouped(x: Any = x, w: Any = w, b: Any = b) -> Any:
            flat = x.transpose(0, 1).flatten(1, 2)
            return F.conv2d(flat, w.flatten(0, 1), b.flatten(), padding=2, groups=len(w))

        def each(x: Any = x, w: Any = w, b: Any = b) -> Any:
            return torch.stack([F.conv2d(*one, padding=2) for one in zip(x, w, b, strict=True)])

        def windows(x: Any = x, w: Any = w, b: Any = b) -> Any:
            return windows_products(x, w, b, (2, 2))

        times = {}
        for name, call in (("windows", windows), ("grouped", grouped), ("each", each)):
            taken = []
            for _ in range(6):
                synchronized(device)
                started = time.perf_counter()
                call().sum().backward()
                synchronized(device)
                taken.append(time.perf_counter() - started)
            times[name] = statistics.median(taken[2:]) * 1e3
        out.append({"channels": [channels, outputs], "clients": clients, "ms": times})
    return out


def profiled(name: str, cohort: int, clients: int, device: str) -> list[str]:
    """Where the processor's time goes in a few rounds of `auto`, by function."""
    play = fedfuse_side(WORKLOADS[name], clients, "inline", cohort, AUTO, device=device)
    for _ in range(2):
        play()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(3):
        play()
    profile.disable()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(45)
    return [line[:150] for line in text.getvalue().splitlines() if line.strip()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and write the figures down after each part."""
    asked = argparse.ArgumentParser(prog="python -m fedfuse.bench.gpu")
    asked.add_argument("--device", default="cuda")
    asked.add_argument("--seconds", type=float, default=15.0, help="for each contest")
    asked.add_argument("--out", default="gpu.json")
    asked.add_argument("--only", default="", help="parts whose names begin with one of these words, parted by commas")
    asked.add_argument("--small", action="store_true")
    options = asked.parse_args(argv)
    torch.set_num_threads(1)
    device, small, out = options.device, options.small, Path(options.out)
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    results: dict[str, Any] = {"device": gpu, "torch": torch.__version__, "contests": [], "failed": {}}
    began = time.perf_counter()

    def part(name: str, make: Callable[[], Any]) -> None:
        if not name.startswith(tuple(options.only.split(","))):
            return
        try:
            found = make()
            if name.startswith("contest "):
                results["contests"].append(found)
            else:
                results[name] = found
            print(f"{time.perf_counter() - began:6.1f} s  {name}: {json.dumps(found)[:1500]}", flush=True)
        except Exception as error:  # the other parts shall be measured all the same
            import traceback

            results["failed"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        results["seconds"] = time.perf_counter() - began
        out.write_text(json.dumps(results, indent=1))

    part("ceiling", partial(ceiling, device, 256 if small else 8192))
    sizes = (1, 2, 3) if small else (1, 2, 8, 50, 64, 500)
    for name in ("mlp", "cnn"):
        part(f"bits {name}", partial(bits_by_size, name, device, sizes))
        part(f"agreement {name}", partial(agreement, name, device, 3 if small else 50, 1 if small else 10))
    part("kernels", partial(kernels, device, 2 if small else 64))
    for name, cohort in CONTESTS:
        cohort, clients = (3, 5) if small else (cohort, 1000)
        part(f"contest {name}@{cohort}", partial(contest, name, cohort, clients, device, options.seconds))
    for name in ("mlp", "cnn"):
        part(f"profile {name}", partial(profiled, name, 3 if small else 50, 5 if small else 1000, device))
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
