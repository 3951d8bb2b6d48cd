"""`fedfuse deploy`: the same strategy file as real processes over TLS, on Flower's Deployment Runtime.

The operator's commands and processes: it may import `runs`, `network` and what is below them.
"""

from __future__ import annotations

from collections.abc import Sequence


def command(argv: Sequence[str]) -> int:
    """Run `fedfuse deploy …`; returns the exit code.

    Raises
    ------
    UserError
        For a mistake in the command.
    WorldError
        If the world failed.
    """
    from fedfuse.deploy.commands import main

    return main(list(argv))
