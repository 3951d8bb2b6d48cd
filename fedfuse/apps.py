"""What a thin Flower app points at: `fedfuse.apps:server` and `fedfuse.apps:client`, with fedfuse installed.

The server app takes its orders from the run configuration (`config`, a checked configuration as JSON; see
`fedfuse.deploy.bundle`). The client app takes them from messages, within what its own site's seat allows; the
server has no say in the seat.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from fedfuse.errors import UserError
from fedfuse.network.app import SiteApp
from fedfuse.network.joined import JoinedGrid, answered
from fedfuse.network.site import Site
from fedfuse.network.site_config import SiteConfig, site_config_from

SEAT = "FEDFUSE_SEAT"  # environment: path of the seat's file, written by `fedfuse deploy node`

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Play one run on Flower's Deployment Runtime."""
    from fedfuse.deploy.orders import deployed

    deployed(JoinedGrid(grid), dict(context.run_config))


def answer(message: Message, context: Context) -> Message:
    """Answer one message; a new process each time: what must survive is on the site's disk, or in Flower's memory."""
    site = Site(_seat(dict(context.node_config)))
    return answered(message, lambda parted: site.handle(parted, context.state))


client = SiteApp(answer)


def _seat(config: dict[str, Any]) -> SiteConfig:
    """The seat: from the file that our own launcher wrote, else from Flower's `--node-config`."""
    path = os.environ.get(SEAT)
    if path:
        return site_config_from(Path(path).read_text(encoding="utf-8"))
    try:
        state = Path(str(config["state-dir"]))
        return SiteConfig(int(config["partition-id"]), state, int(config["num-partitions"]), config.get("data"))
    except KeyError as error:
        raise UserError(
            f"--node-config: {error.args[0]} is missing; needed: state-dir, partition-id, num-partitions"
        ) from error
