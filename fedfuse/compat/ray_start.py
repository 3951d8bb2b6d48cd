"""Ray's start without the processes that serve nobody here.

Private names of Ray 2.50 to 2.5x: `ray._private.ray_constants`, `.services.start_ray_process` and `.ConsolePopen`,
`.node.Node.start_api_server`, `.parameter.RayParams`, `.worker.listen_error_messages`, of `ray._raylet` the port names
and `persist_port`, and the options `_temp_dir` and `_system_config` of `ray.init` (see `private_options`).

All but the options save five Python processes, most of the time of `ray.init` (docs/performance_history.md): the
autoscaler, the log monitor, the dashboard's server, and the raylet's two agents, of which one reports to the dashboard
and one builds runtime environments; our actors have none. And a worker that dies is told of by us in a line, where
Ray prints a paragraph on standard output. If such a name is gone, `lean_start` raises, and
`engines.cluster.connect` says so and starts Ray as it is. An option that is gone is not given. Guard:
`tests/compat/test_ray.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import shlex
from collections.abc import Iterator
from functools import partial, partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray

AGENTS = {  # of a raylet: the option that starts one, and the ports it writes down
    "--dashboard_agent_command": ("METRICS_AGENT", "METRICS_EXPORT", "DASHBOARD_AGENT_LISTEN"),
    "--runtime_env_agent_command": ("RUNTIME_ENV_AGENT",),
}


def private_options(folder: Path) -> dict[str, Any]:
    """Options of `ray.init` that Ray may take away: where sockets and logs lie, how replies come, workers' priority.

    Replies of a few small groups come with the call, without the object store's two extra turns. Workers are as
    urgent as their driver: at Ray's niceness of 15, one busy process beside them leaves them a thirtieth of a core.
    """
    options = {
        "_temp_dir": str(folder),
        "_system_config": {"max_direct_call_object_size": 2 * 2**20, "worker_niceness": 0},
    }
    taken = inspect.unwrap(ray.init).__code__.co_consts  # it takes them out of its `**kwargs`, by these strings
    return {name: value for name, value in options.items() if name in taken}


@contextlib.contextmanager
def lean_start() -> Iterator[None]:
    """Let Ray start lean while this lasts.

    A raylet must have its agents, and waits for the ports they write down. So the ports of "no service" are written
    here, and `cat`, which ends with the pipe from the raylet, stands in. Ray has no option for any of it.

    What is started has a process group of its own: batch systems send SIGTERM to a whole group, and a driver whose
    Ray is gone before it waits for it, for a minute. The kernel ends these processes with the driver.
    """
    from ray._private import ray_constants, services, worker
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    raylet: Any = importlib.import_module("ray._raylet")
    ports = {flag: [getattr(raylet, f"{name}_PORT_NAME") for name in names] for flag, names in AGENTS.items()}
    start = services.start_ray_process

    def without_agents(command: list[str], *args: Any, **options: Any) -> Any:
        for i, word in enumerate(command):
            flag, _, agent = word.partition("=")
            if flag in ports:
                told = dict(part.partition("=")[::2] for part in shlex.split(agent))
                for name in ports[flag]:
                    raylet.persist_port(told["--session-dir"], told["--node-id"], name, -1)
                command[i] = f"{flag}=cat"
        return start(command, *args, **options)

    settings = partialmethod(RayParams.__init__, no_monitor=True, include_log_monitor=False)
    with (
        patch.object(RayParams, "__init__", settings),
        patch.object(Node, "start_api_server", lambda node, **options: None),
        patch.object(services, "start_ray_process", without_agents),
        patch.object(services, "ConsolePopen", partial(services.ConsolePopen, process_group=0)),
        patch.object(worker, "listen_error_messages", lambda *given: None),
        # under `uv run` or with a hook, Ray would give every actor a runtime environment
        patch.object(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", False),
        patch.object(ray_constants, "RAY_RUNTIME_ENV_HOOK", "FEDFUSE_NO_HOOK"),
    ):
        yield
