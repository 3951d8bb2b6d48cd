"""Guards: Flower's SecAgg+ is where `compat/flower_secagg.py` takes it from, and does what we take it to do."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedfuse.compat import flower_secagg
from fedfuse.errors import Refused


def test_two_parties_agree_and_a_third_does_not() -> None:
    (a, a_public), (b, b_public), (c, _) = (flower_secagg.key_pair() for _ in range(3))
    assert flower_secagg.agreed(a, b_public) == flower_secagg.agreed(b, a_public)
    assert len(flower_secagg.agreed(a, b_public)) == 32
    assert flower_secagg.agreed(a, b_public) != flower_secagg.agreed(c, b_public)


def test_a_sealed_pair_is_opened_by_its_key_alone() -> None:
    text = flower_secagg.sealed(bytes(32), 3, 7, b"seed", b"key")
    assert flower_secagg.opened(bytes(32), text) == (3, 7, b"seed", b"key")
    with pytest.raises(Exception):  # noqa: B017 - whatever the library says
        flower_secagg.opened(b"x" + bytes(31), text)  # the half that signs, or a garbled pair may pass by chance


def test_any_shares_at_the_threshold_give_a_secret_back_and_fewer_do_not() -> None:
    secret = bytes(range(32))
    shares = flower_secagg.shares_of(secret, 3, 5)
    for some in itertools.combinations(shares, 3):
        assert flower_secagg.secret_of(list(some)) == secret
    for some in itertools.combinations(shares, 2):
        try:
            assert flower_secagg.secret_of(list(some)) != secret
        except ValueError:
            pass


def test_the_keystream_is_chacha20_and_uses_the_whole_key() -> None:
    zero = flower_secagg.keystream(bytes(32), 4).astype("<u4").tobytes().hex()
    assert zero == "76b8e0ada0f13d90405d6ae55386bd28"  # RFC 8439, A.1, test vector 1
    last = flower_secagg.keystream(bytes(31) + b"\x01", 2**14)
    assert (last != flower_secagg.keystream(bytes(32), 2**14)).mean() > 0.99
    # Flower's own generator folds a key to the xor of its words: these two give one stream there
    swapped = flower_secagg.keystream(bytes(4) + b"\x01" + bytes(27), 2**14)
    assert (last != swapped).mean() > 0.99
    assert abs(np.unpackbits(last.view(np.uint8)).mean() - 0.5) < 0.01


def test_without_flowers_names_secure_sums_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_secagg, "asymmetric", None)
    with pytest.raises(Refused, match=r"flwr 1\.41"):
        flower_secagg.key_pair()
