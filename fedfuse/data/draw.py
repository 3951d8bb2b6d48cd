"""Dealing examples by class priors: exactly as many per client, without replacement."""

from __future__ import annotations

import numpy as np

from fedfuse.errors import UserError


def draw_by_prior(
    targets: np.ndarray, priors: np.ndarray, examples: int, rng: np.random.Generator
) -> tuple[list[np.ndarray], np.ndarray]:
    """Draw `examples` rows for each client from its class prior.

    Clients are served in order. Where a class has run out, the shortage is topped up from the remaining
    classes in proportion to the client's prior, then from whatever is left.

    Parameters
    ----------
    targets : ndarray of int64, shape (n,)
        Class ids 0..C-1.
    priors : ndarray, shape (clients, C)
        Rows that sum to one.
    examples : int
        Rows per client; `clients * examples ≤ n`.

    Returns
    -------
    rows : list of ndarray
        Row ids per client.
    shortage : ndarray of int64, shape (clients,)
        How many of them were topped up.
    """
    classes = priors.shape[1]
    order = rng.permutation(len(targets))
    order = order[np.argsort(targets[order], kind="stable")]
    left = np.bincount(targets, minlength=classes)
    following = np.concatenate([[0], np.cumsum(left)[:-1]])
    rows, shortage = [], np.zeros(len(priors), dtype=np.int64)
    for client, prior in enumerate(priors):
        take = np.minimum(rng.multinomial(examples, prior), left)
        missing = shortage[client] = examples - take.sum()
        while missing:
            weights = np.where(left > take, prior, 0.0)
            # A prior may be exactly zero on every class that is left (small α underflows).
            weights = weights if weights.sum() > 0 else (left - take).astype(float)
            take = np.minimum(take + rng.multinomial(missing, weights / weights.sum()), left)
            missing = examples - take.sum()
        pieces = [order[start : start + count] for start, count in zip(following, take, strict=True) if count]
        rows.append(np.concatenate(pieces))
        following = following + take
        left = left - take
    return rows, shortage


def priors_for(
    name: str, alpha: float, clients: int, groups: int, targets: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return each client's class prior: its own (`prior`) or its group's (`clustered`, round-robin)."""
    classes = int(targets.max()) + 1
    present = np.bincount(targets, minlength=classes) > 0
    count = groups if name == "clustered" else clients
    priors = np.zeros((count, classes))
    priors[:, present] = rng.dirichlet(np.full(present.sum(), alpha), size=count)
    priors /= priors.sum(axis=1, keepdims=True)
    return priors[np.arange(clients) % groups] if name == "clustered" else priors


def deal_by_prior(
    name: str,
    alpha: float,
    groups: int,
    examples: int | None,
    targets: np.ndarray,
    clients: int,
    rng: np.random.Generator,
) -> tuple[list[np.ndarray], list[str]]:
    """Deal rows for `prior` and `clustered`; the notes say what was topped up.

    Raises
    ------
    UserError
        Where there are not enough examples, or more groups than clients.
    """
    if name == "clustered" and not 1 <= groups <= clients:
        raise UserError(f"partition.groups={groups} with clients={clients}; allowed: 1 ≤ groups ≤ clients")
    # Half by default: dealing everything would leave the last clients whatever their prior did not ask for.
    each = max(len(targets) // (2 * clients), 1) if examples is None else examples
    if not 1 <= each <= len(targets) // clients:
        raise UserError(
            f"partition.examples={examples} for clients={clients}: there are {len(targets)} examples; allowed is 1 to "
            f"{len(targets) // clients}"
        )
    priors = priors_for(name, alpha, clients, groups, targets, rng)
    rows, shortage = draw_by_prior(targets, priors, each, rng)
    notes = []
    if shortage.any():
        notes.append(
            f"partition={name}: classes ran out for {np.count_nonzero(shortage)} of {clients} clients; "
            f"{shortage.sum()} of {each * clients} examples were topped up from other classes"
        )
    if name == "clustered":
        notes.append(f"partition=clustered: client i belongs to group i mod {groups}")
    return rows, notes
