"""A node after one that was killed: to Flower its predecessor is online until its heartbeats lapse, 60 s later.

Until then Flower takes no node with the same key, so one that a supervisor starts again at once would be turned away
time after time. The key is the same, so it may say goodbye in the predecessor's name.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedfuse.errors import UserError

LAPSE = 75.0  # seconds; Flower's own is 2 × 30


def succeed(server: str, ca: Path, key: Path, state: Path) -> None:
    """Make room for this node; returns silently if the server is not there or refuses, which the node will then say.

    Parameters
    ----------
    server : str
        host:port.
    ca, key : Path
        Certificate of the server's CA, private key of this node.
    state : Path
        Where the id that the server has given to this key is kept.

    Raises
    ------
    UserError
        If the key cannot be read.
    """
    try:
        private = load_ssh_private_key(key.read_bytes(), None)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"--key {key}: not a private key without a password ({error})") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise UserError(f"--key {key}: an elliptic-curve key is needed")
    public = public_key_to_bytes(private.public_key())
    kept = state / f"node-{hashlib.sha256(public).hexdigest()[:12]}"
    speaks = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),
    ]
    until = time.monotonic() + LAPSE
    with FleetHttpClient.from_server_address(server, False, str(ca), interceptors=speaks) as client:
        while True:
            try:
                if kept.exists():
                    with suppress(httpx.HTTPStatusError):  # it went by itself, or is registered no more
                        client.DeactivateNode(DeactivateNodeRequest(node_id=int(kept.read_text())))
                    return
                found = client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30)).node_id
                kept.write_text(str(found))
            except httpx.HTTPStatusError as error:
                told = FlowerError.from_json(error.response.text)
                if told is None or told.code != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED or time.monotonic() > until:
                    return
                print("fedfuse: another node with this key is online, or was until it was killed; waiting", flush=True)
                time.sleep(5)
            except httpx.HTTPError:
                return
