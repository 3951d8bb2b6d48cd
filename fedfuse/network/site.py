"""A site's side of the wire: checks what a message asks for, then lets the site's own client answer it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict

from fedfuse.config import registry
from fedfuse.config.allowed import check_texts, no_attack
from fedfuse.config.dotted import code
from fedfuse.config.files import replaced
from fedfuse.config.message import from_json
from fedfuse.config.schema import Config
from fedfuse.core.fit import check_promises
from fedfuse.core.node import Node, place
from fedfuse.core.scenario import Scenario, prepare_scenario
from fedfuse.core.shares import FAILED, INVALID, REFUSED, STALE
from fedfuse.core.threads import single_thread
from fedfuse.data.cache import few
from fedfuse.errors import Refused, UserError, one_line
from fedfuse.network.audit import NAME, Audit, left
from fedfuse.network.handshake import identity
from fedfuse.network.own_data import no_guessed_tokens, site_scenario
from fedfuse.network.site_config import SiteConfig
from fedfuse.network.site_memory import SiteMemory
from fedfuse.network.site_secrets import PREFIX, STEPS, SiteSecrets, fingerprint, refuse_bare
from fedfuse.train.allowance import Allowance, limited
from fedfuse.train.ledger import Ledger
from fedfuse.wire.client_store import ClientStore, room
from fedfuse.wire.knowledge import Stale
from fedfuse.wire.packing import packed, unpacked
from fedfuse.wire.records import InvalidArrays

RUN = re.compile(r"[0-9a-f]{32}")
AT_HOME = "this site's data does not fit what the run asks of it; why, the site's own log says"
REFUSALS = 100  # a day that a site's log tells one by one
FOLDERS = re.compile(r"(?<![\w.~])/(?:[^\s/'\",;:()]+/)+")  # that lead to a file or folder of this site's


class Site:
    """Answers the messages of any run for one site."""

    def __init__(self, seat: SiteConfig) -> None:
        self.seat = seat
        self._scenarios: dict[str, tuple[Config, Scenario]] = {}
        single_thread()

    def handle(self, message: Message, kept: RecordDict | None = None) -> Message:
        """Answer one message; whatever is refused becomes an error reply with a named reason.

        Parameters
        ----------
        message : Message
        kept : RecordDict, optional
            Memory between messages that is on no disk; without one there are no secure sums.
        """
        try:
            with code(self.seat.policy.allow_code), few(self.seat.store is None):  # Flower's simulator is no deployment
                return self._handle(message, RecordDict() if kept is None else kept)
        except (Refused, UserError) as error:
            self._refused(message, str(error))
            return self._error(REFUSED, f"refused: {error}", message, isinstance(error, _AtHome))
        except Stale as error:
            return self._error(STALE, str(error), message)
        except InvalidArrays as error:
            return self._error(INVALID, f"received {error}", message)
        except Exception as error:
            return self._error(FAILED, f"{type(error).__name__}: {error}", message)

    def _refused(self, message: Message, reason: str) -> None:
        """Note a refusal, where the site has a folder already: strangers' messages make none."""
        if self.seat.state.exists() and self.seat.store is None:  # Flower's simulator is no deployment
            setting: Any = message.content.config_records.get("setting", {}) if message.has_content() else {}
            try:
                self._note_failure("refused", message, one_line(setting.get("run", ""), 40), None, None, reason)
            except (OSError, ValueError) as error:  # a full disk: nothing leaves, so what is refused stays refused
                print(f"fedfuse: a refusal could not be noted: {one_line(error)}", flush=True)

    def _error(self, code: int, reason: str, message: Message, at_home: bool = False) -> Message:
        reason = one_line(reason)  # what it quotes of the message is the server's words, in this site's log
        print(f"fedfuse: {reason}", flush=True)
        said = f"refused: {AT_HOME}" if at_home else self._outside(reason)
        return Message(Error(code=code, reason=said), reply_to=message)

    def _outside(self, reason: str) -> str:
        """A reason as others are told it: where things lie here is this site's affair."""
        for folder in filter(None, (self.seat.data, str(self.seat.state))):
            reason = reason.replace(folder, "…")
        return FOLDERS.sub("…/", reason)

    def _handle(self, message: Message, kept: RecordDict) -> Message:
        setting = message.content.config_records.get("setting")
        if setting is None:
            raise Refused("a message without a setting: not from a FedFuse server")
        run = str(setting.get("run", ""))
        if not RUN.fullmatch(run):
            raise Refused(f"run id {run[:40]!r} is not 32 hexadecimal digits")
        space = self._room(run)  # nothing is read, and nothing kept in the cache, for one run too many
        config, scenario = self._scenario(str(setting.get("config", "")), str(setting.get("task", "")))
        # nothing is written here for a run that the site does not take part in
        self._not_orphaned(self.seat.state / run, setting)
        self._pinned(self.seat.state / run, str(setting.get("config", "")))
        mine = self.seat.acts_as(scenario.clients)
        if message.metadata.message_type == "query.hello":
            found: dict[str, Any] = {
                f"hello:{c}": ConfigRecord(identity(scenario, c, config.strategy.name)) for c in mine
            }
            self._note("hello", message, run, config, 0, clients=mine)
            return Message(RecordDict(found), reply_to=message)
        client = message.content.config_records.get("config", ConfigRecord()).get("client")
        if client not in mine:
            raise Refused(f"a message for client {client!r}; this site is client {', '.join(map(str, mine))}")
        about = message.content.config_records.get("run", ConfigRecord())
        if about.get("run") != run:
            raise Refused("a message whose run is not that of its setting")
        given = {key.removeprefix("hyper."): value for key, value in about.items() if key.startswith("hyper.")}
        given.pop("unset", None)  # names of fields, as JSON
        if not self.seat.policy.allow_code:
            check_texts({"strategy": given})
        policy, training = self.seat.policy, not message.metadata.message_type.startswith("evaluate")
        round = about.get("round", 0)
        if type(round) is not int:
            raise Refused(f"round {str(round)[:40]!r} is no whole number")
        policy.check_round(round)
        alike = fingerprint(about, setting) if config.secure.on else ""
        held, step = SiteSecrets(kept, int(client), alike), message.metadata.message_type.removeprefix(PREFIX)
        told: Any = message.content.config_records.get("secure")
        if step in STEPS and config.secure.on and told is not None:
            answer = ConfigRecord(held.answer(step, told))
            self._note(f"secure {step}", message, run, config, round)
            return Message(RecordDict({"secure": answer}), reply_to=message)
        secret = training and config.secure.on and "secure" in about
        if secret:
            held.accept(told if told is not None else {})  # before anything is trained
        message.content = unpacked(message.content)
        folder = self.seat.state / run / str(client)
        memory = SiteMemory(folder, self._node(config, scenario, folder))
        if not memory.answered(message):
            kind = "trainings" if training else "evaluations"
            phases = 1 + sum(name.startswith("fuse_") for name in dir(registry.entry(config.strategy.name).server))
            policy.check_answers(counted(folder / kind), phases if training else 1, kind)
        with limited(Allowance(policy.max_epochs, policy.max_steps)), room(space):
            reply = memory.handle(message)
        if reply.has_error():
            reason = one_line(reply.error.reason)
            print(f"fedfuse: client {client}: {reason}", flush=True)
            self._note_failure("not done", message, run, config, round, reason)
            return Message(Error(reply.error.code, self._outside(reason)), reply_to=message)
        if secret:
            reply = Message(held.hide(reply.content, config, about), reply_to=message)
        elif config.secure.on:
            refuse_bare(reply.content, config)
        content = packed(reply.content)
        self._note("answered", message, run, config, round, **left(content, reply.content))
        return Message(content, reply_to=message)

    def _note_failure(
        self, event: str, message: Message, run: str, config: Config | None, round: Any, reason: str
    ) -> None:
        """Note what was asked and not answered: so many a day, then their number alone, which the next day begins with.

        A server can ask without end for what is refused, and the log may not be shortened.
        """
        path, today = self.seat.state / "refusals", int(time.time() // 86400)
        day, count = map(int, path.read_text().split()) if path.exists() else (today, 0)
        more = {"not_noted_before": count - REFUSALS} if day != today and count > REFUSALS else {}
        count = count + 1 if day == today else 1
        with replaced(path, durable=True) as partial:
            partial.write_text(f"{today} {count}")
        if count <= REFUSALS:
            self._note(event, message, run, config, round, reason=one_line(reason), **more)

    def _note(self, event: str, message: Message, run: str, config: Config | None, round: Any, **what: Any) -> None:
        """Enter what was asked, and what left, into this site's log."""
        if self.seat.store is not None:  # Flower's simulator is no deployment
            return
        asked = one_line(message.metadata.message_type, 60)
        strategy = config.strategy.name if config is not None else None
        policy = hashlib.sha256(self.seat.policy.as_json().encode()).hexdigest()[:16]
        Audit(self._log).add(event, run=run, asked=asked, strategy=strategy, round=round, policy=policy, **what)

    @property
    def _log(self) -> Path:
        return self.seat.state.parent / NAME if self.seat.state.name == "runs" else self.seat.state / NAME

    def _node(self, config: Config, scenario: Scenario, folder: Path) -> Node:
        store = ClientStore(self.seat.store or folder, durable=self.seat.store is None)
        entry = registry.entry(config.strategy.name)
        ledger = None
        if not self.seat.store:  # Flower's simulator is no deployment
            ledger = Ledger(folder / "privacy.jsonl", self._lifetime(int(folder.name)), self.seat.policy.limits)
        return place(entry, scenario, store, device=self.seat.device, retries=config.runtime.retries, ledger=ledger)

    def _lifetime(self, client: int) -> Path:
        """The ledger of the examples themselves, beside all runs: by the folder that they lie in, and the client."""
        whose = f"{self.seat.data}|{client if self.seat.clients is not None else ''}"
        return self.seat.state / "privacy" / f"{hashlib.sha256(whose.encode()).hexdigest()[:16]}.jsonl"

    def _room(self, run: str) -> int | None:
        """Bytes that may be kept yet; refuse one run too many, and everything where the share of the disk is full."""
        state, most = self.seat.state, self.seat.policy.max_runs
        if most is not None and not (state / run).exists() and state.exists():
            there = sum(RUN.fullmatch(folder.name) is not None for folder in state.iterdir())
            if there >= most:
                raise Refused(f"site policy: {there} runs are kept here; allowed: at most {most}")
        share = self.seat.policy.max_disk
        if share is None or self.seat.store is not None:  # Flower's simulator is no deployment
            return None
        space = share * 2**20 - kept_below(state) - (kept_below(self._log) if self._log.parent != state else 0)
        if space <= 0:
            raise Refused(f"site policy: no room for more than is kept here; allowed: at most {share} MB (max_disk)")
        return space

    def _not_orphaned(self, folder: Path, setting: Mapping[str, Any]) -> None:
        """A server that was started again counts up; what an older one still sends is refused."""
        attempt, path = int(setting.get("attempt", 1)), folder / "attempt"
        known = int(path.read_text()) if path.exists() else 0
        if attempt < known:
            raise Refused(f"attempt {attempt} of this run was replaced by attempt {known}")
        if attempt > known:
            folder.mkdir(parents=True, exist_ok=True)
            with replaced(path, durable=True) as partial:
                partial.write_text(str(attempt))

    def _pinned(self, folder: Path, text: str) -> None:
        """Keep a run to the configuration that it began with here: what was masked under it, another would lay bare."""
        if self.seat.store is not None:  # Flower's simulator is no deployment
            return
        path, found = folder / "configuration", hashlib.sha256(text.encode()).hexdigest()
        if not path.exists():
            with replaced(path, durable=True) as partial:
                partial.write_text(found)
        elif path.read_text() != found:
            raise Refused("this run began with another configuration")

    def _scenario(self, text: str, task: str) -> tuple[Config, Scenario]:
        if text not in self._scenarios:
            config = from_json(text, code=self.seat.policy.allow_code)
            if self.seat.store is None:  # Flower's simulator is no deployment
                no_attack(config)
            self.seat.policy.check(config)
            check_promises(registry.entry(config.strategy.name), config)  # a server may ask for what none begins
            config = replace(config, data=replace(self.seat.policy.selected(config.data), root=self.seat.data))
            if self.seat.policy.require_dp:  # weights may be chosen: what ghost clipping adds is not what it measures,
                # and last bits of a row's gradient depend on how many rows lie beside it
                config = replace(config, privacy=replace(config.privacy, clipping="plain", chunk=1))
            if (self.seat.clients is None) != bool(task):
                own, run = ("own data", "a simulation") if self.seat.clients is None else ("a partition", "own data")
                raise Refused(f"this site acts on {own}, the run is for {run} (fedfuse deploy run --own-data)")
            try:
                if task:
                    scenario = site_scenario(
                        config, self.seat.client, config.clients or 0, task, self.seat.policy.classes
                    )
                else:
                    scenario = prepare_scenario(config)
            except UserError as error:
                if self.seat.store is not None:  # Flower's simulator is no deployment
                    raise
                raise _AtHome(str(error)) from error
            if task and self.seat.policy.require_dp:
                no_guessed_tokens(scenario)
            mine = self.seat.acts_as(scenario.clients)
            if not mine or mine[-1] >= scenario.clients or mine[0] < 0:
                raise Refused(f"the run has {scenario.clients} clients, this site is client {self.seat.client}")
            for client in mine:
                self.seat.policy.check_examples(scenario.examples(client))
            self._scenarios = {text: (config, scenario)}
        return self._scenarios[text]


class _AtHome(Refused):
    """What is wrong with the site's data: it names columns, classes and values, of which a server could ask for all."""


def kept_below(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; runs may be deleted meanwhile."""
    total = 0
    for file in [path] if path.is_file() else [Path(at, name) for at, _, names in os.walk(path) for name in names]:
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size
    return total


def counted(path: Path) -> int:
    """One more than the last time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = (int(path.read_text()) if path.exists() else 0) + 1
    with replaced(path) as partial:
        partial.write_text(str(count))
    return count
