"""`runtime=ray`: a fixed pool of actors, each holding resident models; whole lists of groups pushed at once.

A large array sent to many clients enters the object store once a round, a small one travels with the calls, and short
calls have a line of their own. Groups are handed out longest first; replies are streamed back in client order.
Committed client state lies outside the actors, so a dead actor costs one retry.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from ray.exceptions import RayError

from fedfuse.compat.flower_records import LiveArray, trusted
from fedfuse.compat.flower_replies import reply_to
from fedfuse.config.registry import Entry
from fedfuse.core.asked import parcels
from fedfuse.core.scenario import Scenario
from fedfuse.core.shares import FAILED
from fedfuse.core.threads import single_thread
from fedfuse.engines.cluster import before_end, cause, connect, disconnect, own_folder
from fedfuse.engines.grid import LocalGrid
from fedfuse.engines.member import Call, Lost, Member
from fedfuse.engines.worker import Answer, Bare, Tree, Worker, packed, unpacked
from fedfuse.errors import UserError, WorldError
from fedfuse.models.shared_memory import give_back
from fedfuse.wire.client_store import INITIAL, ClientStore
from fedfuse.wire.group_sums import wanted
from fedfuse.wire.knowledge import Address
from fedfuse.wire.records import config_in, tensors
from fedfuse.wire.sums import GROUP

__all__ = ["RayGrid", "connect", "disconnect"]

WINDOW = 48 * 2**20  # bytes of replies that may wait for their turn
SMALL = 2**18  # bytes of knowledge up to which it travels with the calls: the object store costs some 5 ms a round
LARGE = 2**20  # bytes of one group's replies above which groups are not batched into one call
BRIEF = 2 * LARGE  # bytes of a call's reply up to which the line is quicker than Ray
LEVEL = 16  # groups a worker: the longest is then a small part of what each does
MOST = 512  # clients in one call
SHORT = 0.2  # seconds of work that one call shall last at least, so that calls cost little
PATIENCE = 60.0  # seconds that workers may take to begin before the rounds go on without them


class RayGrid(LocalGrid):
    """Runs clients on Ray actors.

    Parameters
    ----------
    entry, scenario
        What the actors run.
    state_dir : Path
        Directory of committed client state. Actors that do not see it get and return state with their messages.
    workers : int
        Actors.
    device : {"cpu", "cuda"}
    retries : int
        How often a client, or a group whose actor died, is tried again.
    address : str, optional
        Ray cluster to join; default starts one on this machine.
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
    ) -> None:
        super().__init__(scenario.clients)
        single_thread()
        runtime = scenario.config.runtime
        # of a budget, a quarter is the object store's and half of that may be replies that wait for their turn
        budget = None if runtime.memory is None else runtime.memory * 2**20
        connect(workers, address, None if budget is None else budget // 4)
        self.window = WINDOW if budget is None else min(WINDOW, budget // 8)
        self.retries, self.limit = retries, runtime.client_timeout
        self.store = ClientStore(Path(state_dir))
        token = f".seen-{uuid.uuid4().hex}"  # tells an actor that it sees our directory, not one of the same name
        self._token = self.store.directory / token
        self._token.touch()
        self._args = (ray.put(entry), ray.put(scenario), str(state_dir), token, device, retries, self.limit)
        self._share = runtime.gpu_fraction if device == "cuda" else 0.0
        self._scenario, self._topics = scenario, entry.server.topics
        self._references: dict[Address, tuple[int, Any]] = {}
        self._foreign: tuple[Any, tuple[int, Any]] | None = None
        self.seen: dict[str, tuple[float, int]] = {}  # seconds and bytes of a group, by what was asked: for the calls
        self.crew = [Member(self._start()) for _ in range(workers)]
        for member in self.crew:
            self.prepare(member)
        if runtime.state_dir is not None:
            self._check_shared(runtime.state_dir)

    def _check_shared(self, state_dir: str) -> None:
        try:
            seen = ray.get([member.ready for member in self.crew])
        except RayError as error:
            self.crew = []
            raise WorldError(f"a worker died before its first round ({cause(error)})") from error
        if not all(seen):
            self.close()
            raise UserError(f"runtime.state_dir={state_dir}: not every node sees it; a shared one is needed")

    def _start(self, again: bool = False) -> Any:
        """Take an idle worker, or start one; a worker that cannot take the run on says so at its first group."""
        idle = _idle.setdefault(self._share, [])
        if idle:
            return idle.pop()
        joined = self._scenario.config.runtime.address is not None
        # on this machine, workers never wait for the cores of a run before; and where a machine of a cluster is lost,
        # what is left of it takes its workers over
        cores = 1 if joined and not again else 0
        spread = "SPREAD" if joined else "DEFAULT"
        options = {"num_cpus": cores, "num_gpus": self._share, "scheduling_strategy": spread}
        return ray.remote(Worker).options(**options).remote()

    def await_workers(self) -> None:
        """Wait for workers to begin; who has died, or for whom a cluster has no room yet, is met with in the rounds."""
        ray.wait([member.ready for member in self.crew], num_returns=len(self.crew), timeout=PATIENCE)

    def exchange(self, groups: list[list[Message]]) -> Iterator[Message]:
        """Hand out groups longest first and stream the replies back in order."""
        if self._scenario.config.runtime.memory is not None:
            give_back()
        # groups are for sums: else work is dealt client by client, unless so many groups are level anyway
        if groups and len(groups) < LEVEL * len(self.crew) and not wanted(groups[0][0]):
            groups = [[message] for group in groups for message in group]
        round = Exchange(self, groups)
        try:
            for i in range(len(groups)):
                yield from round.replies(i)
        finally:
            round.end()

    # -- knowledge: into the object store once, not once a client ------------------------------------------

    def needs(self, message: Message) -> dict[Address, tuple[int, Any]]:
        """What a client must hold before this message: addresses, versions and where the arrays lie."""
        content = message.content
        config = config_in(content) or {}
        if "run" not in content:  # one of Flower's own strategies
            arrays = content.get("arrays")
            return {("model", ""): self._broadcast(arrays)} if isinstance(arrays, ArrayRecord) else {}
        columns = (config.get(f"parcel.{name}", ()) for name in ("topic", "to", "version"))
        for topic, to, version in zip(*columns, strict=True):
            held = self.cache.get((topic, to))
            if held is None or held.version < version:
                for parcel in parcels(content, config):
                    self.cache.take(parcel, self._topics)
                break
        addresses = zip(config.get("needs.topic", ()), config.get("needs.to", ()), strict=True)
        return {address: self._reference(address) for address in addresses}

    def _broadcast(self, arrays: ArrayRecord) -> tuple[int, Any]:
        if self._foreign is None or self._foreign[0] is not arrays:
            # counted: the `id` of a record that is gone is the next one's but one, and a worker may have slept between
            version = 1 if self._foreign is None else self._foreign[1][0] + 1
            value = {k: v.numpy() for k, v in tensors(arrays).items()}
            self._foreign = arrays, (version, _placed(value, version))
        return self._foreign[1]

    def _reference(self, address: Address) -> tuple[int, Any]:
        item = self.cache[address]
        known = self._references.get(address)
        if known is None or known[0] != item.version:
            value = {k: v.numpy() for k, v in item.arrays.items()}
            known = self._references[address] = (item.version, _placed(value, item.version))
        return known

    # -- workers -------------------------------------------------------------------------------------------

    def prepare(self, member: Member) -> None:
        """Let a worker take on the run, once; learn whether it sees the state directory."""
        if member.ready is None:
            folder = own_folder()  # none: Ray's, and perhaps the workers', are elsewhere
            member.address = None if folder is None else str(folder / f"line-{uuid.uuid4().hex[:12]}")
            member.ready = member.actor.prepare.remote(*self._args, member.address)

    def replace(self, member: Member) -> None:
        """End a worker that is dead, hung or at odds with itself, and start another in its place."""
        member.drop_line()
        with contextlib.suppress(Exception):
            ray.kill(member.actor)
        member.actor, member.ready, member.shares_directory = self._start(again=True), None, None

    def states(self, member: Member, bare: list[Bare]) -> dict[tuple[int, str], Tree | None]:
        """Client states for a worker that does not see our directory."""
        if member.shares_directory is None:
            member.shares_directory = bool(ray.get(member.ready))
        if member.shares_directory:
            return {}
        out: dict[tuple[int, str], Tree | None] = {}
        for node, _, config in bare:
            client, tag = int(config.get("client", node - 1)), str(config.get("tag", INITIAL))
            if tag != INITIAL:
                try:
                    out[client, tag] = packed(self.store.load(client, tag))
                except Exception:
                    out[client, tag] = None  # the worker answers that it cannot go back that far
        return out

    def close(self) -> None:
        """Give the workers back for the next run of this process."""
        for member in self.crew:
            member.hang_up()
        _idle.setdefault(self._share, []).extend(member.actor for member in self.crew)
        self.crew, self._references, self._foreign = [], {}, None
        self._token.unlink(missing_ok=True)


class Exchange:
    """One phase: what is handed out, what is back, and what has to be tried again."""

    def __init__(self, grid: RayGrid, groups: list[list[Message]]) -> None:
        self.grid, self.groups = grid, groups
        self.kind = groups[0][0].metadata.message_type if groups else ""
        self.cost = [1 + sum(grid._scenario.examples(m.metadata.dst_node_id - 1) for m in g) for g in groups]
        self.todo = deque(range(len(groups)))
        self.answers: dict[tuple[int, int], list[Answer]] = {}
        self.split: dict[int, str] = {}  # groups run member by member, and why
        self.attempts: dict[tuple[int, int], int] = {}
        for member in grid.crew:
            member.load = 0.0
            member.calls.clear()

    def replies(self, i: int) -> Iterator[Message]:
        """The replies of a group, waited for."""
        self._hand_out(i)
        while not self._complete(i):
            member = next(m for m in self.grid.crew if any(p[0] == i for c in m.calls for p in c.parts))
            self._collect(member)
        if i in self.split:
            found = [self.answers.pop((i, j))[0] for j in range(len(self.groups[i]))]
        else:
            found = self.answers.pop((i, -1))
        for j, (message, answer) in enumerate(zip(self.groups[i], found, strict=True)):
            yield _reply(message, answer, self.attempts.get((i, j), 0))
        self.groups[i] = []

    def _complete(self, i: int) -> bool:
        if i in self.split:
            return all((i, j) in self.answers for j in range(len(self.groups[i])))
        return (i, -1) in self.answers

    # -- handing out ---------------------------------------------------------------------------------------

    def _hand_out(self, due: int) -> None:
        """Push whole lists, longest first, within a window from the group that is due: it bounds what waits."""
        grid = self.grid
        seconds, size = grid.seen.get(self.kind, (0.0, LARGE))
        window = max(2 * len(grid.crew), min(4096, grid.window // max(size, 1)))
        if not self.todo or self.todo[0] - due > window // 2:
            return
        chosen = []
        while self.todo and self.todo[0] < due + window:
            chosen.append(self.todo.popleft())
        lists: dict[int, list[int]] = {}
        for i in sorted(chosen, key=lambda i: -self.cost[i]):
            worker = min(range(len(grid.crew)), key=lambda w: grid.crew[w].load)
            grid.crew[worker].load += self.cost[i]
            lists.setdefault(worker, []).append(i)
        largest = max(len(self.groups[i]) for i in chosen)
        batch = max(1, GROUP // largest)
        if size < LARGE:
            batch = max(batch, min(MOST // largest, 4 * LARGE // max(size, 1), int(SHORT / max(seconds, 1e-5))))
        for worker, mine in lists.items():
            calls = -(-len(mine) // batch)
            for k in range(calls):
                part = mine[len(mine) * k // calls : len(mine) * (k + 1) // calls]
                grid.crew[worker].calls.append(Call([(i, -1) for i in part]))
            self._send(grid.crew[worker])

    def _send(self, member: Member) -> None:
        """Push what a worker owes, but nothing behind a suspect: a worker that dies over the next call may take the
        reply before it along, and the suspect would be blamed again. Nor behind a call on the line: who still writes
        a reply does not read.
        """
        for call in member.calls:
            if not call.sent:
                self._push(member, call)
            if call.alone:
                return

    def _push(self, member: Member, call: Call) -> None:
        grid, parts = self.grid, call.parts
        grid.prepare(member)
        needs: dict[Address, tuple[int, Any]] = {}
        bare, run, lists = [], None, None
        for i, j in parts:
            messages = self.groups[i] if j < 0 else [self.groups[i][j]]
            for message in messages:
                config = config_in(message.content) or {}
                if lists is None or config.get("needs.version") is not lists:  # the very list: the same knowledge
                    needs.update(grid.needs(message))
                    lists = config.get("needs.version")
            bare.append([_bare(message) for message in messages])
            run = config_in(messages[0].content, "run")
        call.sent = True
        try:
            states = {} if member.shares_directory else grid.states(member, [b for group in bare for b in group])
            common = None if run is None else dict(run)
            # one argument: Ray's way to write one costs 0.1 ms, however small it is
            brief = len(member.calls) == 1 and not call.suspect and self._is_brief(needs, len(parts))
            call.reference = member.ask((common, bare, needs, states, call.suspect), brief)
            call.by_line = call.reference is None
        except (RayError, OSError) as error:
            call.lost = cause(error)

    def _is_brief(self, needs: dict[Address, tuple[int, Any]], groups: int) -> bool:
        """Whether nothing lies in the object store, and the reply, by what the last ones were, will be small."""
        _, size = self.grid.seen.get(self.kind, (0.0, BRIEF))
        return size * groups < BRIEF and all(isinstance(value, tuple) for _, value in needs.values())

    # -- taking back ---------------------------------------------------------------------------------------

    def _collect(self, member: Member) -> None:
        """Wait for the oldest call of a worker."""
        call = member.calls[0]
        try:
            if call.lost:
                raise Lost(call.lost)
            answers, kept, seconds = member.answer(call)
        except (RayError, Lost) as error:
            self._recover(member, cause(error))
            return
        member.calls.popleft()
        if call.alone:
            self._send(member)
        for verb, client, key, tree, previous in kept:
            self._keep(verb, client, key, tree, previous)
        for part, found in zip(call.parts, answers, strict=True):
            self.answers[part] = found
        self.grid.seen[self.kind] = seconds / len(call.parts), max(sum(map(_size, found)) for found in answers)

    def _keep(self, verb: str, client: int, key: str, tree: Tree, previous: str) -> None:
        if verb == "save":
            self.grid.store.save(client, key, unpacked(tree), previous)
        else:
            self.grid.store.stage(client, key, unpacked(tree))

    def _recover(self, member: Member, why: str) -> None:
        """Replace a dead worker and hand its calls out again. Only what it was working on is suspect: that is
        run member by member, so that one client that kills its worker takes nobody with it.
        """
        calls = list(member.calls)
        member.calls.clear()
        self.grid.replace(member)
        suspect, *others = calls
        again: list[list[tuple[int, int]]] = []
        for i, j in suspect.parts:
            members = range(len(self.groups[i])) if j < 0 else [j]
            if j < 0:
                self.split[i] = why
            for k in members:
                self.attempts[i, k] = self.attempts.get((i, k), 0) + 1
                if self.attempts[i, k] > max(self.grid.retries, 1):
                    limit = self.grid.limit
                    hint = f"; runtime.client_timeout={limit} s" if limit is not None else ""
                    text = f"its worker died {self.attempts[i, k]} times ({why}{hint})"
                    self.answers[i, k] = [(FAILED, text)]
                else:
                    again.append([(i, k)])
        member.calls.extend(Call(parts) for parts in [*again, *(call.parts for call in others)])
        self._send(member)

    def end(self) -> None:
        """If the phase was broken off, no worker goes on with it behind our back."""
        for member in self.grid.crew:
            if member.calls:
                member.calls.clear()
                self.grid.replace(member)


def _placed(arrays: dict[str, Any], version: int) -> Any:
    """Knowledge as it goes to workers: itself if it is small, else where it lies in the object store."""
    value = arrays, version
    return value if sum(array.nbytes for array in arrays.values()) <= SMALL else ray.put(value)


def _bare(message: Message) -> Bare:
    plain: Any = config_in(message.content) or {}
    if "parcel.topic" in plain:
        plain = {k: v for k, v in plain.items() if k[:7] != "parcel."}
    return message.metadata.dst_node_id, message.metadata.message_type, plain


def _size(answer: Answer) -> int:
    if not isinstance(answer[0], dict):
        return 0
    return sum(array.nbytes for record in answer[0].values() for array in record.values())


def _reply(message: Message, answer: Answer, attempts: int) -> Message:
    head, tail = answer
    if not isinstance(head, dict):
        return Message(Error(head, tail), reply_to=message)
    content: dict[str, Any] = {
        name: trusted(ArrayRecord, {k: LiveArray(v) for k, v in arrays.items()}) for name, arrays in head.items()
    }
    for name, is_config, values in tail:
        if is_config and name == "config" and attempts:
            values["retried"] = int(values.get("retried", 0)) + attempts
        kind: Any = ConfigRecord if is_config else MetricRecord
        content[name] = trusted(kind, values)
    return reply_to(message, trusted(RecordDict, content))


_idle: dict[float, list[Any]] = {}  # workers between two runs, by their share of a GPU


def forget() -> None:
    """Drop the idle workers: their Ray ends."""
    _idle.clear()


before_end.append(forget)
