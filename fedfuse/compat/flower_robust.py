"""The rules of Flower's robust strategies, as functions of arrays.

Undocumented names of Flower 1.41, which `FedTrimmedAvg`, `MultiKrum` and `Bulyan` of `flwr.serverapp.strategy` call:
`fedtrimmedavg.trim_mean`, `multikrum.select_multikrum` and `bulyan.aggregate_n_closest_weights`. They buy that a
defence by one of these rules is computed by Flower's own code, in `fedfuse.core.defences`. If a name is gone, this
module cannot be imported: the rules that need it say so when they are first used, and the other rules go on. Guard:
`tests/compat/test_flower.py`.
"""

from __future__ import annotations

from flwr.serverapp.strategy.bulyan import aggregate_n_closest_weights
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from flwr.serverapp.strategy.multikrum import select_multikrum

__all__ = ["aggregate_n_closest_weights", "select_multikrum", "trim_mean"]
