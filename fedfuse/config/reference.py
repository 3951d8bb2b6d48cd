"""What there is, in words: strategies, keys, the words of groups; for `fedfuse list`, `fedfuse help` and the docs."""

from __future__ import annotations

import inspect
import sys
import textwrap

from fedfuse.config import catalogue, registry
from fedfuse.config.compose import meant
from fedfuse.config.hydra_words import GROUPS, options, preset_files
from fedfuse.config.keys import Key, said
from fedfuse.config.rules import allowed
from fedfuse.config.schema import known
from fedfuse.errors import UserError, nearest

KINDS = ("strategies", "datasets", "partitions", "models", "losses", "experiments")
WIDTH = 118


def listing(kind: str) -> list[tuple[str, str]]:
    """Names of a kind, each with one line."""
    if kind == "strategies":
        found = registry.listed().values()
        return [(one.name, f"{one.summary} [{one.paper}]" if one.paper else one.summary) for one in found]
    if kind == "experiments":
        files = preset_files().items()
        return [(name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")) for name, path in files]
    group = {"datasets": "data", "partitions": "partition", "models": "model", "losses": "loss"}[kind]
    return sorted(_words(group).items())


def _words(group: str) -> dict[str, str]:
    """A group's words that the catalogue says more about than the name."""
    if group == "data":
        return catalogue.names()
    told = {"partition": catalogue.PARTITIONS, "model": catalogue.MODELS, "loss": catalogue.LOSSES}
    told |= {"attack": catalogue.ATTACKS, "defence": catalogue.DEFENCES}
    return dict((told | {"clock": catalogue.CLOCKS, "schedule": catalogue.SCHEDULES}).get(group, {}))


def strategy_text(name: str) -> str:
    """One strategy: what it is, its algorithm box, what it asks for, and its hyper-parameters.

    Raises
    ------
    UserError
        If there is none of that name.
    """
    entry = registry.entry(name)
    summary = (entry.server.__doc__ or "").strip().splitlines()[0]
    box = inspect.getdoc(sys.modules[entry.server.__module__]) or ""
    parts = [f"{name}: {summary}"]
    parts += [entry.paper] if entry.paper else []
    parts += ["", box, "", *asks(name), "", "Hyper-parameters, as strategy.<name>=<value>:"]
    found = registry.hypers(name)
    return "\n".join([*parts, *(_row(one) for one in found)] if found else [*parts[:-1], "No hyper-parameters."])


def preset_text(name: str) -> str:
    """One experiment preset: its file, which says what it is for, a command, and what it sets."""
    return preset_files()[name].read_text(encoding="utf-8").rstrip()


def asks(name: str) -> list[str]:
    """What a strategy asks of an experiment, and what stays with its clients."""
    entry = registry.entry(name)
    kind = entry.server
    travels = ", ".join(kind.records) or "nothing"
    gets = ", ".join(kind.topics) or "nothing"
    out = [f"Clients send: {travels}. They get: {gets}. fedfuse run strategy={name} --dry-run tells the bytes."]
    transfer = {"none": "not used", "both": "used by clients and server"}.get(kind.transfer, f"used by {kind.transfer}")
    out.append(f"Transfer set: {transfer}. Architectures: {'any pool' if kind.heterogeneous else 'one for all'}.")
    if kind.needs_features is True:
        out.append("Models need features(x), head(z) and feature_dim.")
    if kind.of_classes is True:
        out.append("Data are of a class an example: next tokens are refused.")
    if entry.client.personal:
        out.append("Each client keeps a model of its own.")
    if entry.client.partly_labelled:
        out.append("Only a part of a client's examples is labelled, more on request: labels.*.")
    if kind.discloses:
        out.append(f"Discloses {', '.join(kind.discloses)} of private examples to the server.")
    return out


def key_text(name: str) -> str:
    """One key (or a group, or a strategy): meaning, what it may be, default, and with what it does anything.

    Raises
    ------
    UserError
        If there is no such key, with the nearest.
    """
    keys = known()
    if name in GROUPS:
        words = [f"  {word:<18} {_words(name).get(word, '')}".rstrip() for word in options(name)]
        return "\n".join([f"{name}=<word>, one of:", *words, "", "Its keys:", *rows(name)])
    if name == "experiment":
        words = [f"  {word:<18} {line}" for word, line in listing("experiments")]
        said = "What a preset sets: fedfuse list NAME. A key that is said beside it goes before the preset's."
        return "\n".join(["experiment=<word>, one of:", *words, "", said])
    if any(key.startswith(f"{name}.") for key in keys):
        return "\n".join(rows(name))
    if name == "audit":
        words = [
            f"  {word:<14} {one.line}\n{'':17}{one.adversary}: {one.sees}" for word, one in catalogue.AUDITS.items()
        ]
        return "\n".join([_full(keys[name]), "What it may name, and who sees what:", *words])
    if name in keys:
        return _full(keys[name])
    parts = name.split(".")
    if parts[0] == "strategy" and len(parts) == 3:
        found = {one.name: one for one in registry.hypers(parts[1])}
        if f"strategy.{parts[2]}" in found:
            return _full(found[f"strategy.{parts[2]}"])
        raise UserError(f"{name}: {parts[1]} has no such setting; {nearest(parts[2], [k[9:] for k in found])}")
    if parts[0] == "strategy" and len(parts) == 2:
        raise UserError(f"{name}: say whose: fedfuse help strategy.<strategy>.{parts[1]}, or fedfuse list <strategy>")
    if name in registry.listed():
        return strategy_text(name)
    raise UserError(f"{name}: no such key; {meant(name, keys)}")


def rows(group: str) -> list[str]:
    """The keys of a group, a line each (more where it is long); "" for those outside of any."""
    prefix = f"{group}." if group else ""
    return [_row(key) for name, key in known().items() if name.startswith(prefix) and (group or "." not in name)]


def all_rows() -> str:
    """Every key but the strategies', by group."""
    groups = dict.fromkeys(name.partition(".")[0] for name in known() if "." in name)
    parts = ["Keys outside of groups:", *rows("")]
    for group in groups:
        chosen = f" ({group}=<word> chooses; fedfuse help {group} lists the words)" if group in GROUPS else ""
        parts += ["", f"{group}{chosen}:", *rows(group)]
    return "\n".join([*parts, "", "strategy: fedfuse list strategies, and fedfuse list <name> for its settings"])


def _row(key: Key) -> str:
    head = f"  {key.name}={said(key.default)}"
    text = f"{key.meaning}{_kind(key)}{f'; only with {key.only}' if key.only else ''}"
    lines = textwrap.wrap(text, WIDTH - 36) or [""]
    first = f"{head:<34}  {lines[0]}" if len(head) <= 34 else f"{head}\n{'':36}{lines[0]}"
    return "\n".join([first, *(f"{'':36}{line}" for line in lines[1:])])


def _kind(key: Key) -> str:
    return "" if key.kind in ("text", "text or null", "name", "mapping") else f" ({key.kind})"


def _full(key: Key) -> str:
    kind = ": ".join(filter(None, (key.kind, allowed(key.name))))
    out = [f"{key.name}: {key.meaning}", f"  may be: {kind}", f"  default: {said(key.default)}"]
    return "\n".join([*out, f"  only with: {key.only}"] if key.only else out)
