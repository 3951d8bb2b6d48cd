"""Rules in the place of a mean (`defence=`): what n clients sent, some of whom may lie, as one value.

A rule takes points x (n × b × d, float64): n clients, b rows (of soft labels, one a transfer example; of weights, one
in all), d coordinates. Clients weigh alike: a count of examples is a client's word. With f liars reckoned with:

    median             each coordinate's; holds while liars are fewer than half
    geometric_median   per row argmin_m Σ_k ‖x_k − m‖₂, Weiszfeld's steps from the coordinates' median, at most 100,
                       until one is shorter than 1e-6 of the clients' median distance from m; fewer than half
    trimmed_mean       each coordinate's mean without the f least and the f greatest; n > 2f
    krum               the client whose n − f − 2 nearest are nearest; n ≥ 2f + 3
    multi_krum         the mean of the n − f best of these; n ≥ 2f + 3
    bulyan             of the n − 2f best by multi-Krum, per coordinate the mean of the n − 4f nearest to their median;
                       n ≥ 4f + 3
    cronus             per row: v the top eigenvector of the clients' covariance; without the ⌈f/2⌉ of largest
                       |⟨x_k − x̄, v⟩|, twice (the second time around what is left); n > 2f

Trimmed mean, Krum, multi-Krum and Bulyan are Flower's own functions. Krum's and Bulyan's choice is of clients, over all
rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

Rule = Callable[[Tensor, int], Tensor]  # (n × b × d, f) -> b × d
STEPS, SHORT, HERE = 100, 1e-6, 1e-9  # Weiszfeld's most steps; a last step and no distance, over the usual one


def mean(x: Tensor, f: int = 0) -> Tensor:
    """The plain mean."""
    return x.mean(0)


def median(x: Tensor, f: int = 0) -> Tensor:
    """Of an even number of clients, the middle of the two in the middle."""
    ordered = x.sort(0).values
    return (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2


def geometric_median(x: Tensor, f: int = 0) -> Tensor:
    """Weiszfeld's iteration, each row until it is done.

    It starts and ends by what a minority cannot move: from the mean, 100 steps do not come back from a liar who is far
    enough off, and beside his distance no fall of the sum of all is seen. Clients that lie on the centre are taken as
    Vardi and Zhang (2000) do.
    """
    centre, active = median(x), torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
    for _ in range(STEPS):
        distance = (x - centre).norm(dim=-1)
        usual = median(distance)
        here = distance <= HERE * usual
        weight = (1 / distance).masked_fill(here, 0.0)
        others = (weight[..., None] * x).sum(0) / weight.sum(0).clamp_min(1e-300)[..., None]
        pull = (weight[..., None] * (x - centre)).sum(0).norm(dim=-1)
        stay = (here.sum(0) / pull.clamp_min(1e-300)).clamp_max(1.0)[:, None]
        moved = stay * centre + (1 - stay) * others
        step = (moved - centre).norm(dim=-1)
        centre = torch.where(active[:, None], moved, centre)
        active &= step > SHORT * usual
        if not bool(active.any()):
            break
    return centre


def trimmed_mean(x: Tensor, f: int) -> Tensor:
    """Flower's `trim_mean`."""
    from fedfuse.compat.flower_robust import trim_mean

    # int(fraction·n) is how many Flower cuts; a quarter more, so that it is f whatever f/n rounds to
    return torch.from_numpy(trim_mean(x.cpu().numpy(), (f + 0.25) / len(x) if f else 0.0)).to(x.device)


def chosen(x: Tensor, f: int, keep: int) -> list[int]:
    """The clients that Flower's multi-Krum keeps, best first."""
    from fedfuse.compat.flower_robust import select_multikrum

    # Krum looks at differences alone; about the median, squares of what all have in common do not drown them
    near = (x - median(x)).flatten(1).cpu().numpy()
    contents = [RecordDict({"arrays": ArrayRecord({"x": Array(row)})}) for row in near]
    places = {id(content): i for i, content in enumerate(contents)}
    return [places[id(content)] for content in select_multikrum(contents, f, keep)]


def krum(x: Tensor, f: int) -> Tensor:
    """One client's value."""
    return x[chosen(x, f, 1)[0]]


def multi_krum(x: Tensor, f: int) -> Tensor:
    """The mean of n − f clients."""
    return x[sorted(chosen(x, f, len(x) - f))].mean(0)


def bulyan(x: Tensor, f: int) -> Tensor:
    """Flower's second step over its first."""
    from fedfuse.compat.flower_robust import aggregate_n_closest_weights

    kept = x[sorted(chosen(x, f, len(x) - 2 * f))]
    rows = [[one.cpu().numpy()] for one in kept]
    (out,) = aggregate_n_closest_weights([median(kept).cpu().numpy()], rows, len(x) - 4 * f)
    return torch.from_numpy(out).to(x.device)


def cronus(x: Tensor, f: int) -> Tensor:
    """Twice, each row loses the ⌈f/2⌉ clients farthest along the direction in which clients differ most."""
    kept, drop = x.transpose(0, 1), math.ceil(f / 2)  # b × n × d
    for _ in range(2 if drop else 0):
        centred = kept - kept.mean(1, keepdim=True)
        # of the n × n Gram matrix, whose top eigenvector u has |u_k| ∝ |⟨x_k − x̄, v⟩|; d may be millions
        u = torch.linalg.eigh(centred @ centred.transpose(1, 2)).eigenvectors[..., -1].abs()
        stay = u.argsort(dim=-1, stable=True)[:, : kept.shape[1] - drop].sort(-1).values
        kept = kept.gather(1, stay[..., None].expand(-1, -1, kept.shape[-1]))
    return kept.mean(1)


RULES: dict[str, Rule] = {
    "mean": mean, "median": median, "geometric_median": geometric_median, "trimmed_mean": trimmed_mean, "krum": krum,
    "multi_krum": multi_krum, "bulyan": bulyan, "cronus": cronus,
}  # fmt: skip
OF_CLIENTS = ("krum", "multi_krum", "bulyan")  # rules that choose among clients: all arrays of a record are one point


def least(rule: str, f: int) -> int:
    """Clients that a rule needs to hold against f liars."""
    if rule in ("krum", "multi_krum"):
        return 2 * f + 3
    if rule == "bulyan":
        return 4 * f + 3
    return 2 * f + 1 if rule in ("trimmed_mean", "cronus") else 1


def liars_among(clients: int, fraction: float) -> int:
    """The f that a rule reckons with: α·n, counted up."""
    return math.ceil(round(fraction * clients, 9))
