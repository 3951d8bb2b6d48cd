"""A Flower ClientApp with one door."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flwr.app import Context, Message
from flwr.clientapp import ClientApp


class SiteApp(ClientApp):
    """Answers messages of any type: phases are named by strategies, so types are not known beforehand."""

    def __init__(self, answer: Callable[[Message, Context], Message]) -> None:
        super().__init__()
        self._answer = answer

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        return self._answer(message, context)


def command(argv: Sequence[str]) -> int:
    """Run `fedfuse flower`."""
    from fedfuse.engines.guest_run import command as run

    return run(argv)
