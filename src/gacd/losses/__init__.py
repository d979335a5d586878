"""Losses: pure functions of tensors, one number per image [B], reduced last by the caller."""
