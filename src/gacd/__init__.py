"""Guided Adversarial Contrastive Distillation: small robust students from robust teachers."""

__version__ = "0.1.0"
