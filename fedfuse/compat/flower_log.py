"""Flower's log, in which nobody else's words begin a line or steer a terminal.

A SuperLink logs what nodes ask for as they wrote it (the hash of a bundle, the path of a request that failed), a
SuperNode what the server wrote (the type of a message). Flower logs by the logger `flwr`, whose name it documents in
`flwr.common.logger`. Guard: `tests/compat/test_flower.py`.
"""

from __future__ import annotations

import logging

from fedfuse.errors import one_line

NAME = "flwr"
LONGEST = 2000  # characters of a line


class OneLine(logging.Filter):
    """Makes one printable line of what is logged."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record, as one line."""
        record.msg, record.args = one_line(record.getMessage(), LONGEST), ()
        return True


def in_one_line() -> None:
    """From now on, and in this process, each of Flower's log entries is one printable line."""
    logger = logging.getLogger(NAME)
    if not any(isinstance(known, OneLine) for known in logger.filters):
        logger.addFilter(OneLine())
