"""The baselines everybody compares with."""
