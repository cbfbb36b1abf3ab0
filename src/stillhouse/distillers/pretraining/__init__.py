"""Distillation before there are labels."""
