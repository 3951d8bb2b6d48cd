"""When a run is scored, and when it ends early: callbacks of the round loop that every run has."""

from __future__ import annotations

from fedfuse.core.loop import Callback, Federation


class Evaluation(Callback):
    """Scores every `every` rounds, or after every `seconds` of virtual time, and always the last."""

    def __init__(self, every: int, seconds: float | None = None) -> None:
        self.every, self.seconds = every, seconds

    def round(self, federation: Federation) -> None:
        """Evaluate if it is time."""
        last = federation.done == federation.rounds
        if federation.again:
            return
        if federation.done and not last and self._due(federation):
            federation.evaluate()
        elif last:
            federation.evaluate(final=True)

    def _due(self, federation: Federation) -> bool:
        if self.seconds is None or federation.clock is None:
            return federation.done % self.every == 0
        before = federation.history[-1]["virtual_s"] if federation.history else 0.0
        return federation.clock.seconds // self.seconds > before // self.seconds


class EarlyStop(Callback):
    """Ends a run when the clients' validation score has not improved for `patience` evaluations, or virtual seconds."""

    def __init__(self, patience: int | None, seconds: float | None = None) -> None:
        self.patience, self.seconds = patience, seconds

    def round(self, federation: Federation) -> None:
        """Look at the validation scores so far; the round that stops is evaluated as the last."""
        scored = [
            (h["accuracy/validation"], -i) for i, h in enumerate(federation.history) if "accuracy/validation" in h
        ]
        if not scored or federation.done == federation.rounds or federation.again:
            return
        best = -max(scored)[1]
        if told := self._enough(federation, len(scored) - 1 - best, best):
            federation.stop = f"no better validation accuracy for {told}"
            federation.rows = [r for r in federation.rows if not (r[0] == federation.done and r[3] != "train")]
            federation.history.pop()
            federation.evaluate(final=True)

    def _enough(self, federation: Federation, evaluations: int, best: int) -> str:
        if self.patience is not None and evaluations >= self.patience:
            return f"{self.patience} evaluations"
        if self.seconds is not None and federation.clock is not None:
            scored = [h for h in federation.history if "accuracy/validation" in h]
            if federation.clock.seconds - scored[best]["virtual_s"] >= self.seconds:
                return f"{self.seconds:g} virtual seconds"
        return ""
