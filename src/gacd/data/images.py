"""Bytes and floats: conversion, resizing, and the check of images that a user hands over."""

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.nn.functional import interpolate

from gacd.errors import UserError
from gacd.shapes import Images

_SLACK = 1e-6  # the project's tolerance on the [0, 1] box
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


def validate_images(x: Tensor) -> Images:
    """The images [B, C, H, W] as they are, if they are floats in [0, 1]; otherwise a UserError.

    Reads the extremes, so it waits for the device: for tensors a user hands over, not for a step.
    """
    if x.ndim != 4:
        raise UserError(f"images must have the shape [B, C, H, W], got {list(x.shape)}")
    if not x.is_floating_point():
        raise UserError(f"images must be float in [0, 1], got {x.dtype}: divide bytes by 255")
    if x.numel() == 0:
        raise UserError(f"images must not be empty, got the shape {list(x.shape)}")
    low, high = (float(value) for value in x.aminmax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # written so that NaN fails too
        raise UserError(
            f"images must be in [0, 1], got values from {low:.4g} to {high:.4g}: "
            "leave normalisation to the model"
        )
    return x
