"""pfl-research as a contestant, where it is installed: `torchrun … -m fedfuse.bench.play pfl …`."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from fedfuse.bench.contestants import COHORT, EXAMPLES, Workload, build, pool, start_of


def pfl_side(workload: Workload) -> None:
    """Play rounds of pfl's FederatedAveraging, as many as it is told to."""
    import torch
    import torch.nn.functional as F
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(1)
    first = int(os.environ.get("RANK", "0")) == 0
    model = build(workload)
    model.loss = lambda x, y: F.cross_entropy(model(x), y)
    model.metrics = lambda x, y: {}
    pfl_model = PyTorchModel(model, torch.optim.SGD, torch.optim.SGD(model.parameters(), lr=1.0))
    x, y = map(torch.from_numpy, pool(workload))

    def user(client: int) -> Any:
        rows = slice(start_of(client), start_of(client) + EXAMPLES)
        return Dataset(raw_data=[x[rows], y[rows]], user_id=str(client))

    def sampler() -> int:
        return int(torch.randint(1000, (1,)))

    class Turns(TrainingProcessCallback):
        """Waits for a line that says how many iterations are next; the very first one warms up."""

        clock, rounds, left = 0.0, 0, 0

        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            self.left -= 1
            if self.left > 0:
                return False, Metrics()
            if first:
                seconds = (time.perf_counter() - self.clock) / max(1, self.rounds)
                print(f"seconds {seconds:.6f}" if self.rounds else "ready", flush=True)
            asked = torch.tensor([int((sys.stdin.readline() or "0") if first else 0)])
            if torch.distributed.is_initialized():
                torch.distributed.broadcast(asked, 0)  # the others start when the first does
            self.rounds = self.left = int(asked)
            self.clock = time.perf_counter()
            return self.rounds == 0, Metrics()

    training = FederatedDataset(user, sampler)
    backend = SimulatedBackend(training_data=training, val_data=training)
    params = NNAlgorithmParams(
        central_num_iterations=100000, evaluation_frequency=100000, train_cohort_size=COHORT, val_cohort_size=0
    )
    epochs = 1 if workload.trains else 0
    local = NNTrainHyperParams(local_num_epochs=epochs, local_learning_rate=0.05, local_batch_size=10)
    FederatedAveraging().run(params, backend, pfl_model, local, None, [Turns()], send_metrics_to_platform=False)
