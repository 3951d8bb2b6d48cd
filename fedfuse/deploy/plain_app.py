"""A plain Flower app, the rival of `fedfuse deploy bench`: imports torch, reads the digits, sends as many messages.

It trains nothing: what is compared is what a round costs beside the training.
"""

from __future__ import annotations

import gzip
import json
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

SHAPES = {"0.weight": (32, 64), "0.bias": (32,), "2.weight": (10, 32), "2.bias": (10,)}  # of a small network
WORD = "plain-rounds: "

server = ServerApp()  # a line each: `flwr run` looks for them in the source
client = ClientApp()


def weights() -> ArrayRecord:
    """Arrays of the network."""
    made = ArrayRecord()
    for name, shape in SHAPES.items():
        made[name] = Array(np.zeros(shape, dtype=np.float32))
    return made


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Send a train and an evaluate message to every node, each round; print what rounds took."""
    nodes: list[int] = []
    while len(nodes) < int(str(context.run_config["nodes"])):
        nodes = list(grid.get_node_ids())
        time.sleep(0.3)
    seconds = []
    for _ in range(int(str(context.run_config["rounds"]))):
        started = time.perf_counter()
        for kind in ("train", "evaluate"):
            asked = [Message(RecordDict({"arrays": weights()}), node, kind) for node in nodes]
            replies = list(grid.send_and_receive(asked))
            assert all(reply.has_content() for reply in replies)
        seconds.append(time.perf_counter() - started)
    print(WORD + json.dumps(seconds), flush=True)


def read() -> MetricRecord:
    """Read the digits, as anybody would."""
    found = find_spec("sklearn")
    assert found is not None
    assert found.origin is not None
    with gzip.open(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=","))
    return MetricRecord({"num-examples": len(table), "mean": float(table.mean())})


@client.train()
def train(message: Message, context: Context) -> Message:
    """Send the arrays back."""
    content = RecordDict({"arrays": message.content["arrays"], "metrics": read()})
    return Message(content, reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Send a figure."""
    return Message(RecordDict({"metrics": read()}), reply_to=message)
