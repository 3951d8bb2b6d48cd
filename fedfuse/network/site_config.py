"""Which client a site is and where its things lie: light, for a SuperNode's own process computes nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fedfuse.network.policy import Policy, policy_from

MEMORY = "FEDFUSE_MEMORY"  # environment: MB that a task may take beyond what it starts with; empty: no limit


@dataclass(frozen=True)
class SiteConfig:
    """Which client a site is, and where its things lie. The server has no say in any of it.

    Attributes
    ----------
    client : int
        Index of the client (with `clients`, of the first one).
    state : Path
        Folder for everything that must survive; one folder a run below it.
    clients : int or None
        Acts for simulation (`--partition i/n`) as every n-th client from `client` on, so with n clients as exactly
        one; None: the site has data of its own.
    data : str or None
        Folder of the data; None follows $FEDFUSE_DATA.
    store : Path or None
        Where client states lie, if not beside the rest.
    device : str
        `cpu` or `cuda`.
    """

    client: int
    state: Path
    clients: int | None = None
    data: str | None = None
    policy: Policy = field(default_factory=Policy)
    store: Path | None = None
    device: str = "cpu"

    def acts_as(self, clients: int) -> list[int]:
        """The clients of a run that this site is."""
        return [self.client] if self.clients is None else list(range(self.client, clients, self.clients))

    def as_json(self) -> str:
        """Write it for the site's other processes."""
        values = {**vars(self), "state": str(self.state), "store": self.store and str(self.store)}
        return json.dumps({**values, "policy": json.loads(self.policy.as_json())})


def site_config_from(text: str) -> SiteConfig:
    """Read back what `SiteConfig.as_json` wrote."""
    values = json.loads(text)
    policy = policy_from(values.pop("policy"), "policy")
    store = values.pop("store")
    return SiteConfig(**{**values, "state": Path(values["state"]), "store": store and Path(store)}, policy=policy)
