"""A node after one that was killed: to Flower its predecessor is online until its heartbeats lapse, 60 s later.

Until then Flower takes no node with the same key, so one that a supervisor starts again at once would be turned away
time after time. The key is the same, so it may say goodbye in the predecessor's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedfuse.compat.flower_fleet import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    FleetHttpClient,
    NodeAuthHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    public_key_to_bytes,
)
from fedfuse.errors import UserError

Reach = tuple[FleetHttpClient, bytes]


@contextmanager
def _client(server: str, ca: Path, key: Path) -> Iterator[Reach]:
    """A connection that speaks as the node, and its public key."""
    try:
        private = load_ssh_private_key(key.read_bytes(), None)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"--key {key}: not a private key without a password ({error})") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise UserError(f"--key {key}: an elliptic-curve key is needed")
    public = private.public_key()
    speaks: Any = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(private, public)]
    with FleetHttpClient.from_server_address(server, False, str(ca), interceptors=speaks) as client:
        yield client, public_key_to_bytes(public)


def _kept(public: bytes, state: Path) -> Path:
    """Where the id that the server has given to a key is kept."""
    return state / f"node-{hashlib.sha256(public).hexdigest()[:12]}"


def succeed(server: str, ca: Path, key: Path, state: Path) -> None:
    """Make room for this node; returns silently if the server is not there or refuses, which the node will then say.

    Parameters
    ----------
    server : str
        host:port.
    ca, key : Path
        Certificate of the server's CA, private key of this node.
    state : Path
        The node's folder.

    Raises
    ------
    UserError
        If the key cannot be read.
    """
    with _client(server, ca, key) as (client, public), suppress(httpx.HTTPError):
        kept = _kept(public, state)
        if not kept.exists():
            found = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30)).node_id
            kept.write_text(str(found))
        client.DeactivateNode(DeactivateNodeRequest(node_id=int(kept.read_text())))


def revoked(server: str, ca: Path, key: Path, state: Path) -> bool:
    """Whether the server does not know a node's key any more, which it knew; False if it cannot be asked."""
    try:
        with _client(server, ca, key) as (client, public):
            client.DeactivateNode(DeactivateNodeRequest(node_id=int(_kept(public, state).read_text())))
    except httpx.HTTPStatusError as error:
        return error.response.status_code == httpx.codes.UNAUTHORIZED
    except (httpx.HTTPError, OSError):
        pass
    return False
