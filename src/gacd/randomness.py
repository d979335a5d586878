"""Generators that are passed in, and the global ones left as they were."""

import hashlib
from contextlib import AbstractContextManager

import torch


def keyed_generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator on `device` seeded by a hash of `key`: neighbouring keys, unrelated streams."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def global_randomness_kept(device: torch.device) -> AbstractContextManager[None]:
    """The global generators, the CPU's and that of `device`, as they were, afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
