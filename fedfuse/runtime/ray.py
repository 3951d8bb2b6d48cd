"""`runtime=ray`: a fixed pool of actors, each holding resident models; whole lists of groups pushed at once.

An array sent to many clients enters the object store once a round. Groups are handed out longest first; replies are
streamed back in client order. Committed client state lies outside the actors, so a dead actor costs one retry.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from flwr.app import Error, Message, RecordDict
from ray.exceptions import RayError

from fedfuse.knowledge import Address, Cache, Item
from fedfuse.node import Node, parcels
from fedfuse.records import tensors
from fedfuse.registry import Entry
from fedfuse.runtime.inline import LocalGrid, claim_identity, single_thread
from fedfuse.scenario import Scenario
from fedfuse.store import ClientStore
from fedfuse.strategy import FAILED

Wire = tuple[dict[str, np.ndarray], int]  # an item as the object store holds it: arrays and version


@ray.remote
class Worker:
    """One process with one torch thread, kept from run to run; runs groups of clients it is handed."""

    def __init__(self) -> None:
        single_thread()
        claim_identity()
        self.cache = Cache()

    def prepare(self, entry: Entry, scenario: Scenario, state_dir: str, device: str, retries: int) -> None:
        """Take on a run: what it builds from here on is resident."""
        self.cache = Cache()
        self.node = Node(entry, scenario, ClientStore(Path(state_dir)), device, retries)

    def pid(self) -> int:
        """Process id, for tests that kill."""
        return os.getpid()

    def work(self, groups: list[tuple[list[Message], list[tuple[Address, int, Any]]]]) -> Iterator[list[Message]]:
        """Run groups in the order given; yield each group's replies."""
        for messages, needs in groups:
            lent = []
            for address, version, reference in needs:
                held = self.cache.get(address)
                if held is None or held.version != version:
                    arrays, stored = ray.get(reference)
                    self.cache[address] = Item({k: torch.from_numpy(v) for k, v in arrays.items()}, stored)
                if address[1].startswith("client:"):
                    lent.append(address)
            yield self.node.handle_group(messages, [self.cache] * len(messages))
            for address in lent:  # what was meant for one client is not kept in every actor
                self.cache.pop(address, None)


class RayGrid(LocalGrid):
    """Runs clients on Ray actors.

    Parameters
    ----------
    entry, scenario
        What the actors run.
    state_dir : Path
        Directory of committed client state, visible to every actor.
    workers : int
        Actors.
    device : {"cpu", "cuda"}
    retries : int
        How often a client, or a group whose actor died, is tried again.
    address : str, optional
        Ray cluster to join; default starts one on this machine.
    gpu_fraction : float
        Share of a GPU each actor takes on `cuda`.
    """

    def __init__(
        self,
        entry: Entry,
        scenario: Scenario,
        state_dir: Path,
        workers: int,
        device: str = "cpu",
        retries: int = 2,
        address: str | None = None,
        gpu_fraction: float = 1.0,
    ) -> None:
        super().__init__(scenario.clients)
        single_thread()
        connect(workers, address)
        self.retries = retries
        self._args = (ray.put(entry), ray.put(scenario), str(state_dir), device, retries)
        self._share = gpu_fraction if device == "cuda" else 0.0
        self.actors = [self._start() for _ in range(workers)]
        self._scenario = scenario
        self._topics = entry.server.topics
        self._references: dict[Address, tuple[int, Any]] = {}

    def _start(self) -> Any:
        """Take an idle worker, or start one; a worker that cannot take the run on says so at its first group."""
        idle = _idle.setdefault(self._share, [])
        if idle:
            actor = idle.pop()
        else:
            actor = Worker.options(num_cpus=1, num_gpus=self._share).remote()  # type: ignore[attr-defined]
        actor.prepare.remote(*self._args)
        return actor

    def pids(self) -> list[int]:
        """Process ids of the actors."""
        return ray.get([actor.pid.remote() for actor in self.actors])

    def exchange(self, groups: list[list[Message]]) -> Iterator[Message]:
        """Hand out groups longest first and stream the replies back in order."""
        plans = [self._lean(group) for group in groups]
        cost = [sum(self._cost(m) for m in group) for group in groups]
        loads = [0] * len(self.actors)
        lists: list[list[int]] = [[] for _ in self.actors]
        for i in sorted(range(len(groups)), key=lambda i: -cost[i]):
            worker = loads.index(min(loads))
            lists[worker].append(i)
            loads[worker] += cost[i] + 1
        owner = {i: worker for worker, chosen in enumerate(lists) for i in chosen}
        streams = {w: self._push(w, [plans[i] for i in chosen]) for w, chosen in enumerate(lists) if chosen}
        waiting = {worker: list(chosen) for worker, chosen in enumerate(lists)}
        ready: dict[int, Any] = {}
        attempts = [0] * len(groups)
        for i, group in enumerate(groups):
            while True:
                try:
                    while i not in ready:
                        worker = owner[i]
                        reference = next(streams[worker])
                        ready[waiting[worker].pop(0)] = reference
                    replies = ray.get(ready.pop(i))
                    break
                except (RayError, StopIteration) as error:
                    lost = self._revive(owner[i], i, waiting, attempts)
                    if attempts[i] > self.retries:
                        cause = f"its worker died {attempts[i]} times ({type(error).__name__})"
                        replies = [Message(Error(FAILED, cause), reply_to=m) for m in group]
                        waiting[owner[i]] = [k for k in lost if k != i]
                        streams[owner[i]] = self._push(owner[i], [plans[k] for k in waiting[owner[i]]])
                        break
                    waiting[owner[i]] = lost
                    streams[owner[i]] = self._push(owner[i], [plans[k] for k in lost])
            for reply in replies:
                if attempts[i] and reply.has_content():
                    config = reply.content["config"]
                    config["retried"] = int(config.get("retried", 0)) + attempts[i]
                yield reply

    def _push(self, worker: int, plans: list[Any]) -> Any:
        return self.actors[worker].work.options(num_returns="streaming").remote(plans)

    def _revive(self, worker: int, failed: int, waiting: dict[int, list[int]], attempts: list[int]) -> list[int]:
        """Replace a dead actor; say which groups it still owed. Only the one it was working on is suspect."""
        lost = sorted({failed, *waiting[worker]}, key=lambda k: (k not in waiting[worker], waiting[worker].index(k) if k in waiting[worker] else 0))
        attempts[lost[0]] += 1
        try:
            ray.kill(self.actors[worker])
        except RayError:
            pass
        self.actors[worker] = self._start()
        return lost

    def _cost(self, message: Message) -> int:
        client = message.metadata.dst_node_id - 1
        return self._scenario.examples(client)

    def _lean(self, group: list[Message]) -> tuple[list[Message], list[tuple[Address, int, Any]]]:
        """Take the arrays out of a group's messages: they go to the object store once, not once a client."""
        lean: list[Message] = []
        needs: dict[Address, tuple[Address, int, Any]] = {}
        for message in group:
            content = message.content
            config = content.config_records.get("config", {})
            if "run" not in content.config_records:  # one of Flower's own strategies
                if "arrays" in content.array_records:
                    reference = self._broadcast(content.array_records["arrays"])
                    needs["model", ""] = (("model", ""), id(content.array_records["arrays"]), reference)
            else:
                for parcel in parcels(content, config):
                    self.cache.take(parcel, self._topics)
                wanted = zip(config.get("needs.topic", []), config.get("needs.to", []), strict=True)
                for address in wanted:
                    needs[address] = (address, *self._reference(address))
            bare = RecordDict()
            bare["config"] = _without_parcels(config)
            if "run" in content.config_records:
                bare["run"] = content["run"]
            thin = Message(bare, dst_node_id=message.metadata.dst_node_id, message_type=message.metadata.message_type)
            lean.append(thin)
        return lean, list(needs.values())

    def _broadcast(self, arrays: Any) -> Any:
        key = id(arrays)
        if getattr(self, "_last", (None, None, None))[0] != key:
            value = {k: v.numpy() for k, v in tensors(arrays).items()}
            self._last = (key, ray.put((value, key)), arrays)  # the record is kept, so that its id stays taken
        return self._last[1]

    def _reference(self, address: Address) -> tuple[int, Any]:
        item = self.cache[address]
        known = self._references.get(address)
        if known is None or known[0] != item.version:
            value: Wire = ({k: v.numpy() for k, v in item.arrays.items()}, item.version)
            known = self._references[address] = (item.version, ray.put(value))
        return known

    def close(self) -> None:
        """Give the workers back for the next run of this process."""
        _idle.setdefault(self._share, []).extend(self.actors)
        self.actors, self._references = [], {}


_idle: dict[float, list[Any]] = {}  # workers between two runs, by their share of a GPU


def _without_parcels(config: Any) -> Any:
    out = type(config)() if config else None
    if out is None:
        from flwr.app import ConfigRecord

        return ConfigRecord()
    for key, value in config.items():
        if not key.startswith("parcel."):
            out[key] = value
    return out


def connect(workers: int, address: str | None) -> None:
    """Start Ray on this machine, or join a cluster, once a process."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # thread limits reach the actors before they import anything
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        os.environ.update(limits)
        options |= {"num_cpus": workers, "include_dashboard": False, "address": "local"}
    else:
        options["address"] = address
    ray.init(**options)


def disconnect() -> None:
    """End what `connect` started."""
    _idle.clear()
    if ray.is_initialized():
        ray.shutdown()
