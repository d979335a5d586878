"""Scatter plots of features: what is drawn where, and what is refused."""

import re

import numpy as np
import pytest

from gacd.errors import UserError
from gacd.report.embedding import embedding_scatter

GROUPS = {"bird": 4, "truck": 3, "truck, attacked": 2}


def points(seed: int) -> dict[str, list[list[float]]]:
    generator = np.random.default_rng(seed)
    return {group: generator.normal(size=(n, 2)).tolist() for group, n in GROUPS.items()}


def test_every_point_is_drawn_and_said() -> None:
    figure = embedding_scatter(
        {"teacher": points(0), "gacd": points(1)}, "t-SNE", notes={"gacd": "silhouette 0.50"}
    )
    for image in (figure.image, figure.narrow):
        text = image.decode()
        panels = re.findall(r'<g id="PathCollection_\d+">.*?\n   </g>', text, re.DOTALL)
        # A marker is a <use>, or a path of its own where a group has few points.
        drawn = [max(panel.count("<use "), panel.count("clip-path")) for panel in panels]
        assert drawn[:6] == [4, 3, 2] * 2  # the legend's follow, unclipped
        shapes = [re.search(r' d="(.*?)"', panel, re.DOTALL) for panel in panels[:3]]
        assert len({match[1] for match in shapes if match}) == 3  # readable without colour
    assert "4 bird, 3 truck, 2 truck, attacked" in figure.alt
    assert "gacd: silhouette 0.50" in figure.alt


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ({}, "same groups"),
        ({"a": points(0), "b": {"bird": [[0.0, 0.0]]}}, "same groups"),
        ({"a": {str(i): [[0.0, 0.0]] for i in range(4)}}, "4 groups"),
    ],
)
def test_refusals(models: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        embedding_scatter(models, "t-SNE")
