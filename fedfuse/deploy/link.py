"""How an operator reaches a server: Flower's command line with a home that knows it."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedfuse.deploy.processes import flower, surroundings
from fedfuse.errors import UserError, WorldError

PATIENCE = 300  # seconds for a command that streams nothing


@dataclass(frozen=True)
class Link:
    """How to reach a server.

    Attributes
    ----------
    address : str
        host:port.
    ca : Path or None
        Certificate of the CA that signed the server's; None only with `insecure`.
    """

    address: str
    ca: Path | None = None
    insecure: bool = False

    @contextmanager
    def home(self) -> Iterator[Path]:
        """A Flower home that knows this server as `fedfuse`.

        Raises
        ------
        UserError
            If there is no CA certificate.
        """
        if not self.insecure and (self.ca is None or not self.ca.is_file()):
            raise UserError(f"--ca {self.ca}: no such file; it is needed unless --insecure is given")
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
                [flower("flwr"), *words],
                env=surroundings(home),
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=PATIENCE,
            )
        if done.returncode:
            said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise WorldError(f"flwr {' '.join(words[:2])}: {' '.join(said[-3:]) or f'exit code {done.returncode}'}")
        return done.stdout
