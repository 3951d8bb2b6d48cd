"""A worker as the driver sees it: the calls it owes, and the two ways by which they go to it, Ray's and the line."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from typing import Any

import ray

from fedfuse.engines.line import receive, send
from fedfuse.engines.worker import Task


class Lost(Exception):
    """A call that could not even be made, or whose line broke."""


class Member:
    """A worker and the calls it owes, in the order it works on them."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.calls = actor, deque[Call]()
        self.ready: Any = None
        self.shares_directory: bool | None = None
        self.load = 0.0
        self.address: str | None = None  # where it listens once it is ready
        self.line: Connection | None = None
        self.attending: Any = None

    def ask(self, task: Task, brief: bool) -> Any:
        """Hand over a call: by the line if it is brief and there may be one, else by Ray, whose reference it returns.

        Raises
        ------
        OSError, RayError
            If the worker is gone.
        """
        if not (brief and self.address and self.shares_directory):
            self.hang_up()
            return self.actor.work.remote(task)
        if self.line is None:
            self.attending = self.actor.attend.remote()
            self.line = Client(self.address, "AF_UNIX")  # it listens since it is ready; what is sent waits for it
        send(self.line, task)
        return None

    def answer(self, call: Call) -> Any:
        """Wait for what a call returns.

        Raises
        ------
        RayError, Lost
            If the worker died over it.
        """
        if not call.by_line:
            return ray.get(call.reference)
        assert self.line is not None, "nobody hangs up while a call is out"
        try:
            return receive(self.line)
        except (EOFError, OSError) as error:
            ray.get(self.attending)  # which knows what it died of
            raise Lost(f"its line broke: {error or 'end of file'}") from error

    def hang_up(self) -> None:
        """Let the worker take Ray's calls again."""
        if self.line is not None:
            with contextlib.suppress(OSError):
                send(self.line, None)
            self.drop_line()

    def drop_line(self) -> None:
        """Close the line without a word, which would wait for a worker that is stopped."""
        if self.line is not None:
            self.line.close()
            self.line = self.attending = None


@dataclass
class Call:
    """One call to a worker: whole groups, or one message of a group whose worker died."""

    parts: list[tuple[int, int]]  # (group, member); member -1: all
    sent: bool = False
    reference: Any = None
    by_line: bool = False
    lost: str = ""

    @property
    def suspect(self) -> bool:
        """Whether a worker died over it before."""
        return self.parts[0][1] >= 0

    @property
    def alone(self) -> bool:
        """Whether no call may follow it before its reply is here."""
        return self.suspect or self.by_line
