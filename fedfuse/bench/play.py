"""One contestant as a process: `python -m fedfuse.bench.play SIDE WORKLOAD CLIENTS`; a line of input is a turn."""

from __future__ import annotations

import sys

from fedfuse.bench import contestants, distillation, texts
from fedfuse.bench.contestants import COHORT, WORKLOADS, rounds, serve


def main(side: str, name: str, clients: int) -> None:
    """Run one contestant."""
    workload = WORKLOADS[name]
    grid = "inline" if side.startswith("inline") else "ray"
    words = ("runtime.vectorize=auto",) if side.endswith("abreast") else ()
    if workload.strategy != "fedavg":
        contest = texts if workload.strategy == "fed_sb" else distillation
        if side == "plain":
            serve(rounds(contest.plain_side(workload, clients)))
        else:
            serve(rounds(contest.fedfuse_side(workload, clients, grid, *words)))
    elif side == "flower":
        contestants.flower_side(name, clients)
    elif side == "guest":
        contestants.guest_side(name, clients)
    elif side == "plain":
        serve(rounds(contestants.plain_side(workload, clients)))
    elif side == "cores":
        serve(contestants.cores_side(name, clients))
    elif side.startswith("share-"):  # of `cores`
        serve(rounds(contestants.plain_side(workload, clients, int(side.removeprefix("share-")))))
    elif side == "pfl":
        from fedfuse.bench.pfl import pfl_side

        pfl_side(workload)
    else:
        serve(rounds(contestants.fedfuse_side(workload, clients, grid, COHORT, *words)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
