"""One line a round."""

from __future__ import annotations

import time

from rich.console import Console

from fedfuse.clock.draws import SECOND
from fedfuse.config.clock_keys import MANY
from fedfuse.core.fit import remarks
from fedfuse.core.loop import Callback, Federation
from fedfuse.core.scenario import counted
from fedfuse.core.silence import beside_state, unheard

said: set[str] = set()  # notes that this process has printed, so that a run's table does not say them again


class Progress(Callback):
    """Prints a line per round: scores, loss, bytes so far, seconds, and whoever was left out."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)

    def start(self, federation: Federation) -> None:
        """Say what begins."""
        scenario = federation.scenario
        models = ", ".join(sorted(set(scenario.architectures)))
        self.console.print(
            f"[bold]{federation.strategy.name}[/] on {scenario.data.dataset.name}: {counted(scenario.clients)}, "
            f"{models}, seed {scenario.seed}" + (f", from round {federation.done + 1}" if federation.done else "")
        )
        for note in (*scenario.data.notes, *remarks(federation.strategy)):
            self._note(note)
        self._clock = time.perf_counter()

    def heard(self, federation: Federation, answers: int, asked: int) -> None:
        """Say how far a long phase is."""
        seconds = time.perf_counter() - self._clock
        what = federation.strategy.outbox.request.label
        self.console.print(f"  {what}: {answers} of {counted(asked)} after {seconds:.0f} s", markup=False)

    def round(self, federation: Federation) -> None:
        """Say how it stands."""
        if not federation.done:
            return
        now = time.perf_counter()
        head, traffic = federation.headline, federation.strategy.outbox.traffic.totals
        clock = federation.clock
        timed = clock is not None and clock.limit is not None and federation.rounds == MANY
        parts = [f"round {federation.done:>3}" + ("" if timed else f"/{federation.rounds}")]
        if federation.again:  # its line is there already; this is its evaluation as the last
            parts = [f"{federation.stop} is over after round {federation.done}"]
        if federation.evaluated == federation.done:
            for key, label in (("accuracy/global", "global"), ("accuracy/personal", "personal")):
                value = head.get(key, float("nan"))
                parts.append(f"{label} {100 * value:5.2f} %" if value == value else f"{label}     –  ")
            if "bits_per_byte/global" in head:
                parts.append(f"{head['bits_per_byte/global']:.4f} bits/byte")
        loss = head.get("loss/train", float("nan"))
        parts.append(f"loss {loss:.4f}" if abs(loss) < 1e6 else f"loss {loss:.3g}" if loss == loss else "loss –")
        parts.append(f"up {traffic['up_bytes'] / 1e6:.3g} MB, down {traffic['down_bytes'] / 1e6:.3g} MB so far")
        spent = now - self._clock
        parts.append(f"{spent:.2f} s")
        if clock is not None:
            most = f" of {clock.limit / SECOND:g}" if timed and clock.limit is not None else ""
            parts.append(f"virtual {clock.seconds:.3g}{most} s")
        self._clock = now
        self.console.print("  ".join(parts), markup=False)
        told = [*unheard(federation.strategy), *beside_state(federation.strategy)] if federation.done == 1 else []
        if federation.done == 1 < federation.rounds and (slow := _mostly_evaluated(federation, spent)):
            told.append(slow)
        if lost := federation.strategy.inbox.undefined:
            told.append(f"training loss of {lost} clients is not a number")
        for line in told:
            self._note(line)
        for line in federation.strategy.inbox.left_out:  # unwrapped, or a node's words might begin a line
            self.console.print(f"  left out: {line}", markup=False, soft_wrap=True)

    def end(self, federation: Federation) -> None:
        """Say what has to be known of the result."""
        for note in federation.strategy.notes():
            self._note(note)

    def _note(self, line: str) -> None:
        said.add(line)
        self.console.print(f"  note: {line}", markup=False)


LONG = 5.0  # seconds of an evaluation from which on it is told how to ask for less


def _mostly_evaluated(federation: Federation, seconds: float) -> str:
    """What to do about a round that was evaluated for longer than it was played; empty if it was not."""
    scenario, test = federation.scenario, federation.scenario.data.dataset.test
    if federation.evaluated != federation.done or not max(LONG, seconds / 2) < federation.evaluating:
        return ""
    whose, less = "", "evaluate.every=<rounds>"
    if test is not None and "global" in federation.strategy.splits:
        whose = f", and {len(scenario.panel)} predict {len(test)} test examples"
        if len(scenario.panel) == scenario.clients:
            less += " or evaluate.panel=<clients>"
    return (
        f"evaluating took {federation.evaluating:.0f} of these {seconds:.0f} s: "
        f"{counted(scenario.clients)} are scored{whose}; {less} asks for less"
    )
