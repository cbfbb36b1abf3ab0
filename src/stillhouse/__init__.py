"""Stillhouse distils: a small model out of a large one, by the published ways, under one interface."""

__version__ = "0.1.0"
