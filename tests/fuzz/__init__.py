"""Fuzzing: every parser of ours on what nobody would write. `make fuzz` searches with atheris, the tests try what was found before."""
