"""A small world for every test of a method."""

import pytest
import torch

from methods.world import World, make_world


@pytest.fixture
def world(generator: torch.Generator) -> World:
    return make_world(generator)
