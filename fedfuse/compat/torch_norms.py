"""The bases of torch's normalisation layers that keep statistics.

Private names of torch: `_BatchNorm` and `_NormBase` of `torch.nn.modules.batchnorm`. They buy that a user's own layer,
derived from them, is known for one: DP-SGD refuses a BatchNorm, and what FedBN keeps private includes it. Without the
names only torch's public layers and what derives from those are known. Guard: `tests/compat/test_torch.py`.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules import batchnorm

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM = (*_BATCH, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

BATCH_NORMS: tuple[type[nn.Module], ...] = (*_BATCH, getattr(batchnorm, "_BatchNorm", nn.BatchNorm1d))
KEEP_STATISTICS: tuple[type[nn.Module], ...] = (*_NORM, getattr(batchnorm, "_NormBase", nn.BatchNorm1d))
