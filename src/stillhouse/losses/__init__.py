"""Pure functions of tensors, each with its equation, shapes, reduction and source."""
