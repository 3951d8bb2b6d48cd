"""An image as the beginning of a text: a frozen encoder and connector, and small adapters of what a reader reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """h = e + B A e for embeddings e (… × d)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, e: Tensor) -> Tensor:
        """Adapted embeddings."""
        return e + e @ self.A.T @ self.B.T

    def slopes(self, e: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """∂ℓ/∂A (n × r × d) and ∂ℓ/∂B (n × d × r) of each example, from e and g = ∂ℓ/∂h (both n × L × d)."""
        return torch.einsum("nlr,nld->nrd", g @ self.B, e), torch.einsum("nld,nlr->ndr", g, e @ self.A.T)


class SoftPrompt(nn.Module):
    """Encoder and connector, frozen, and an adapter for each modality: images become embeddings that a reader takes.

    Parameters
    ----------
    encoder : nn.Module
        With `features` and `feature_dim`.
    tokens : int
        L, embeddings of an image.
    width : int
        d, numbers in an embedding.
    rank : int
        r of the adapters.
    """

    def __init__(self, encoder: nn.Module, tokens: int, width: int, rank: int) -> None:
        super().__init__()
        self.feature_dim = int(encoder.feature_dim)  # type: ignore[arg-type]
        self.encoder, self.connector = encoder, nn.Linear(self.feature_dim, tokens * width)
        self.image, self.text = Adapter(width, rank), Adapter(width, rank)
        self.frozen = frozenset(n for n in self.state_dict() if n.startswith(("encoder.", "connector.")))
        self.encoder.requires_grad_(False)
        self.connector.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings of images."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """The encoder's output (B × feature_dim)."""
        return self.encoder.features(x)  # type: ignore[operator]

    def head(self, z: Tensor) -> Tensor:
        """Embeddings (B × L × d) of the image tokens, before the adapter."""
        return F.layer_norm(self.connector(z).unflatten(1, (-1, self.image.A.shape[1])), self.image.A.shape[1:])
