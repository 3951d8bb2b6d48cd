"""What releases cost: ε at δ of a history of Gaussian releases, and the noise that a budget needs."""

from __future__ import annotations

import functools
import math
import warnings

from fedfuse.errors import UserError

Release = tuple[float, float, int]  # noise multiplier σ, sampling rate q, steps
History = tuple[Release, ...]


@functools.lru_cache(maxsize=4096)
def epsilon(history: History, delta: float) -> float:
    """ε at δ of a history, by Opacus's PRV accountant.

    Raises
    ------
    UserError
        If there is so little noise that the accountant's grid would not fit into memory.
    """
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at q = 1 it takes a logarithm of zero, rightly
        try:
            return float(accountant.get_epsilon(delta))
        except MemoryError as error:
            least = min(noise for noise, _, _ in history)
            raise UserError(f"privacy.noise={least:g}: too little for any ε to be told; allowed is more") from error


def joined(history: History, more: History) -> History:
    """A history and what came next; equal neighbours become one entry."""
    out = list(history)
    for noise, rate, steps in more:
        if out and out[-1][:2] == (noise, rate):
            steps += out.pop()[2]
        out.append((noise, rate, steps))
    return tuple(out)


@functools.lru_cache(maxsize=4096)
def noise_for(target: float, delta: float, plan: tuple[tuple[float, int], ...]) -> float:
    """The least σ (to 1 % of ε) with which a plan of (q, steps) costs at most `target`; kept in the user's cache.

    Raises
    ------
    UserError
        If no σ up to 10,000 is enough.
    """
    import numpy as np  # a site's own process, which computes nothing, reads the ledger without it

    from fedfuse.data.cache import key_of, store_arrays, stored_arrays

    key = key_of("noise", target, delta, plan)
    if (known := stored_arrays("noise", key)) is not None:
        return float(known["noise"])

    def cost(noise: float) -> float:
        return epsilon(tuple((noise, rate, steps) for rate, steps in plan), delta)

    aim, low, high = 0.995 * target, (0.0, 0.0), (0.0, 0.0)  # σ and its ε, too little and enough
    trial = 4.0
    while not high[0] or (high[1] < 0.99 * target and not high[0] < 1.001 * low[0]):
        if (found := cost(trial)) <= target:
            high = (trial, found)
        else:
            low = (trial, found)
        if low[0] and high[0]:  # log ε falls almost in a line over log σ
            share = math.log(low[1] / aim) / math.log(low[1] / high[1])
            trial = low[0] * (high[0] / low[0]) ** min(max(share, 0.05), 0.95)
        elif high[0]:
            trial *= max(high[1] / aim, 0.25)
        elif trial > 1e4:
            raise UserError(f"privacy.epsilon={target} at δ={delta:.2g}: no noise multiplier up to 10,000 reaches it")
        else:
            trial *= min(max(1.05 * low[1] / aim, 1.1), 16)
    store_arrays("noise", key, {"noise": np.array(high[0])})
    return high[0]
