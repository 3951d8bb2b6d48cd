"""Which of a client's training examples are labelled, and the annotator who labels more of them on request.

A client half that says `partly_labelled = True` begins with labels of a drawn share of its examples (`labels.initial`).
At the end of each cycle of `labels.rounds` rounds the annotator labels as many as `labels.budget` allows. Which ones
have been asked for is part of the client's state: a failed message asks again, a resumed run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fedfuse.config.schema import LabelsConfig
from fedfuse.errors import UserError, listed
from fedfuse.seeding import generator

ANNOTATED = "annotated"  # the rows asked for so far, in a client's state
LEFT = "unlabelled"  # a metric: examples that had no label when a client trained


class Pools:
    """A client's labelled and unlabelled examples, as rows of its training set.

    Parameters
    ----------
    config : LabelsConfig
    seed, client : int
        The labelled share is drawn from them alone, whatever the strategy.
    examples : int
        Training examples n of the client.
    state : dict
        The client's state, where `reveal` notes what it labelled.
    """

    def __init__(self, config: LabelsConfig, seed: int, client: int, examples: int, state: dict[str, Any]) -> None:
        self.config, self.examples, self.state = config, examples, state
        order = torch.randperm(examples, generator=generator(seed, "labels", client))
        self._first = order[: share(config.initial, examples)]

    @property
    def annotated(self) -> Tensor:
        """Rows labelled on request, in the order of the requests."""
        return self.state.get(ANNOTATED, torch.empty(0, dtype=torch.int64)).cpu()

    @property
    def labelled(self) -> Tensor:
        """Rows with a label, ascending."""
        return torch.cat([self._first, self.annotated]).sort().values

    @property
    def unlabelled(self) -> Tensor:
        """Rows without, ascending."""
        without = torch.ones(self.examples, dtype=torch.bool)
        without[self.labelled] = False
        return without.nonzero().squeeze(1)

    def allowance(self, round: int) -> int:
        """Labels that may be asked for now: ⌈budget·n⌉ a finished cycle, less those had, at most what is left.

        Round r finishes its cycle if `labels.rounds` divides it. A client that missed a cycle's end makes up for it.
        """
        budget = share(self.config.budget, self.examples) * (round // self.config.rounds)
        return max(0, min(budget - len(self.annotated), len(self.unlabelled)))

    def reveal(self, rows: Tensor, round: int) -> None:
        """Label some of the unlabelled examples.

        Parameters
        ----------
        rows : Tensor
            Positions in `unlabelled`, int64.
        round : int

        Raises
        ------
        UserError
            For a row that is not there or named twice, or more rows than the allowance; nothing is labelled then.
        """
        rows, there, allowed = rows.cpu(), self.unlabelled, self.allowance(round)
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise UserError(f"reveal: {rows.dtype} of shape {tuple(rows.shape)}; a list of row numbers is needed")
        wrong = rows[(rows < 0) | (rows >= len(there))]
        if len(wrong) or len(rows.unique()) < len(rows):
            what = f"row {int(wrong[0])} is not there" if len(wrong) else "a row is named twice"
            raise UserError(f"reveal: {what}; allowed are different rows of 0 … {len(there) - 1}")
        if len(rows) > allowed:
            raise UserError(f"reveal: {len(rows)} labels asked for in round {round}; labels.budget allows {allowed}")
        self.state[ANNOTATED] = torch.cat([self.annotated, there[rows]])


def share(part: float, examples: int) -> int:
    """⌈part·examples⌉, where 0.1 of 70 is 7, whatever the last bit says."""
    return min(examples, math.ceil(part * examples - 1e-9))


def exhausted(rows: Iterable[tuple[int, str, int, str, str, float]], clients: int) -> list[str]:
    """Say whose unlabelled pools ran out.

    Parameters
    ----------
    rows : iterable
        As `metrics.parquet` has them.
    clients : int
        How many there are.
    """
    first: dict[int, int] = {}
    for round, scope, client, _, metric, value, *_ in rows:  # a clock adds a column
        if scope == "client" and metric == LEFT and value == 0:
            first[client] = min(round, first.get(client, round))
    if not first:
        return []
    who = listed(sorted(first))
    return [
        f"labels: nothing is left to label at {len(first)} of {clients} clients ({who}), first in round "
        f"{min(first.values())}; they train on, and ask for no more"
    ]
