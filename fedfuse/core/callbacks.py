"""When a run is scored, and when it ends early: callbacks of the round loop that every run has."""

from __future__ import annotations

from fedfuse.core.loop import Callback, Federation


class Evaluation(Callback):
    """Scores every `every` rounds, and always the last."""

    def __init__(self, every: int) -> None:
        self.every = every

    def round(self, federation: Federation) -> None:
        """Evaluate if it is time."""
        last = federation.done == federation.rounds
        if federation.done and not last and federation.done % self.every == 0:
            federation.evaluate()
        elif last:
            federation.evaluate(final=True)


class EarlyStop(Callback):
    """Ends a run when the clients' validation score has not improved for `patience` evaluations."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def round(self, federation: Federation) -> None:
        """Look at the validation scores so far; the round that stops is evaluated as the last."""
        scored = [
            (h["accuracy/validation"], -i) for i, h in enumerate(federation.history) if "accuracy/validation" in h
        ]
        if not scored or federation.done == federation.rounds:
            return
        best = -max(scored)[1]
        if len(scored) - 1 - best >= self.patience:
            federation.stop = f"no better validation accuracy for {self.patience} evaluations"
            federation.rows = [r for r in federation.rows if not (r[0] == federation.done and r[3] != "train")]
            federation.history.pop()
            federation.evaluate(final=True)
