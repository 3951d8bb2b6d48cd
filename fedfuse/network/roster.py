"""Who may be which client, with how many examples: written at registration, looked up by the key that a node proves."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)

from fedfuse.config.files import replaced
from fedfuse.errors import UserError

MOST = 2**40
USUAL = 10**8  # examples of a site at most, where its place says nothing: memory and rounds are planned by them


@dataclass(frozen=True)
class Place:
    """What one key may be.

    Attributes
    ----------
    name : str
    client : int
        The client, or with `every` the first of them.
    every : int or None
        Acts as every so many-th simulated client.
    least, most : int
        Training examples that it may say it has.
    """

    name: str
    client: int
    every: int | None = None
    least: int = 0
    most: int = USUAL

    def fault_of(self, clients: Iterable[int], examples: Iterable[int]) -> str | None:
        """What is wrong with what a node says it is; None if nothing."""
        for client in clients:
            mine = client == self.client if self.every is None else client % self.every == self.client
            if not mine:
                return f"says it acts as client {client}; its key is registered as {self.said}"
        for count in examples:
            if not self.least <= count <= self.most:
                return f"says it has {count} examples; its key is registered with {self.least} to {self.most}"
        return None

    def overlaps(self, other: Place) -> bool:
        """Whether there is a client that either may be."""
        apart, step = self.client - other.client, math.gcd(self.every or 0, other.every or 0)
        return apart % step == 0 if step else apart == 0

    @property
    def said(self) -> str:
        """Which clients it may be, in words."""
        return f"client {self.client}" if self.every is None else f"partition {self.client}/{self.every}"


def fingerprint(public: bytes) -> str:
    """Name a public key, in OpenSSH's form or in PEM.

    Raises
    ------
    UserError
        If it is none.
    """
    try:
        load = load_ssh_public_key if public.lstrip().startswith((b"ecdsa-", b"ssh-")) else load_pem_public_key
        content = load(public).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    except Exception as error:
        raise UserError(f"not a public key ({' '.join(str(error).split())[:100]})") from error
    return hashlib.sha256(content).hexdigest()


class Roster:
    """The roster in one file, read anew at every look.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def places(self) -> dict[str, Place]:
        """Everyone, by fingerprint."""
        if not self.path.exists():
            return {}
        return {key: place_from(value) for key, value in json.loads(self.path.read_text(encoding="utf-8")).items()}

    def place(self, public: bytes) -> Place | None:
        """What a key may be; None for a stranger's."""
        try:
            return self.places().get(fingerprint(public))
        except UserError:
            return None

    def add(self, key: str, place: Place) -> list[str]:
        """Enter a key, or enter it anew; return who else may be the same client: whoever says so first then is it."""
        places = {**self.places(), key: place}
        with replaced(self.path, durable=True) as partial:
            text = json.dumps({known: asdict(value) for known, value in places.items()}, indent=1)
            partial.write_text(text, encoding="utf-8")
        return [other.name for known, other in places.items() if known != key and other.overlaps(place)]


def place_from(values: Mapping[str, Any]) -> Place:
    """Read what `asdict` wrote, or what an operator asks for.

    Raises
    ------
    UserError
        If it is no place.
    """
    try:
        place = Place(**values)
        numbers = [place.client, place.least, place.most, *([place.every] if place.every is not None else [])]
        good = isinstance(place.name, str) and len(place.name) <= 100 and place.name.isprintable()
        good = good and all(type(n) is int and 0 <= n <= MOST for n in numbers) and place.least <= place.most
        good = good and (place.every is None or place.client < place.every)
    except TypeError:
        good = False
    if not good:
        raise UserError(f"{str(dict(values))[:200]}: no place of a roster (name, client, every, least, most)")
    return place
