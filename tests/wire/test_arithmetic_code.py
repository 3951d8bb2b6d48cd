"""The arithmetic coder: exact both ways, and close to the entropy."""

import math
import random

import pytest

from fedfuse.wire.arithmetic_code import Counts, Decoder, Encoder


def code(symbols, size, sizes=None):
    coder, counts = Encoder(), Counts(size)
    for i, symbol in enumerate(symbols):
        coder.encode(symbol, counts, sizes[i] if sizes else None)
    return coder.finish()


@pytest.mark.parametrize("trial", range(60))
def test_round_trip(trial):
    draw = random.Random(trial)
    size, n = draw.choice([1, 2, 3, 10, 256]), draw.choice([0, 1, 2, 5, 50, 400])
    symbols = draw.choices(range(size), [draw.random() ** 6 + 1e-4 for _ in range(size)], k=n)
    sizes = [draw.randint(symbol + 1, size) for symbol in symbols]  # fewer choices, symbol by symbol
    coder, counts = Decoder(code(symbols, size, sizes)), Counts(size)
    assert [coder.decode(counts, choices) for choices in sizes] == symbols


@pytest.mark.parametrize("symbols", [[0] * 5000, [1] * 5000, [0, 1] * 2500, [0] * 4999 + [1], [1] + [0] * 4999])
def test_runs_and_carries(symbols):
    data = code(symbols, 2)
    coder, counts = Decoder(data), Counts(2)
    assert [coder.decode(counts) for _ in symbols] == symbols
    if len(set(symbols)) == 1:
        assert len(data) <= 2  # nothing new, nothing sent


def test_size_is_near_the_entropy():
    draw, weights = random.Random(0), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    symbols = draw.choices(range(10), weights, k=5000)
    entropy = -sum(symbols.count(s) / 5000 * math.log2(symbols.count(s) / 5000) for s in range(10))
    bits = 8 * len(code(symbols, 10))
    assert 5000 * entropy <= bits < 5000 * entropy + 5 * math.log2(5000) + 64  # ½ log₂ n a free frequency


def test_any_bytes_decode_to_possible_symbols():
    draw = random.Random(1)
    for _ in range(50):
        coder, counts = Decoder(draw.randbytes(draw.randint(0, 20))), Counts(7)
        assert all(0 <= coder.decode(counts, choices) < choices for choices in draw.choices(range(1, 8), k=40))


def test_counts_stay_small():
    counts = Counts(3)
    for _ in range(600_000):
        counts.saw(0)
    assert counts.counts[0] < 1 << 20
    assert min(counts.counts) >= 1


def test_impossible_symbols_are_refused():
    with pytest.raises(ValueError, match="not below"):
        Encoder().encode(3, Counts(5), 3)
