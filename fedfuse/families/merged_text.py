"""What models say of public rows, where tokens are joined until both sides close at the same byte, in two vocabularies.

A record is `public_text`'s and beside it `own` (n × P): the log-probability that a model gives each place's own token.
By it a receiver's groups are taught: at the place where one closes stand the k likeliest last tokens of the teacher, in
the teacher's ids, and the probability that it gives to the group's beginning (`next_token.merged`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedfuse.core.texts import Places, Texts
from fedfuse.data import alignment
from fedfuse.families import public_text
from fedfuse.families.public_text import Said
from fedfuse.train import next_token
from fedfuse.train.next_token import NOBODY, TINY
from fedfuse.train.objective import Loss
from fedfuse.wire.records import Arrays, InvalidArrays, Layout, Scope


def said(places: Places, logits: Tensor, k: int) -> Arrays:
    """What a model says of rows, from its logits."""
    own = next_token.chain(places.log_p(logits), places.tokens.clamp_min(0))
    return {**public_text.said(places, logits, k), "own": own.masked_fill(~places.counted, 0).float()}


def said_arrays(scope: Scope) -> Layout:
    """Layout of a record."""
    return {**public_text.said_arrays(scope), "own": ("float32", (scope.dims["subset"], scope.dims["places"]))}


def taught_arrays(scope: Scope) -> Layout:
    """Layout of what an architecture is taught: ids are of any vocabulary, `teacher` says of which."""
    rows, places, k = scope.dims["subset"], scope.dims["places"], scope.hyper.k
    return {
        "p": ("float32", (rows, places, k)),
        "ids": ("int32", (rows, places, k)),
        "beginning": ("float32", (rows, places)),
        "teacher": ("int16", (rows,)),
        "bits": ("float32", (rows,)),
    }


def examine(name: str, arrays: Arrays, vocabulary: int) -> None:
    """Refuse a record that `public_text.examine` refuses, or whose own tokens are likelier than certain.

    Raises
    ------
    InvalidArrays
        Naming the array.
    """
    public_text.examine(name, arrays, vocabulary)
    if bool((arrays["own"] > 0).any()):
        raise InvalidArrays(f"{name}/own: no logarithms of probabilities")


def taught(texts: Texts, name: str, said: Sequence[Said], rows: Tensor, known: Sequence[str]) -> Arrays:
    """Of each row what the model of the fewest bits says, at the places where an architecture's groups close.

    Parameters
    ----------
    texts : Texts
        Of a workspace.
    name : str
        The architecture that is taught.
    rows : Tensor
        Of the transfer set.
    known : sequence of str
        The architectures, by the numbers that `teacher` holds.
    """
    bits = torch.stack([one.arrays["bits"].double().cpu() for one in said])
    best = bits.argmin(0)
    places, others = texts.places(name, rows), {one.architecture: texts.places(one.architecture, rows) for one in said}
    k = said[0].arrays["p"].shape[-1]
    p = torch.zeros(*places.tokens.shape, k)
    ids = torch.full(p.shape, NOBODY, dtype=torch.int32)
    beginning = torch.zeros(places.tokens.shape)
    for row, winner in enumerate(best.tolist()):
        one = said[winner]
        mine, theirs = (_ends(each, row) for each in (places, others[one.architecture]))
        found = alignment.groups(mine[1].numpy(), theirs[1].numpy())
        last, other_first, other_last = (
            torch.from_numpy(each) for each in (found.last, found.other_first, found.other_last)
        )
        at, there = mine[0][last], theirs[0][other_last]
        before = torch.cat([torch.zeros(1).double(), one.arrays["own"][row].double().cpu()[theirs[0]].cumsum(0)])
        start = torch.where(other_first == other_last, 0.0, before[other_last] - before[other_first])
        beginning[row, at] = start.exp().clamp_min(TINY).float()
        p[row, at], ids[row, at] = one.arrays["p"][row].cpu()[there], one.arrays["ids"][row].cpu()[there].int()
    teacher = torch.tensor([known.index(said[i].architecture) for i in best.tolist()], dtype=torch.int16)
    return {"p": p, "ids": ids, "beginning": beginning, "teacher": teacher, "bits": bits.amin(0).float()}


def _ends(places: Places, row: int) -> tuple[Tensor, Tensor]:
    """The places of a row that count, and where their tokens end."""
    here = places.counted[row].cpu().nonzero()[:, 0]
    return here, places.ends[row].cpu()[here]


def whole(p: Tensor, ids: Tensor, beginning: Tensor, vocabulary: int) -> Tensor:
    """Distributions of groups (G, V + 1) from the k likeliest last tokens, and what is left to 1 in the last column.

    What the k leave is spread evenly over the other tokens: of all distributions with these k the one that says least.
    """
    named = ids != NOBODY
    count = named.sum(1, keepdim=True)
    p = p.masked_fill(~named, 0)
    even = (1 - p.sum(1, keepdim=True)).clamp_min(0) / (vocabulary - count).clamp_min(1)
    out = even.expand(-1, vocabulary + 1).clone()  # the last column is nobody's, for a while
    out = out.scatter(1, torch.where(named, ids, vocabulary), torch.where(named, p, 0))
    return torch.cat([out[:, :vocabulary] * beginning[:, None], (1 - beginning[:, None]).clamp_min(0)], 1)


def lesson(
    places: Places,
    lesson: Arrays,
    rows: Tensor,
    losses: Mapping[int, tuple[Loss, int]],
    labels: float,
    others: float,
) -> Callable[..., Tensor]:
    """labels · CE(labels) + others · loss(teacher, softmax z) over groups, of a batch: `step(logits, labels, rows)`.

    Parameters
    ----------
    places : Places
        Of all rows.
    lesson : dict
        What `taught` gave.
    rows : Tensor
        Which of them have something to teach (n, bool).
    losses : mapping
        By teacher: the objective, which knows both vocabularies, and the size of the teacher's.
    """
    device = places.x.device
    beginning = lesson["beginning"].to(device)
    p, ids, teacher = lesson["p"].to(device), lesson["ids"].to(device).long(), lesson["teacher"].tolist()

    def groups(log_p: Tensor, row: int) -> tuple[Tensor, Tensor]:
        at = (beginning[row] > 0).nonzero()[:, 0]
        start = (places.counted[row] & (places.ends[row] > 0)).nonzero()[:1, 0]
        first = torch.cat([start, at[:-1] + 1])
        student = next_token.merged(log_p, places.tokens[row].clamp_min(0), first, at)
        _, size = losses[teacher[row]]
        return student, whole(p[row, at].to(log_p.dtype), ids[row, at], beginning[row, at].to(log_p.dtype), size)

    def step(logits: Tensor, _: Tensor | None, batch: Tensor) -> Tensor:
        log_p = places.log_p(logits)
        value = public_text.of_labels(places, logits, log_p, batch, labels)
        apart: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for i, row in enumerate(batch.tolist()):
            if others and bool(rows[row]) and bool((beginning[row] > 0).any()):
                apart.setdefault(teacher[row], []).append(groups(log_p[i], row))
        total = sum(len(student) for pairs in apart.values() for student, _ in pairs)
        for number, pairs in apart.items():
            student, wanted = (torch.cat(side) for side in zip(*pairs, strict=True))
            share = others * len(student) / total
            value = value + share * losses[number][0].from_probabilities(student, wanted)
        return value

    return step
