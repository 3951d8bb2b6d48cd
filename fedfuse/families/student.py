"""What strategies share whose server has a model of its own and teaches it the clients' soft labels."""

from __future__ import annotations

from torch import Tensor, nn

from fedfuse.core.strategy import FusionStrategy
from fedfuse.train.losses import Loss
from fedfuse.wire.records import Arrays


class StudentStrategy(FusionStrategy):
    """A strategy with a student at the server: of the first client's architecture, kept in `state["model"]`.

    Its hyper-parameters have `distill_epochs` and `distill_batch`, and `server_model` unless `taught` says otherwise.
    """

    @property
    def taught(self) -> bool:
        """Whether there is a student."""
        return self.hyper.server_model

    def begin(self) -> None:
        """The student starts as the clients do."""
        if self.taught:
            self.state["model"] = self.workspace.initial(self.architecture)

    def teach(
        self, loss: Loss, p: Tensor, rows: Tensor, *, optimizer: str | None = None, lr: float | None = None
    ) -> nn.Module:
        """Distil soft labels p (n × C) of those rows of the transfer set into the student, and return it.

        Parameters
        ----------
        loss, p, rows
            The objective, the soft labels, and the rows that they are of.
        optimizer, lr
            The strategy's own; None: as in local training. The user's `distil.*` goes before them.
        """
        model, (x, y) = self.workspace.loaded(self.architecture, self.state["model"]), self.workspace.transfer(rows)
        self.state["model"] = self.distil(
            model, x, y, loss.towards(p.to(self.workspace.device)), purpose="distil",
            epochs=self.hyper.distill_epochs, batch_size=self.hyper.distill_batch, optimizer=optimizer, lr=lr,
        )  # fmt: skip
        return model

    def server_models(self) -> dict[str, tuple[str, Arrays]]:
        """The student, if there is one."""
        return {"model": (self.architecture, self.state["model"])} if self.taught else {}
