"""`python -m fedfuse` is the command `fedfuse`."""

from __future__ import annotations

import sys

from fedfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
