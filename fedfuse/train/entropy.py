"""Randomness that nobody can repeat, for a deployed site's noise: a cipher's keystream instead of 32 bits of seed.

torch's CPU generator keeps 32 bits of what it is seeded with, so whoever has the noisy sum of one step can try them all
and take the noise off. Here ChaCha20 (RFC 8439, by `cryptography`) under a key of 256 bits from the operating system
gives the bits. Each normal number is the sum of four, divided by two: with one draw, the set of values that floating
point can take tells part of the noise's secret (Mironov 2012; Holohan and Braghin, arXiv 2107.10138, section 5.1).
"""

from __future__ import annotations

import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from torch import Tensor

DRAWS = 4  # 2n of Holohan and Braghin, n = 2
LONGEST = 2**30  # bytes under one key


class Keystream:
    """Draws from a cipher's keystream; a new key after every 2³⁰ bytes.

    Attributes
    ----------
    left : int
        Bytes that may still be drawn under the present key.
    """

    def __init__(self) -> None:
        self.left = 0

    def bytes(self, count: int) -> bytes:
        """That many random bytes."""
        out = []
        while count:
            if not self.left:
                cipher = Cipher(algorithms.ChaCha20(secrets.token_bytes(32), bytes(16)), mode=None)
                self._stream, self.left = cipher.encryptor(), LONGEST
            size = min(count, self.left)
            out.append(self._stream.update(bytes(size)))
            self.left -= size
            count -= size
        return b"".join(out)

    def uniform(self, count: int) -> np.ndarray:
        """Numbers in [0, 1), each of 53 random bits."""
        words = np.frombuffer(self.bytes(8 * count), dtype="<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, count: int) -> np.ndarray:
        """Standard normal numbers (Box and Muller), each the sum of four over two."""
        half = -(-count * DRAWS // 2)
        radius, angle = np.sqrt(-2.0 * np.log1p(-self.uniform(half))), 2.0 * np.pi * self.uniform(half)
        drawn = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: count * DRAWS]
        total: np.ndarray = drawn.reshape(DRAWS, count).sum(0) / np.sqrt(DRAWS)
        return total


Source = torch.Generator | Keystream  # what samples and noise are drawn from


def uniform(count: int, source: Source) -> Tensor:
    """Numbers in [0, 1)."""
    if isinstance(source, Keystream):
        return torch.from_numpy(source.uniform(count))
    return torch.rand(count, generator=source)


def gaussian(like: Tensor, deviation: float, source: Source) -> Tensor:
    """Normal noise in the form of a tensor."""
    if isinstance(source, Keystream):
        drawn = torch.from_numpy(source.normal(like.numel()) * deviation)
        return drawn.reshape(like.shape).to(like.device, like.dtype)
    return (deviation * torch.randn(like.shape, generator=source)).to(like.device)
