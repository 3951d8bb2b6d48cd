"""How an operator reaches a server: Flower's command line with a home that knows it."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfuse.deploy.certs import secret
from fedfuse.deploy.processes import flower, surroundings
from fedfuse.errors import UserError, WorldError, one_line, printable

PATIENCE = 300  # seconds for a command that streams nothing
ANSWER = 2**20  # bytes of an answer that is no file
WIDE = "400"  # columns of what Flower's commands write: a table is not cut, an error stays in one line
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
FRAME = "╭╮╰╯│─ "  # of the boxes that Flower puts errors in


class Lost(WorldError):
    """The server cannot be reached."""


def no_ca(path: Path | None) -> str:
    """What to say where the CA's certificate is not there."""
    return f"{'--ca' if path is None else f'--ca {path}: no such file; it'} is needed unless --insecure is given"


def plain(line: str) -> str:
    """A line of Flower's commands without colours, and without the box around an error."""
    bare = COLOUR.sub("", line).rstrip()
    if bare.startswith(("╭", "╰")):
        return ""
    return bare.strip(FRAME) if bare.startswith("│") and bare.count("│") == 2 else bare


def _taken(got: Any, most: int) -> Iterator[bytes]:
    """An answer, piece by piece, until it is longer than it may be."""
    taken = 0
    for part in got.iter_raw():
        taken += len(part)
        if taken > most:
            raise WorldError(f"the server's answer has more than {most} bytes; no more of it was read")
        yield part


def _detail(answer: bytes) -> str:
    """Why a server does not do what it was asked for, in its own words."""
    try:
        return one_line(json.loads(answer)["detail"])
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):
        return one_line(answer.decode(errors="replace"))


@dataclass(frozen=True)
class Link:
    """How to reach a server.

    Attributes
    ----------
    address : str
        host:port.
    ca : Path or None
        Certificate of the CA that signed the server's; None only with `insecure`.
    operator : Path or None
        The operator's certificate, `NAME.pem` with `NAME.key` beside it.
    """

    address: str
    ca: Path | None = None
    insecure: bool = False
    operator: Path | None = None

    @property
    def words(self) -> list[str]:
        """Flower's command line, with the operator's certificate if there is one."""
        if self.insecure or self.operator is None:
            return [flower("flwr")]
        ca, pem, key = self._files()
        return [sys.executable, "-m", "fedfuse.deploy.as_operator", str(ca), str(pem), str(key)]

    def context(self) -> ssl.SSLContext | None:
        """What a connection trusts and shows; None without TLS."""
        from fedfuse.deploy.as_operator import certified

        return None if self.insecure else certified(*map(str, self._files()))

    def _files(self) -> tuple[Path, Path, Path]:
        """Certificates and key.

        Raises
        ------
        UserError
            If one is missing, or the key can be read by others.
        """
        if self.ca is None or not self.ca.is_file():
            raise UserError(no_ca(self.ca))
        if self.operator is None or not self.operator.is_file():
            raise UserError(
                f"--operator {self.operator}: no such file; the server asks for a certificate "
                "(fedfuse deploy certs DIR --operator NAME makes one)"
            )
        return self.ca, self.operator, secret(self.operator.with_suffix(".key"), "--operator")

    def request(
        self, method: str, path: str, content: bytes = b"", into: Path | None = None, most: int = ANSWER
    ) -> bytes | None:
        """Ask the operators' door; what it answers, or None if it is not there. With `into`, to a file.

        Bytes are taken as they come: what is compressed on the wire would grow here.

        Raises
        ------
        UserError
            If the server refuses.
        Lost
            If it cannot be reached.
        WorldError
            If it fails, or answers with more than `most` bytes.
        """
        import httpx

        verify: Any = self.context() or False
        url = f"http{'' if self.insecure else 's'}://{self.address}/fedfuse/{path}"
        try:
            plain = {"accept-encoding": "identity"}
            with (
                httpx.Client(verify=verify, timeout=60, headers=plain) as client,
                client.stream(method, url, content=content) as got,
            ):
                if got.status_code == httpx.codes.NOT_FOUND:
                    return None
                if got.status_code != httpx.codes.OK:
                    why = _detail(b"".join(_taken(got, ANSWER)))
                    if got.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
                        raise WorldError(f"the server at {self.address} failed: {why}")
                    raise UserError(f"the server refuses: {why}")
                if into is None:
                    return b"".join(_taken(got, most))
                with open(into, "wb") as file:
                    file.writelines(_taken(got, most))
                return b""
        except (httpx.HTTPError, ssl.SSLError) as error:
            turned = isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) and not self.insecure
            why = f" (is --operator {self.operator} of its CA, and valid today?)" if turned else ""
            raise Lost(f"the server at {self.address} cannot be asked: {one_line(error)}{why}") from error

    def leave(self, path: str, content: bytes) -> bytes:
        """Leave something at the operators' door; what it answers. See `ask`."""
        return self.ask("POST", path, content)

    def ask(self, method: str, path: str, content: bytes = b"", most: int = ANSWER) -> bytes:
        """`request` something that every server has.

        Raises
        ------
        UserError
            If the server refuses, or has no such door there.
        WorldError
            If it cannot be asked, or fails.
        """
        answer = self.request(method, path, content, most=most)
        if answer is None:
            raise UserError(
                f"--server {self.address}: is no operators' port of a FedFuse server (--control-port there)"
            )
        return answer

    @contextmanager
    def home(self) -> Iterator[Path]:
        """A Flower home that knows this server as `fedfuse`.

        Raises
        ------
        UserError
            If there is no CA certificate.
        """
        if not self.insecure and (self.ca is None or not self.ca.is_file()):
            raise UserError(no_ca(self.ca))
        with tempfile.TemporaryDirectory(prefix="fedfuse-") as folder:
            trust = "insecure = true" if self.insecure else f"root-certificates = {json.dumps(str(self.ca.resolve()))}"  # type: ignore[union-attr]
            text = f'[superlink]\ndefault = "fedfuse"\n\n[superlink.fedfuse]\naddress = "{self.address}"\n{trust}\n'
            (Path(folder) / "config.toml").write_text(text, encoding="utf-8")
            yield Path(folder)

    def flwr(self, *words: str) -> str:
        """Run a command of Flower's against this server and return what it says.

        Raises
        ------
        WorldError
            If it fails.
        """
        with self.home() as home:
            done = subprocess.run(
                [*self.words, *words],
                env=surroundings(home, COLUMNS=WIDE),
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=PATIENCE,
            )
        if done.returncode:
            said = [line for line in map(plain, (done.stderr or done.stdout).splitlines()) if line]
            raise WorldError(f"flwr {' '.join(words[:2])}: {' '.join(said[-3:]) or f'exit code {done.returncode}'}")
        lines = [printable(line.rstrip()) for line in done.stdout.split("\n")]
        return "\n".join(line for line in lines if not line.startswith("Using SuperLink"))
