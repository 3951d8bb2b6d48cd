"""Settings that all clients and the server half are handed: who changes one changes it for all in the process."""

from __future__ import annotations

from typing import Any

from fedfuse.config.schema import Config
from fedfuse.models.as_built import copy_of, inside, put_back


class Settings:
    """What both halves read as `training` and `hyper`, as it is now.

    Parameters
    ----------
    config : Config
        Of which `train` is looked at.
    hyper : Any
        The strategy's hyper-parameters.
    """

    def __init__(self, config: Config, hyper: Any) -> None:
        groups = {"train": vars(config.train), "strategy": getattr(hyper, "__dict__", {})}
        held = [(group, one) for group, whole in groups.items() for one in inside(whole)]
        self._groups = [group for group, _ in held]
        self._now = [one for _, one in held]
        self._then = [copy_of(one) for one in self._now]

    def changed(self) -> str:
        """The setting that was changed since, put back; empty if none was."""
        if self._now == self._then:
            return ""
        told = ""
        for group, now, then in zip(self._groups, self._now, self._then, strict=True):
            if now != then:
                names = (
                    [name for name in {**then, **now} if now.get(name) != then.get(name)] if type(now) is dict else []
                )
                told = told or ".".join([group, *names[:1]])
                put_back(now, then)
        return told
