"""What models say of public rows, exchanged between tokenisers: the k likeliest of each place, aligned by bytes.

A record holds p (n × P × k) and their ids, and the bits of each row (n,), in the places and tokens of one architecture.
Two places are partners if their tokens cover the same bytes; or, *coarse*, if their tokens start at the same byte, and
then what both say of the next byte is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fedfuse.core.texts import Places, Texts
from fedfuse.data import alignment
from fedfuse.train import next_token
from fedfuse.train.next_token import NO_BYTE, NOBODY
from fedfuse.train.objective import Loss
from fedfuse.wire.records import Arrays, InvalidArrays, Layout, Scope


def id_type(vocabulary: int) -> torch.dtype:
    """The type that ids of a vocabulary and of bytes travel as."""
    return next_token.id_type(vocabulary + 1 + NO_BYTE)


def said(places: Places, logits: Tensor, k: int) -> Arrays:
    """What a model says of rows, from its logits."""
    log_p = places.log_p(logits)
    p, ids = next_token.compress(log_p, k)
    bits = next_token.bits(log_p, places.tokens, places.counted)
    return {"p": p.float(), "ids": ids.to(id_type(places.vocabulary)), "bits": bits.float()}


def said_arrays(scope: Scope) -> Layout:
    """Layout of a record, for a strategy with the hyper-parameters `subset` and `k`."""
    rows, places, k = scope.dims["subset"], scope.dims["places"], scope.hyper.k
    ids = str(id_type(scope.dims["vocabulary"])).removeprefix("torch.")
    return {"p": ("float32", (rows, places, k)), "ids": (ids, (rows, places, k)), "bits": ("float32", (rows,))}


taught_arrays = said_arrays  # what is taught is laid out as what is said


def examine(name: str, arrays: Arrays, vocabulary: int) -> None:
    """Refuse a record of what is no probability, no token, or a token twice.

    Raises
    ------
    InvalidArrays
        Naming the array.
    """
    p, ids, bits = arrays["p"], arrays["ids"], arrays["bits"]
    if bool((p < 0).any()) or bool((p.sum(-1) > 1 + 1e-3).any()):
        raise InvalidArrays(f"{name}/p: no probabilities")
    if bool(((ids < NOBODY) | (ids >= vocabulary)).any()):
        raise InvalidArrays(f"{name}/ids: allowed is {NOBODY} to {vocabulary - 1}")
    ordered = ids.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != NOBODY)).any()):
        raise InvalidArrays(f"{name}/ids: a token twice at a place")
    if bool((bits < 0).any()):
        raise InvalidArrays(f"{name}/bits: negative")


class Said(NamedTuple):
    """One model's record, and what its sender's share counts for."""

    architecture: str
    arrays: Arrays
    weight: float = 1.0


def aligned(
    texts: Texts, name: str, one: Said, rows: Tensor, *, coarse: bool, unmatched_label: bool
) -> tuple[Tensor, Tensor]:
    """What a model says in the places and tokens of another architecture: p and ids (n × P × k), float64.

    Parameters
    ----------
    texts : Texts
        Of a workspace.
    name : str
        The other architecture.
    one : Said
    rows : Tensor
        Of the transfer set.
    coarse : bool
        Whether next bytes are compared; else tokens, which map by least edit distance. Equal tokenisers are as they
        are, unless coarse.
    unmatched_label : bool
        Whether a place without a partner gets its own token (coarse: the byte it starts with) with probability 1; else
        it is empty.
    """
    p, ids = one.arrays["p"].double().cpu(), one.arrays["ids"].long().cpu()
    mine, theirs = texts.pieces(name), texts.pieces(one.architecture)
    if mine == theirs and not coarse:
        return p, ids
    places, others = texts.places(name, rows), texts.places(one.architecture, rows)
    out_p = torch.zeros(*places.tokens.shape, p.shape[-1], dtype=torch.float64)
    out_ids = torch.full(out_p.shape, NOBODY)
    if unmatched_label:
        tokens = places.tokens.cpu().clamp_min(0)
        out_ids[..., 0] = _bytes_of(mine)[tokens] if coarse else tokens
        out_p[..., 0] = 1.0
    to = _bytes_of(theirs) if coarse else _nearest(theirs, mine)
    for row in range(len(out_p)):
        i, j = partners(places, others, row, coarse)
        out_p[row, i], out_ids[row, i] = next_token.remapped(p[row, j], ids[row, j], to)
    return out_p, out_ids


def partners(mine: Places, theirs: Places, row: int, coarse: bool) -> tuple[Tensor, Tensor]:
    """Places of a row, one a side: of tokens that cover the same bytes, or, coarse, that start at the same byte."""
    counted = [one.counted[row].cpu() for one in (mine, theirs)]
    ends = [one.ends[row].cpu()[here].numpy() for one, here in zip((mine, theirs), counted, strict=True)]
    if coarse:
        found = alignment.same_start(*ends)
    else:
        groups = alignment.groups(*ends)
        found = groups.last[groups.single], groups.other_last[groups.single]
    first, second = (here.nonzero()[:, 0][torch.from_numpy(at)] for here, at in zip(counted, found, strict=True))
    return first, second


@cache
def _nearest(pieces: tuple[bytes, ...], others: tuple[bytes, ...]) -> Tensor:
    return torch.from_numpy(alignment.vocabulary_map(pieces, others))


@cache
def _bytes_of(pieces: tuple[bytes, ...]) -> Tensor:
    first = next_token.first_bytes(pieces)
    return next_token.byte_ids(first.masked_fill(first == NO_BYTE, NOBODY))


def best(bits: Tensor) -> Tensor:
    """Weights (M × n) that are 1 for the model of the fewest bits of each row, the first of equals."""
    return torch.zeros_like(bits).scatter(0, bits.argmin(0, keepdim=True), 1)


def nats(bits: Tensor, sizes: Tensor) -> Tensor:
    """Nats per byte of rows (M × n) of `sizes` bytes (n,)."""
    return bits * math.log(2) / sizes.clamp_min(1)


def by_perplexity(bits: Tensor, sizes: Tensor, tau: float, worth: Tensor | None = None) -> Tensor:
    """PackLLM's weights (M × n), λ_m = softmax(−CE_m/τ), with CE in nats per byte: rows (M × n) have `sizes` bytes."""
    return (-nats(bits, sizes) / tau + (0 if worth is None else worth.log()[:, None])).softmax(0)


def mixture(parts: list[tuple[Tensor, Tensor]], w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Σ_m w_m(x)·p_m at each place, over those who say something there; of it the k likeliest (n × P × k).

    Parameters
    ----------
    parts : list
        p and ids (n × P × k) of each model, aligned.
    w : Tensor
        Weights (M × n), which sum to 1.
    """
    there = torch.stack([p.sum(-1) > 0 for p, _ in parts])
    worth = w[..., None] * there
    worth = worth / torch.where(worth.sum(0) > 0, worth.sum(0), 1)
    p = torch.cat([one * weight[..., None] for (one, _), weight in zip(parts, worth, strict=True)], -1)
    ids = torch.cat([one for _, one in parts], -1).masked_fill(p == 0, NOBODY)
    rows = [next_token.gathered(a, b) for a, b in zip(p, ids, strict=True)]
    return torch.stack([a[:, :k] for a, _ in rows]), torch.stack([b[:, :k] for _, b in rows])


def mixtures(texts: Texts, said: Sequence[Said], w: Tensor, rows: Tensor, k: int) -> Iterator[Arrays]:
    """For each model the mixture of all, in its own tokens (p and ids), by weights (M × M × n) of each row."""
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    last: dict[str, tuple[Tensor, Arrays]] = {}  # models of an architecture often want the same
    for one, mine in zip(said, w, strict=True):
        name = one.architecture
        if name not in parts:
            parts[name] = [aligned(texts, name, other, rows, coarse=False, unmatched_label=False) for other in said]
        if name not in last or not torch.equal(last[name][0], mine):
            p, ids = mixture(parts[name], mine, k)
            last[name] = mine, {"p": p.float(), "ids": ids.to(id_type(len(texts.pieces(name))))}
        yield last[name][1]


def of_labels(places: Places, logits: Tensor, log_p: Tensor, batch: Tensor, weight: float) -> Tensor:
    """weight · CE of the rows' own next tokens; a zero with a gradient where nothing is asked for."""
    counted, value = places.counted[batch], logits.sum() * 0
    if weight and bool(counted.any()):
        value = value - weight * next_token.chain(log_p[counted], places.tokens[batch][counted]).mean()
    return value


def lesson(
    places: Places,
    taught: Arrays,
    rows: Tensor,
    pieces: Sequence[bytes],
    loss: Loss,
    labels: float,
    others: float,
) -> Callable[..., Tensor]:
    """labels · CE(labels) + others · loss(p ‖ softmax z), of a batch: `step(logits, labels, rows)` for `train`.

    Parameters
    ----------
    places : Places
        Of all rows.
    taught : dict
        p and ids (n × P × k), aligned to the places.
    rows : Tensor
        Which of them have something to teach (n, bool).
    pieces : sequence of bytes
        What the tokens spell.
    """
    first = next_token.first_bytes(pieces).to(places.x.device)
    p, ids = taught["p"].to(places.x.device), taught["ids"].to(places.x.device).long()
    good = places.counted & rows[:, None] & (p.sum(-1) > 0)

    def step(logits: Tensor, _: Tensor | None, batch: Tensor) -> Tensor:
        log_p, here = places.log_p(logits), good[batch]
        value = of_labels(places, logits, log_p, batch, labels)
        if others and bool(here.any()):
            buckets = next_token.bucketed(log_p[here], ids[batch][here], first)
            wanted = next_token.with_rest(p[batch][here])
            # a loss with labels takes the likeliest bucket
            value = value + others * loss.from_probabilities(buckets, wanted, wanted.argmax(1))
        return value

    return step
