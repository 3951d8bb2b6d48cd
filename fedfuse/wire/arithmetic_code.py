"""Lossless coding of small integers: an adaptive arithmetic coder in exact integer arithmetic.

Witten, Neal and Cleary, "Arithmetic Coding for Data Compression", CACM 1987, with counts that adapt as symbols pass
(Krichevsky and Trofimov's half a count to begin with). Everything is integers, so that both ends agree bit by bit on
any machine. It is written for a few thousand symbols a message; the cost is about a microsecond a bit.
"""

from __future__ import annotations

from itertools import chain

_TOP = (1 << 32) - 1
_HALF, _QUARTER = 1 << 31, 1 << 30


class Counts:
    """Adaptive frequencies of the symbols 0 … size − 1; coder and decoder keep equal ones."""

    def __init__(self, size: int) -> None:
        self.counts = [1] * size  # in halves: a symbol seen n times weighs 2n + 1

    def interval(self, symbol: int, size: int) -> tuple[int, int, int]:
        """Cumulative bounds of a symbol, and the total, where only the symbols below `size` are possible."""
        low = sum(self.counts[:symbol])
        return low, low + self.counts[symbol], sum(self.counts[:size])

    def find(self, value: int, size: int) -> int:
        """The symbol below `size` whose interval holds `value`."""
        for symbol in range(size - 1):
            value -= self.counts[symbol]
            if value < 0:
                return symbol
        return size - 1

    def saw(self, symbol: int) -> None:
        """Adapt."""
        self.counts[symbol] += 2
        if self.counts[symbol] >= 1 << 20:  # totals must stay far below the coder's 2³⁰ steps
            self.counts = [(count + 1) // 2 for count in self.counts]


class Encoder:
    """Turns symbols into bytes: `encode` each, then `finish`."""

    def __init__(self) -> None:
        self._low, self._high, self._pending = 0, _TOP, 0
        self._bits: list[int] = []

    def encode(self, symbol: int, counts: Counts, size: int | None = None) -> None:
        """Write a symbol, of which only those below `size` were possible (default: all); one choice costs nothing."""
        size = len(counts.counts) if size is None else size
        if not 0 <= symbol < size:
            raise ValueError(f"symbol {symbol} is not below {size}")
        if size == 1:
            return
        low, high, total = counts.interval(symbol, size)
        span = self._high - self._low + 1
        self._high = self._low + span * high // total - 1
        self._low += span * low // total
        counts.saw(symbol)
        while True:
            if self._high < _HALF:
                self._write(0)
            elif self._low >= _HALF:
                self._write(1)
                self._low, self._high = self._low - _HALF, self._high - _HALF
            elif self._low >= _QUARTER and self._high < _HALF + _QUARTER:
                self._pending += 1
                self._low, self._high = self._low - _QUARTER, self._high - _QUARTER
            else:
                return
            self._low, self._high = 2 * self._low, 2 * self._high + 1

    def _write(self, bit: int) -> None:
        self._bits.append(bit)
        self._bits += [1 - bit] * self._pending
        self._pending = 0

    def finish(self) -> bytes:
        """Return what was written; zeros at the end are left away, since the decoder reads zeros past the end."""
        if self._low > 0 or self._pending:  # else zeros alone name a number in the interval
            self._pending += 1
            self._write(0 if self._low < _QUARTER else 1)
        bits = self._bits + [0] * (-len(self._bits) % 8)
        text = "".join(map(str, bits))
        return int(text or "0", 2).to_bytes(len(bits) // 8, "big").rstrip(b"\0")


class Decoder:
    """Reads symbols back. Any bytes decode to something: compare with a new encoding to tell noise from a message."""

    def __init__(self, data: bytes) -> None:
        self._bits = chain.from_iterable(((byte >> shift) & 1 for shift in range(7, -1, -1)) for byte in data)
        self._low, self._high, self._value = 0, _TOP, 0
        for _ in range(32):
            self._value = 2 * self._value + next(self._bits, 0)

    def decode(self, counts: Counts, size: int | None = None) -> int:
        """Read the next symbol, of which only those below `size` are possible."""
        size = len(counts.counts) if size is None else size
        if size == 1:
            return 0
        total = sum(counts.counts[:size])
        span = self._high - self._low + 1
        symbol = counts.find(((self._value - self._low + 1) * total - 1) // span, size)
        low, high, _ = counts.interval(symbol, size)
        self._high = self._low + span * high // total - 1
        self._low += span * low // total
        counts.saw(symbol)
        while True:
            if self._high < _HALF:
                shift = 0
            elif self._low >= _HALF:
                shift = _HALF
            elif self._low >= _QUARTER and self._high < _HALF + _QUARTER:
                shift = _QUARTER
            else:
                return symbol
            self._low, self._high = 2 * (self._low - shift), 2 * (self._high - shift) + 1
            self._value = 2 * (self._value - shift) + next(self._bits, 0)
