"""The exception of a run that was asked to stop, apart from what raises it so that the command line need not load the loop."""

from __future__ import annotations

import signal


class Interrupted(Exception):
    """The run was asked to stop and has written a checkpoint. Its message says how to go on.

    Args:
        message: what the user is told.
        signal: what asked for it: SIGINT (2) or SIGTERM (15). The command ends with 128 + this, as shells say it.
    """

    def __init__(self, message: str, signal: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = int(signal)
