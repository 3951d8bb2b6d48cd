"""Three named actions: `query.scale`, `train.gradient`, `evaluate.loss`."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


def examples(context: Context) -> np.ndarray:
    partition, total = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    return np.random.default_rng(100 + partition).standard_normal((30, 6)) + partition / total


@app.query("scale")
def scale(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"std": float(examples(context).std()), "sizes": [30, 6]})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train("gradient")
def gradient(message: Message, context: Context) -> Message:
    centre, clip = message.content["centre"]["c"].numpy(), float(context.run_config["method.clip"])
    value = np.clip(centre - examples(context).mean(axis=0), -clip, clip) / message.content["settings"]["scale"]
    return Message(RecordDict({"gradient": ArrayRecord({"g": Array(value)})}), reply_to=message)


@app.evaluate("loss")
def loss(message: Message, context: Context) -> Message:
    distance = ((examples(context) - message.content["centre"]["c"].numpy()) ** 2).sum(axis=1).mean()
    return Message(RecordDict({"metrics": MetricRecord({"loss": float(distance)})}), reply_to=message)
