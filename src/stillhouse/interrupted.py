"""The exception of a run that was asked to stop, apart from what raises it so that the command line need not load the loop."""

from __future__ import annotations


class Interrupted(Exception):
    """The run was asked to stop and has written a checkpoint. Its message says how to go on."""
