"""What Flower does for anybody's app: read its `pyproject.toml`, import it, give its messages their ids.

Internal names of Flower 1.41: `flwr.common.config`, `flwr.common.constant.ErrorCode`,
`flwr.supercore.object_ref.load_app`, `flwr.supercore.run.Run`, `flwr.cli.build.build_fab_from_disk`, and a
message's `_message_id`, which only a SuperLink sets. They buy that `fedfuse flower` reads an app exactly as `flwr
run` does, that a ServerApp finds its replies by the ids it was given, and that our bundle's hash is that of the
bundle Flower builds. Without them the command and the bundle end in an ImportError that names the line; runs of
FedFuse's strategies need none of it. Guard: `tests/compat/test_flower.py`.
"""

from __future__ import annotations

import copy
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.config import flatten_dict, fuse_dicts, get_project_config, parse_config_args
from flwr.common.constant import ErrorCode
from flwr.supercore.object_ref import load_app

APP_RAISED = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
MESSAGE_GONE = ErrorCode.MESSAGE_UNAVAILABLE


def name_message(message: Message, key: str) -> None:
    """Give a message the id under which its sender will look for the reply."""
    message.metadata.__dict__["_message_id"] = key


def pushed(message: Message) -> Message:
    """A message as it was when it was pushed: who pushes it a second time gives it another id."""
    return as_received(copy.copy(message.metadata), message.content)


def as_received(metadata: Any, content: RecordDict) -> Message:
    """The message that metadata and content were, put together again in another process."""
    return Message(metadata=metadata, content=content)  # type: ignore[call-overload]


def new_run(run_id: int) -> Any:
    """A run of Flower's that names nothing but its id."""
    from flwr.supercore.run import Run

    return Run.create_empty(run_id)


def build_bundle(directory: Any) -> bytes:
    """The bundle that Flower's own command line builds of an app's directory."""
    from flwr.cli.build import build_fab_from_disk

    return build_fab_from_disk(directory)


__all__ = [
    "APP_RAISED",
    "MESSAGE_GONE",
    "as_received",
    "build_bundle",
    "flatten_dict",
    "fuse_dicts",
    "get_project_config",
    "load_app",
    "name_message",
    "new_run",
    "parse_config_args",
    "pushed",
]
