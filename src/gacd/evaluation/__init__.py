"""Attacks on finished models, what they found, and how sure it is."""
