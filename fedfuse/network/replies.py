"""What may come back from a machine that nobody trusts: looked at before the strategy sees it."""

from __future__ import annotations

import re
from typing import Any

from flwr.app import ConfigRecord, Message, MetricRecord

WORDS: dict[str, type] = {"client": int, "phase": str, "tag": str, "sha": str, "retried": int, "trained": int}
FORMS = {  # of these texts, which the server keeps: a method's name, a state's, a hash
    "phase": re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII),
    "tag": re.compile(r"(\d{1,12}(\.\d{1,6})?)?", re.ASCII),
    "sha": re.compile(r"([0-9a-f]{64})?", re.ASCII),
}
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@/ +-]{0,99}", re.ASCII)  # of a metric or record: tables and logs have it
SHARES = frozenset({"accuracy", "accuracy_macro", "exact_match"})  # what stops a run early, and what pages are drawn by
MOST = 64  # records and metrics of a reply
LARGEST = 1e100  # of a metric: beyond any loss, and whatever is added up or squared of it stays a number
LONGEST = 1e9  # seconds that a client may say it worked


def fault_of(reply: Message, client: int, examples: int | None = None) -> str | None:
    """Say what is wrong with the form of a reply, None if nothing.

    Shapes, dtypes and finiteness of arrays are checked by the strategy against what it declares; here is
    what a strategy takes for granted: who speaks, the records' kinds, and that no group sum comes from a site.

    Parameters
    ----------
    reply : Message
        Has content.
    client : int
        The client that was asked.
    examples : int or None
        How many it has to train on, as its hello said: what it weighs with cannot grow afterwards.
    """
    content = reply.content
    if len(content) > MOST:
        return f"{len(content)} records; allowed are {MOST}"
    if extra := sorted(set(content.config_records) - {"config"}):
        return f"unexpected config record {extra[0][:80]!r}"
    if extra := sorted(set(content.metric_records) - {"metrics"}):
        return f"unexpected metrics record {extra[0][:80]!r}"
    if any(name.startswith("sum:") for name in content.array_records):
        return "a group sum; a site sends its own records"
    if strange := [name for name in content.array_records if not NAME.fullmatch(name)]:
        return f"record {strange[0][:80]!r} is no name of a record"
    config: Any = content.config_records.get("config", ConfigRecord())
    metrics: Any = content.metric_records.get("metrics", MetricRecord())
    return _config_fault(config, client) or _metrics_fault(metrics, examples)


def _config_fault(config: Any, client: int) -> str | None:
    for key, value in config.items():
        if key not in WORDS:
            return f"unexpected entry {key[:80]!r} in config"
        if type(value) is not WORDS[key] or (key in FORMS and not FORMS[key].fullmatch(str(value))):
            return f"config entry {key!r} is no {key}, or no {WORDS[key].__name__}"
    if config.get("client", client) != client:
        return f"says it is client {config['client']}, client {client} was asked"
    if not 0 <= int(config.get("retried", 0)) <= 100:
        return f"retried is {config['retried']}"
    if not 0 <= int(config.get("trained", 0)) < 2**40:
        return f"trained is {config['trained']}"
    return None


def _metrics_fault(metrics: Any, examples: int | None) -> str | None:
    if len(metrics) > MOST:
        return f"{len(metrics)} metrics; allowed are {MOST}"
    weight = metrics.get("num-examples")
    if examples is not None and isinstance(weight, int | float) and weight > examples:
        return f"num-examples is {weight}; it said it has {examples}"
    for key, value in metrics.items():
        if not NAME.fullmatch(key):
            return f"metric {key[:80]!r} is no name of a metric"
        if isinstance(value, list) and ("/" in key or key in ("num-examples", "loss", "seconds")):
            return f"metric {key!r} is a list"
        for number in value if isinstance(value, list) else [value]:
            if abs(number) == float("inf") or (isinstance(number, int) and abs(number) >= 2**63):
                return f"metric {key!r} is not finite"
            if abs(number) > (most := LONGEST if key == "seconds" else LARGEST):
                return f"metric {key!r} is {number:.3g}; allowed is {-most:g} to {most:g}"
            if key.rpartition("/")[2] in SHARES and (number < 0 or number > 1):
                return f"metric {key!r} is {number:.3g}; it is a share, from 0 to 1"
    return None
