"""When a client is scored that trains on what it is sent: after it took in the newest lesson, or before.

Some methods digest a round's knowledge at the start of the client's next round. After a round there are then two
models of a client: the one its training left (`trained`), and what becomes of it by the lesson (`received`).
`evaluate.moment` chooses the one that is scored; of the other the personal test's accuracy is told beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fedfuse.core.shares import Metrics, Records
from fedfuse.wire.records import Arrays

if TYPE_CHECKING:
    from fedfuse.core.client import FusionClient

MOMENTS = ("received", "trained")
BESIDE = "personal/accuracy"  # what is told of the other moment


def evaluate(client: FusionClient, trained: Arrays | None) -> tuple[Records, Metrics]:
    """Score a client that has received what is new to it; its model is afterwards as before.

    Parameters
    ----------
    client : FusionClient
    trained : dict of str to Tensor, or None
        Its model as training left it; None for a client of which there is only one model.

    Returns
    -------
    tuple
        What `client.evaluate` gives at the run's moment, with `personal/accuracy_<other moment>` where there are two.
    """
    if trained is None:
        return client.evaluate()
    received, moment = client.weights(), client.scenario.config.evaluate.moment
    other = MOMENTS[1 - MOMENTS.index(moment)]
    models = {"received": received, "trained": trained}
    try:
        client.load(models[moment])
        records, metrics = client.evaluate()
        if BESIDE in metrics:
            metrics[f"{BESIDE}_{other}"] = metrics[BESIDE]
            if not all(torch.equal(value.cpu(), trained[name].cpu()) for name, value in received.items()):
                metrics[f"{BESIDE}_{other}"] = _beside(client, models[other])
    finally:
        client.load(received)
    return records, metrics


def _beside(client: FusionClient, model: Arrays) -> float:
    splits, client.splits = client.splits, ("personal",)
    client.load(model)
    try:
        return float(client.evaluate()[1][BESIDE])
    finally:
        client.splits = splits
