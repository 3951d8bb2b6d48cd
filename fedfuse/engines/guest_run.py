"""The command `fedfuse flower APP_DIR`."""

from __future__ import annotations

import gc
import os
import select
import sys
from collections.abc import Sequence
from pathlib import Path

from fedfuse.errors import UserError, WorldError

USAGE = """\
fedfuse flower APP_DIR [--nodes N] [--run-config "key=value …"] [--workers W] [--retries R]

Runs an unmodified Flower app (its pyproject.toml names a ServerApp and a ClientApp) on FedFuse's engine.
  --nodes N         simulated nodes (partition-id 0 … N-1); default what the app's pyproject.toml says, else 10
  --run-config …    overrides of [tool.flwr.app.config], as `flwr run` takes them; may be repeated; or a .toml file
  --workers W       processes; default one a core
  --retries R       how often a node that fails is tried again; default 2
"""


def command(argv: Sequence[str]) -> int:
    """Run a Flower app; 0 done.

    Raises
    ------
    UserError
        If the app or an option is wrong.
    WorldError
        If the app failed.
    """
    words = list(argv)
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE, end="")
        return 0
    directory, given = _read(words)
    app = Path(directory)
    if not app.is_dir():
        raise UserError(f"{directory}: no such directory; a Flower app's directory is needed")
    from flwr.app import Context, RecordDict
    from flwr.serverapp import ServerApp

    from fedfuse.compat.flower_apps import new_run
    from fedfuse.compat.flower_identity import claim_identity
    from fedfuse.engines.cluster import connect
    from fedfuse.engines.guest import GuestGrid, nodes_of, read_app
    from fedfuse.engines.guest_worker import load

    server, client, config, table = read_app(app, given["--run-config"])
    nodes = _count(given, "--nodes", nodes_of(table), 1)
    workers = _count(given, "--workers", min(len(os.sched_getaffinity(0)), nodes), 1)
    retries = _count(given, "--retries", 2, 0)
    claim_identity()
    connect(workers)
    where = str(app.resolve())
    grid = GuestGrid(client, where, config, nodes, workers, retries)
    try:
        grid.set_run(new_run(1))
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
        loaded = load(server, where, ServerApp)
        gc.freeze()  # what was imported is never garbage: looking through it takes 0.1 s, several times in ten rounds
        loaded(grid=grid, context=context)
    except (UserError, WorldError):
        raise
    except Exception as error:
        import traceback

        if isinstance(error, BrokenPipeError) and _unread():
            raise
        traceback.print_exc()
        raise WorldError(f"{server} failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error
    finally:
        grid.close()
    if grid.failed and not grid.succeeded:
        raise WorldError(f"no node succeeded: {grid.told}")
    if grid.failed:
        left_out = "1 message was" if grid.failed == 1 else f"{grid.failed} messages were"
        print(f"fedfuse: {left_out} left out because their node failed", file=sys.stderr)
    return 0


def _unread() -> bool:
    """Whether nobody reads what we print any more (`| head`), rather than what the app writes to."""
    output = select.poll()
    output.register(sys.stdout, 0)
    return bool(output.poll(0))


def _read(words: list[str]) -> tuple[str, dict[str, list[str]]]:
    given: dict[str, list[str]] = {"--nodes": [], "--run-config": [], "--workers": [], "--retries": []}
    rest = []
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == "-c":
            name = "--run-config"
        if name in given:
            if not equals:
                if not words:
                    raise UserError(f"{name}: needs a value")
                value = words.pop(0)
            given[name].append(value)
        elif word.startswith("-"):
            raise UserError(f"{name}: no such option; allowed: {', '.join(given)}")
        else:
            rest.append(word)
    if len(rest) != 1:
        raise UserError("fedfuse flower: needs one app directory")
    return rest[0], given


def _count(given: dict[str, list[str]], name: str, default: int, least: int) -> int:
    text = given[name][-1] if given[name] else str(default)
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text}: a number of at least {least} is needed")
    return int(text)
