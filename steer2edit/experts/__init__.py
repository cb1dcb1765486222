"""Mixtures of experts: which experts carry a behaviour, and weights that switch them off."""
