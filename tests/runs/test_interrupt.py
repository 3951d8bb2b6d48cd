"""A Ctrl-C that gets lost is asked for again; nobody else's handler is touched."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedfuse.config.compose import compose
from fedfuse.core.loop import Callback, Federation
from fedfuse.runs import experiment, listeners
from fedfuse.runs.interrupt import Interrupt
from tests.federations import TINY


class Swallows(Callback):
    """Is interrupted in its second round, and tells nobody."""

    def __init__(self) -> None:
        self.played = 0

    def round(self, federation: Federation) -> None:
        self.played = federation.done
        if federation.done == 2:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_lost_interrupt_ends_its_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    deaf = Swallows()
    monkeypatch.setattr(experiment, "callbacks", lambda *given: [*listeners.callbacks(*given), deaf])
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=f"fedfuse resume {out} goes on"):
        experiment.run(compose(["strategy=local", *TINY, "rounds=4", f"out={out}"]), quiet=True)
    assert deaf.played == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    experiment.resume(out, quiet=True)
    assert (out / "summary.json").exists()
    assert deaf.played == 4


def test_a_handler_that_is_not_pythons_own_stays(handler: None) -> None:
    heard: list[int] = []

    def own(number: int, frame: object) -> None:
        heard.append(number)

    signal.signal(signal.SIGINT, own)
    with Interrupt() as interrupt:
        assert signal.getsignal(signal.SIGINT) is own
        os.kill(os.getpid(), signal.SIGINT)
    assert heard == [signal.SIGINT]
    assert not interrupt.asked
    assert signal.getsignal(signal.SIGINT) is own


def test_outside_the_main_thread_nothing_is_listened_to(handler: None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listened: list[bool] = []

    def inside() -> None:
        with Interrupt() as interrupt:
            listened.append(interrupt.listens)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert listened == [False]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
