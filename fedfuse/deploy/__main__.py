"""`python -m fedfuse.deploy …`, for processes that start each other."""

from __future__ import annotations

import sys

from fedfuse.deploy.commands import main
from fedfuse.errors import UserError, WorldError

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (UserError, WorldError) as error:
        print(f"fedfuse: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
