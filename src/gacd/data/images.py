"""Bytes and floats: conversion and resizing."""

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.functional import interpolate

from gacd.shapes import Images

_CHUNK = 4096  # images resized at once: floats take four times the room of bytes


def to_float(pixels: Shaped[Tensor, "B C H W"]) -> Images:
    """Bytes [B, C, H, W] as floats: x / 255, channels-last in memory, on the same device."""
    return pixels.to(torch.float32, memory_format=torch.channels_last).div(255)


def resize(pixels: Shaped[Tensor, "N C H W"], size: int) -> Shaped[Tensor, "N C S S"]:
    """Bytes [N, C, H, W] at `size` x `size` pixels: bilinear and antialiased, rounded to bytes."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    parts = [
        interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        for part in torch.split(pixels, _CHUNK)
    ]
    return torch.cat([part.round().clamp(0, 255).to(torch.uint8) for part in parts])


def in_colour(pixels: Shaped[Tensor, "N C H W"], channels: int) -> Shaped[Tensor, "N K H W"]:
    """Images [N, C, H, W] of so many channels: grey ones (C = 1) are the same in each."""
    return pixels.expand(-1, channels, -1, -1).contiguous()
