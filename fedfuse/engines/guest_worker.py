"""The actor of `fedfuse flower`: it answers lists of messages with a ClientApp, and lets a node that waits wait alone.

A node that sleeps uses no processor, so nothing is gained when others stand behind it. The app therefore works on a
thread of its own; if that is idle for a while, the actor hands back the answers it has and the messages it has not
begun, which then go to other actors, and the waiting node's answer is asked for apart. It is the same thread from the
import to the last message: what belongs to a thread (a connection to SQLite, a mode of torch) is there for every node.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
import threading
import time
import traceback
from typing import Any

import ray
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedfuse.compat.flower_apps import as_received, load_app
from fedfuse.compat.flower_identity import claim_identity
from fedfuse.compat.flower_records import trusted
from fedfuse.core.threads import single_thread
from fedfuse.engines.guest_words import begin, speak_into
from fedfuse.errors import TRACEBACK, UserError, first_line, in_words

WINDOW = 0.5  # seconds: a node that computed for less than IDLE of them waits
IDLE = 0.1

Job = tuple[Any, dict[str, Any], RecordDict | None]  # a message's metadata, its content, its node's state
Answer = tuple[Any, Any]  # the reply, or why there is none; the node's new state


class Unnamed(Exception):
    """There is nothing of that name in a Flower app."""


def load(reference: str, directory: str, kind: type) -> Any:
    """Import a Flower app's component.

    Raises
    ------
    UserError
        If there is none, or it is something else.
    """
    try:
        found = load_app(reference, Unnamed, directory)
    except Unnamed as error:
        raise UserError(f"{reference}: cannot be loaded ({first_line(error)})") from error
    except Exception as error:
        raise UserError(f"{reference}: cannot be loaded ({in_words(error)})") from error
    if not isinstance(found, kind):
        raise UserError(f"{reference}: is a {type(found).__name__}; a {kind.__name__} is needed")
    return found


class GuestWorker:
    """An actor that has loaded a ClientApp once and answers lists of messages with it."""

    def __init__(self, reference: str, directory: str, run_config: dict[str, Any], nodes: int, words: str) -> None:
        speak_into(words)
        claim_identity()
        self.fault = ""
        self.directory, self.run_config, self.nodes = directory, run_config, nodes
        self.held: dict[Any, Any] = {}
        self._jobs: list[Job] = []  # not begun
        self._answers: list[Answer] = []
        self._lock = threading.Lock()
        self._begin, self._idle = threading.Semaphore(0), threading.Event()
        self._waits = False  # for a node that waits
        threading.Thread(target=self._live, args=(reference, directory), daemon=True).start()
        self._idle.wait()

    def loaded(self) -> str:
        """Say why the app cannot be loaded, if it cannot."""
        return self.fault

    def work(self, jobs: list[Job], shared: dict[int, Any], patient: bool) -> tuple[list[Answer], bool]:
        """Answer messages in the order given.

        Parameters
        ----------
        jobs : list
        shared : dict
            References to the large records among their content.
        patient : bool
            Whether to wait for a node that waits.

        Returns
        -------
        list
            The answers; fewer than messages if a node waits, or one waited already.
        bool
            Whether the first message without an answer is begun: `finish` returns its answer.
        """
        if self._waits or self.fault:
            return [], False
        self.held = {key: self.held.get(key) for key in shared}
        missing = [key for key in shared if self.held[key] is None]
        self.held.update(zip(missing, ray.get([shared[key] for key in missing]), strict=True))
        self._jobs, self._answers = jobs[::-1], []
        self._idle.clear()
        self._begin.release()
        before, used = 0, time.process_time()
        while True:
            if self._idle.wait(WINDOW):
                return self._answers, False
            spent = time.process_time() - used
            with self._lock:
                done = len(self._answers)
                if done == before and spent < IDLE * WINDOW and not patient and not self._idle.is_set():
                    self._jobs, self._waits = [], True
                    return self._answers[:done], True
            before, used = done, time.process_time()

    def finish(self) -> tuple[list[Answer], bool]:
        """Wait for the node that waits, and return its answer as `work` does."""
        self._idle.wait()
        self._waits = False
        return self._answers[-1:], False

    def _live(self, reference: str, directory: str) -> None:
        try:
            self.app: ClientApp = load(reference, directory, ClientApp)
            if "torch" in sys.modules:  # imported later, it finds one thread in the environment
                single_thread()
            gc.freeze()  # what was imported is never garbage
        except UserError as error:
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            self.fault = str(error)
        except BaseException as error:  # an app that ends its process while it is imported
            self.fault = f"{reference}: cannot be loaded ({in_words(error)})"
        while True:
            self._idle.set()
            self._begin.acquire()
            self._go()

    def _go(self) -> None:
        while True:
            with self._lock:
                job = self._jobs.pop() if self._jobs else None
            if job is None:
                begin(None)
                return
            begin(job[0].dst_node_id - 1)
            try:
                answer = self._answer(*job)
            except BaseException as error:  # an app that ends its process included: this thread has to answer
                answer = in_words(error), None
            with self._lock:
                self._answers.append(answer)

    def _answer(self, metadata: Any, content: dict[str, Any], state: RecordDict | None) -> tuple[Any, Any]:
        records = {name: own(self.held[v] if isinstance(v, int) else v) for name, v in content.items()}
        message = as_received(metadata, trusted(RecordDict, records))
        node = metadata.dst_node_id
        context = Context(
            run_id=metadata.run_id,
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": self.nodes},
            state=state if state is not None else RecordDict(),
            run_config=dict(self.run_config),
        )
        try:
            reply = self.app(message, context)
        except Exception as error:
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            frames = traceback.extract_tb(error.__traceback__)
            own_frames = [frame for frame in frames if frame.filename.startswith(self.directory)]
            where = (own_frames or frames)[-1]  # in the app, if it was a library that raised
            text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            return f"{text} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})", None
        if not isinstance(reply, Message):
            return f"the ClientApp returned a {type(reply).__name__}, not a Message", None
        return reply, context.state if len(context.state) else None


def own(record: Any) -> Any:
    """A record that the app may change without changing what other clients see."""
    values = {k: v if isinstance(v, int | float | str | bytes) else copy.copy(v) for k, v in record.items()}
    return trusted(type(record), values)
