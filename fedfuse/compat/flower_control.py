"""Flower's own client of a SuperLink's control interface, for the one call that its command line makes too slowly.

Internal names of Flower 1.41, imported and not changed: `RegisterNodeRequest` of `flwr.proto.control_pb2`,
`ControlHttpClient`, `RuntimeVersionHttpInterceptor`, `ApiErrorCode` and `public_key_to_bytes`. They buy that a site
is registered within a tenth of a second, where a process of Flower's command line takes seconds to start: `deploy
local` registers all its nodes. If one is gone, `deploy register` and `deploy local` fail and say which. Guard:
`tests/compat/test_flower.py`.
"""

from __future__ import annotations

import ssl

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fedfuse.errors import WorldError, one_line


def registered(address: str, context: ssl.SSLContext | None, key: ec.EllipticCurvePublicKey) -> int | None:
    """Let a node's key in; the id that Flower gives its node, None if the key was let in before.

    Parameters
    ----------
    address : str
        host:port where operators reach the server.
    context : ssl.SSLContext or None
        With the operator's certificate; None without TLS.

    Raises
    ------
    WorldError
        If the server refuses, or cannot be asked.
    """
    url, speaks = f"http{'s' if context else ''}://{address}", [RuntimeVersionHttpInterceptor("flwr CLI")]
    try:
        with ControlHttpClient(url, interceptors=speaks, verify=context or False) as client:
            return int(client.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(key))).node_id)
    except httpx.HTTPStatusError as error:
        try:
            said = error.response.json()
            if said.get("code") == ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                return None
            why = said["detail"]
        except (ValueError, RecursionError, AttributeError, KeyError):
            why = error
        raise WorldError(f"the server at {address}: {one_line(why)}") from error
    except (httpx.HTTPError, ValueError) as error:
        raise WorldError(f"the server at {address} cannot be asked: {one_line(error)}") from error
