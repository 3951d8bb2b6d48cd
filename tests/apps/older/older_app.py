"""Least squares by FedAvg as apps were written before messages: the server asks for each client in its own thread."""

import numpy as np
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Context, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp


def examples(partition: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(partition)
    x = draw.standard_normal((20 + partition, 8))
    return x, x @ np.arange(8) + 0.1 * draw.standard_normal(len(x))


def trained(weights: np.ndarray, partition: int, rate: float) -> np.ndarray:
    x, y = examples(partition)
    for _ in range(5):
        weights = weights - rate * x.T @ (x @ weights - y) / len(x)
    return weights


class Client(NumPyClient):
    def __init__(self, partition: int, rate: float) -> None:
        self.partition, self.rate = partition, rate

    def fit(self, parameters, config):
        return [trained(parameters[0], self.partition, self.rate)], len(examples(self.partition)[0]), {}

    def evaluate(self, parameters, config):
        x, y = examples(self.partition)
        return float(np.mean((x @ parameters[0] - y) ** 2)), len(x), {}


def client_fn(context: Context):
    return Client(int(context.node_config["partition-id"]), float(context.run_config["rate"])).to_client()


class Counting(FedAvg):
    """Keeps how many clients answered, and the weights after each round."""

    def __init__(self, out: str, **options) -> None:
        super().__init__(**options)
        self.out, self.heard, self.rounds = out, [], []

    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        self.heard.append([len(results), len(failures)])
        self.rounds.append(parameters_to_ndarrays(parameters)[0])
        return parameters, metrics

    def aggregate_evaluate(self, server_round, results, failures):
        self.heard.append([len(results), len(failures)])
        if self.out:
            np.savez(self.out, heard=self.heard, w=self.rounds)
        return super().aggregate_evaluate(server_round, results, failures)


def server_fn(context: Context) -> ServerAppComponents:
    run = context.run_config
    start = ndarrays_to_parameters([np.zeros(8)])
    strategy = Counting(str(run["out"]), min_available_clients=int(run["nodes"]), initial_parameters=start)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=int(run["rounds"])))


client = ClientApp(client_fn=client_fn)  # each by itself: Flower looks for them in the syntax tree
server = ServerApp(server_fn=server_fn)
