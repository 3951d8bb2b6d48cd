"""Flower's own client of a SuperLink's fleet interface, for what a SuperNode says there before it is one.

Internal names of Flower 1.41, imported and not changed: the request types of `flwr.proto.fleet_pb2`,
`FleetHttpClient` and the two interceptors that sign its calls. They buy that a node of a killed process is taken
off and put on again by its own key within seconds, where the SuperLink would else wait for its heartbeat to run
out. If one is gone, importing `fedfuse.deploy.successor` fails and says which. Guard:
`tests/compat/test_flower.py`.
"""

from __future__ import annotations

from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

__all__ = [
    "ActivateNodeRequest",
    "DeactivateNodeRequest",
    "FleetHttpClient",
    "NodeAuthHttpInterceptor",
    "RuntimeVersionHttpInterceptor",
    "public_key_to_bytes",
]
