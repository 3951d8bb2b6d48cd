"""A site's private key under a passphrase: Flower's node reads keys without one alone, so it is opened in memory.

The passphrase comes from `$FEDFUSE_PASSPHRASE` or is asked for, never from the command line. The open key lies in a
memory file of this process, which Flower's node runs in: in no directory, and no process that it starts has it.
"""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from fedfuse.deploy.certs import secret
from fedfuse.errors import UserError

PASSPHRASE = "FEDFUSE_PASSPHRASE"  # environment: of this site's key
ENCRYPTED = b"-----BEGIN ENCRYPTED PRIVATE KEY-----"


def passphrase(path: Path, new: bool = False) -> bytes:
    """What opens a key, or with `new` shall open it.

    Raises
    ------
    UserError
        If there is none, nobody to ask, or two that differ.
    """
    told = os.environ.get(PASSPHRASE, "")
    if not told and sys.stdin is not None and sys.stdin.isatty():
        told = getpass.getpass(f"passphrase of {path}: ")
        if new and told != getpass.getpass("again: "):
            raise UserError(f"{path}: the two passphrases differ")
    if not told:
        raise UserError(f"{path}: a passphrase is needed; set {PASSPHRASE}, or start it where it can be asked for")
    return told.encode()


def private_key(path: Path, flag: str) -> ec.EllipticCurvePrivateKey:
    """Read a private key, open or under a passphrase.

    Raises
    ------
    UserError
        If it is none, others may read it, or the passphrase is another.
    """
    content = secret(path, flag).read_bytes()
    try:
        if content.lstrip().startswith(ENCRYPTED):
            key: object = load_pem_private_key(content, passphrase(path))
        else:
            key = load_ssh_private_key(content, None)
    except UserError:
        raise
    except Exception as error:  # of several kinds, for every way to be no key
        cause = " ".join(str(error).split())[:100]
        raise UserError(f"{flag} {path}: no key that this passphrase, or none, opens ({cause})") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{flag} {path}: an elliptic-curve key is needed")
    return key


def opened(path: Path, flag: str) -> Path:
    """Where Flower, in this process, reads a key: the file, or an open copy in memory. The passphrase is forgotten."""
    found = secret(path, flag)
    key = private_key(path, flag)
    if not found.read_bytes().lstrip().startswith(ENCRYPTED):
        return found
    os.environ.pop(PASSPHRASE, None)
    handle = os.memfd_create("key", os.MFD_CLOEXEC)
    os.fchmod(handle, 0o600)
    os.write(handle, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return Path(f"/proc/self/fd/{handle}")
