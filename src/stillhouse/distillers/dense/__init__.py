"""Distillation of detectors and segmenters through their feature maps."""
