"""The cryptography of Flower's SecAgg+: key agreement, encryption between clients, and shares of a secret.

Private names of Flower 1.41: `flwr.common.secure_aggregation` (Shamir's shares, Fernet under a key agreed by ECDH, the
layout of a pair of shares) and `flwr.supercore.primitives.asymmetric` (key pairs on P-384). They buy that no
cryptography here is our own; Flower's own workflow around them runs on its legacy server and on one model only.

Not taken: `pseudo_rand_gen`, which folds a seed to the 32 bits of a Mersenne Twister, so that a server could try all
masks in hours. Masks are ChaCha20's keystream (RFC 8439, by `cryptography`) under the whole 256 bits.

Without these names secure aggregation is refused, and nothing else is lost. Guard: `tests/compat/test_secagg.py`.
"""

from __future__ import annotations

import base64

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedfuse.errors import Refused

try:
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
    from flwr.common.secure_aggregation.secaggplus_utils import (
        share_keys_plaintext_concat,
        share_keys_plaintext_separate,
    )
    from flwr.supercore.primitives import asymmetric
except ImportError:  # pragma: no cover - another Flower
    asymmetric = None  # type: ignore[assignment]


def key_pair() -> tuple[bytes, bytes]:
    """A new private key and its public key.

    Raises
    ------
    Refused
        If this Flower has no SecAgg+.
    """
    if asymmetric is None:  # pragma: no cover - another Flower
        raise Refused("this Flower has no secure aggregation where flwr 1.41 has it")
    private, public = asymmetric.generate_key_pairs()
    return asymmetric.private_key_to_bytes(private), asymmetric.public_key_to_bytes(public)


def agreed(private: bytes, public: bytes) -> bytes:
    """The 256 bits that only two parties know, from the private key of one and the public key of the other."""
    found = generate_shared_key(asymmetric.bytes_to_private_key(private), asymmetric.bytes_to_public_key(public))
    return base64.urlsafe_b64decode(found)


def sealed(key: bytes, source: int, target: int, mask_share: bytes, key_share: bytes) -> bytes:
    """One client's pair of shares for another, encrypted: of its mask's seed, and of its private key."""
    plain = share_keys_plaintext_concat(source, target, mask_share, key_share)
    return encrypt(base64.urlsafe_b64encode(key), plain)


def opened(key: bytes, ciphertext: bytes) -> tuple[int, int, bytes, bytes]:
    """Source, target and the two shares."""
    return share_keys_plaintext_separate(decrypt(base64.urlsafe_b64encode(key), ciphertext))


def shares_of(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Shares of a secret, of which any `threshold` give it back and fewer tell nothing."""
    return create_shares(secret, threshold, count)


def secret_of(shares: list[bytes]) -> bytes:
    """The secret that shares are of."""
    return combine_shares(shares)


def keystream(key: bytes, count: int) -> np.ndarray:
    """That many uniform 32-bit words; each key is used for one stream only."""
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * count)), dtype="<u4").astype(np.uint32, copy=False)
