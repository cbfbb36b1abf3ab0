"""The loop, optimisers, checkpoints, resume: the only place that knows Accelerate."""
