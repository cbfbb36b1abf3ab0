"""`python -m stillhouse`, for torchrun and wherever the command is not on the path."""

from __future__ import annotations

import sys

from stillhouse.cli import main

if __name__ == "__main__":
    sys.argv[0] = "stillhouse"  # as a run's record and report call it
    sys.exit(main())
