"""Condensation: a few samples made or chosen in place of many, for networks to be trained on."""
