"""What Fed-SB's basis costs: seconds and memory of a square layer's leading triples, exact, randomised, or of factors.

    python experiments/language/basis.py            # prints the table of docs/language.md; minutes, one thread

Each figure is of a process of its own: the CPU time of one decomposition in float64, and by how much the process's
peak of memory rose over what the matrix (float32) had made it. The matrix is −sign of a random one, the flattest
spectrum that there is. `factors`: the matrix is a product of thin ones, as sketches that clients send are, of twice as
many triples, and is never made; of signs it could not be used.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

SIZES, RANKS, WAYS = (256, 1024, 4096), (16, 64), ("exact", "randomised", "factors")


def peak() -> float:
    """MB of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(size: int, rank: int, way: str) -> dict[str, float]:
    """One decomposition, in this process."""
    import torch

    from fedfuse.train.basis import energy
    from fedfuse.train.svd import leading, of_factors

    torch.set_num_threads(1)
    draw = torch.Generator().manual_seed(0)
    warm = torch.randn(64, 64, generator=draw)  # the library's own beginnings are not the layer's
    leading(warm, 4), leading(warm, 4, "randomised"), of_factors((warm[:, :8], warm[:8]), 4)
    if way == "factors":
        thin = torch.randn(size, 2 * rank, generator=draw), torch.randn(2 * rank, size, generator=draw)
    else:
        matrix = -torch.randn(size, size, generator=draw).sign()
    before, begun = peak(), time.process_time()
    u, _, vt = of_factors(thin, rank) if way == "factors" else leading(matrix, rank, way)
    seconds, memory = time.process_time() - begun, peak() - before
    # thin factors are of another matrix, of which exact triples keep another share
    return {"seconds": seconds, "MB": memory, **({} if way == "factors" else {"energy": energy(matrix, u, vt)})}


def table() -> None:
    """Measure everything, each in a process of its own, and print it."""
    print("| side | r | exact: s, MB | randomised: s, MB | of thin factors: s, MB | energy: exact, randomised |")
    print("|---|---|---|---|---|---|")
    for size in SIZES:
        for rank in RANKS:
            cells, kept = [], []
            for way in WAYS:
                command = [sys.executable, __file__, str(size), str(rank), way]
                found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                cells.append(f"{found['seconds']:.3f}, {found['MB']:.1f}")
                kept += [f"{found['energy']:.3f}"] if "energy" in found else []
            print(f"| {size} | {rank} | {' | '.join([*cells, ', '.join(kept)])} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
    else:
        table()
