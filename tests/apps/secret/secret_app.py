"""The mean of the nodes' numbers by SecAgg+; in the first round one node sleeps until the round is over."""

import time
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Context, GetParametersIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.constant import MessageTypeLegacy
from flwr.compat.common.recorddict_compat import getparametersins_to_recorddict
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp

server = ServerApp()


class Secret(NumPyClient):
    def __init__(self, node: int, sleeps: bool, woken: Path) -> None:
        self.node, self.sleeps, self.woken = node, sleeps, woken

    def fit(self, parameters, config):
        limit = time.monotonic() + 60
        while self.sleeps and not self.woken.exists() and time.monotonic() < limit:
            time.sleep(0.1)
        return [np.full(3, 1.0 + self.node)], 1, {}


def make(context: Context):
    node, config = int(context.node_config["partition-id"]), context.run_config
    return Secret(node, node == config["sleeper"], Path(config["woken"])).to_client()


client = ClientApp(client_fn=make, mods=[secaggplus_mod])


class Watched(FedAvg):
    """FedAvg that keeps each round's means, and wakes the sleeper once the first round is over."""

    def __init__(self, woken: Path) -> None:
        start = ndarrays_to_parameters([np.zeros(3)])
        super().__init__(fraction_evaluate=0.0, min_available_clients=5, initial_parameters=start)
        self.woken, self.means, self.answered = woken, [], []

    def aggregate_fit(self, server_round, results, failures):
        self.woken.touch()
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        self.means.append(parameters_to_ndarrays(parameters)[0])
        self.answered.append(len(results))
        return parameters, metrics


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    strategy = Watched(Path(config["woken"]))
    rounds = ServerConfig(num_rounds=config["rounds"])
    legacy = LegacyContext(context=context, config=rounds, strategy=strategy)
    asked = getparametersins_to_recorddict(GetParametersIns({}))
    # once every node has answered something, its process has imported all: a stage's seconds are for the stage
    list(grid.send_and_receive([Message(asked, n, MessageTypeLegacy.GET_PARAMETERS) for n in grid.get_node_ids()]))
    fit = SecAggPlusWorkflow(num_shares=5, reconstruction_threshold=3, max_weight=1, timeout=config["timeout"])
    DefaultWorkflow(fit_workflow=fit)(grid, legacy)
    np.savez(config["out"], means=strategy.means, answered=strategy.answered)
