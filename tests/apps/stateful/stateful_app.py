"""Least squares by FedAvg; each client keeps its momentum, and how often it was asked, in `Context.state`."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client = ClientApp()
server = ServerApp()
SIZE = 12000  # large enough to travel by the object store


def examples(partition: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(partition)
    x = draw.standard_normal((20 + partition, 8))
    return x, x @ np.arange(8) + 0.1 * draw.standard_normal(len(x))


@client.train()
def train(message: Message, context: Context) -> Message:
    rate, momentum = float(context.run_config["rate"]), float(context.run_config["momentum"])
    weights = message.content["arrays"]["w"].numpy().copy()
    x, y = examples(int(context.node_config["partition-id"]))
    if "own" in context.state:
        velocity, count = context.state["own"]["v"].numpy().copy(), context.state["count"]["n"]
    else:
        velocity, count = np.zeros(8), 0
    for _ in range(5):
        velocity = momentum * velocity + x.T @ (x @ weights[:8] - y) / len(x)
        weights[:8] -= rate * velocity
    context.state["own"] = ArrayRecord({"v": Array(velocity)})
    context.state["count"] = ConfigRecord({"n": count + 1})
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(weights)}),
            "metrics": MetricRecord({"num-examples": len(x), "asked": count + 1}),
        }
    )
    return Message(content, reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    x, y = examples(int(context.node_config["partition-id"]))
    error = float(np.mean((x @ message.content["arrays"]["w"].numpy()[:8] - y) ** 2))
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": len(x), "mse": error})}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    start = ArrayRecord({"w": Array(np.zeros(SIZE))})
    strategy = FedAvg(min_available_nodes=int(context.run_config["nodes"]))
    result = strategy.start(grid, start, num_rounds=int(context.run_config["rounds"]))
    if context.run_config["out"]:
        asked = result.train_metrics_clientapp[int(context.run_config["rounds"])]["asked"]
        np.savez(str(context.run_config["out"]), w=result.arrays["w"].numpy(), asked=asked)
