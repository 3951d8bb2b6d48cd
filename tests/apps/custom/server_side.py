"""A strategy of its own over Flower's Grid: coordinate-wise median of gradients."""

import time
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

app = ServerApp()


class Median(Strategy):
    """Moves a centre by the median of the clients' gradients."""

    def __init__(self, rate: float, scale: float) -> None:
        self.rate, self.scale, self.centre = rate, scale, np.zeros(0)

    def messages(self, grid: Grid, kind: str) -> list[Message]:
        content = RecordDict(
            {"centre": ArrayRecord({"c": Array(self.centre)}), "settings": ConfigRecord({"scale": self.scale})}
        )
        return [Message(content, dst_node_id=node, message_type=kind) for node in grid.get_node_ids()]

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.centre = arrays["c"].numpy()
        return self.messages(grid, "train.gradient")

    def aggregate_train(self, server_round: int, replies: Iterable[Message]):
        gradients = np.stack([reply.content["gradient"]["g"].numpy() for reply in replies])
        self.centre = self.centre - self.rate * np.median(gradients, axis=0)
        return ArrayRecord({"c": Array(self.centre)}), MetricRecord({"clients": len(gradients)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.centre = arrays["c"].numpy()
        return self.messages(grid, "evaluate.loss")

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]):
        return MetricRecord({"loss": max(float(reply.content["metrics"]["loss"]) for reply in replies)})

    def summary(self) -> None:
        pass


@app.main()
def main(grid: Grid, context: Context) -> None:
    while len(nodes := list(grid.get_node_ids())) < int(context.run_config["nodes"]):
        time.sleep(0.1)  # Flower's simulator may start us before its nodes
    ids = grid.push_messages([Message(RecordDict(), dst_node_id=node, message_type="query.scale") for node in nodes])
    waiting, scales = set(ids), []
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            scales.append(float(reply.content["metrics"]["std"]))
    strategy = Median(float(context.run_config["method.rate"]), float(np.median(scales)))
    result = strategy.start(grid, ArrayRecord({"c": Array(np.ones(6))}), num_rounds=int(context.run_config["rounds"]))
    if context.run_config["out"]:
        rounds = int(context.run_config["rounds"])
        np.savez(
            str(context.run_config["out"]),
            c=result.arrays["c"].numpy(),
            loss=result.evaluate_metrics_clientapp[rounds]["loss"],
        )
