"""Supervised distillation of classifiers."""
