"""What one real site keeps on disk between messages: its cache of knowledge, its client's state, its last replies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedfuse.core.node import Node
from fedfuse.core.waiting import listed, unlisted
from fedfuse.wire.client_store import read_tree, write_tree
from fedfuse.wire.knowledge import Cache, Item
from fedfuse.wire.records import record, tensors


class SiteMemory:
    """A node with a memory: it may be a new process for every message.

    A repeated (run, round, phase) returns the cached reply, so a lost reply costs no second training and changes
    no bit.

    Parameters
    ----------
    directory : Path
        The site's own folder.
    node : Node
    """

    def __init__(self, directory: Path, node: Node) -> None:
        self.directory, self.node = Path(directory), node
        self.directory.mkdir(parents=True, exist_ok=True)

    def handle(self, message: Message) -> Message:
        """Answer a message, from the cached reply if it was answered before."""
        key = self._key(message)
        if key and (kept := self._kept(key, message)) is not None:
            return kept
        cache = self._load_cache()
        before = {address: item.version for address, item in cache.items()}
        reply = self.node.handle(message, cache)
        if {address: item.version for address, item in cache.items()} != before:
            self._save_cache(cache)
        if key and reply.has_content():
            self._keep(key, reply)
        return reply

    def answered(self, message: Message) -> bool:
        """Whether a message was answered before, so that answering it again costs nothing."""
        key = self._key(message)
        return bool(key) and self._kept(key, message) is not None

    # -- knowledge -----------------------------------------------------------------------------------------

    def _load_cache(self) -> Cache:
        path = self.directory / "cache"
        cache = Cache()
        if path.exists():
            tree, _ = read_tree(path)
            for slot in tree.values():
                item = Item(unlisted(slot), int(slot["version"]))
                cache[slot["topic"], slot["to"]] = item
        return cache

    def _save_cache(self, cache: Cache) -> None:
        tree = {}
        for i, ((topic, to), item) in enumerate(cache.items()):
            tree[str(i)] = {
                "topic": topic,
                "to": to,
                "version": item.version,
                **listed(item.arrays),
            }
        write_tree(self.directory / "cache", tree)

    # -- replies -------------------------------------------------------------------------------------------

    def _key(self, message: Message) -> str:
        content = message.content
        if message.metadata.message_type.startswith("evaluate") or "run" not in content.config_records:
            return ""
        run: Any = content["run"]
        config: Any = content["config"]
        return f"{run['run']}|{run['round']}|{run['phase']}|{config['tag']}"

    def _kept(self, key: str, message: Message) -> Message | None:
        path = self.directory / "reply"
        if not path.exists():
            return None
        tree, notes = read_tree(path)
        if notes.get("key") != key:
            return None
        content = RecordDict()
        for slot in tree.get("records", {}).values():
            content[slot["name"]] = record(unlisted(slot))
        content["metrics"] = MetricRecord(json.loads(tree["metrics"]))
        content["config"] = ConfigRecord(json.loads(tree["config"]))
        return Message(content, reply_to=message)

    def _keep(self, key: str, reply: Message) -> None:
        records = {}
        for i, (name, value) in enumerate(reply.content.array_records.items()):
            records[str(i)] = {"name": name, **listed(tensors(value))}
        tree = {
            "records": records,
            "metrics": json.dumps(dict(reply.content["metrics"])),
            "config": json.dumps(dict(reply.content["config"])),
        }
        write_tree(self.directory / "reply", tree, durable=True, key=key)
