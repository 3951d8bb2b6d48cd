"""Flower's command line with the operator's certificate: `python -m fedfuse.deploy.as_operator CA PEM KEY …`."""

from __future__ import annotations

import ssl
import sys


def certified(ca: str, pem: str, key: str) -> ssl.SSLContext:
    """A context that trusts the federation's CA alone and shows the operator's certificate."""
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(pem, key)
    return context


if __name__ == "__main__":
    from fedfuse.compat.superlink_doors import run_as

    run_as(certified(*sys.argv[1:4]), sys.argv[4:])
