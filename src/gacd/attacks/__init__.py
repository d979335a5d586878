"""Attacks in the training loop: pure functions of an objective, images and a threat model."""
