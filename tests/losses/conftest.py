"""The anchors in one piece, and in pieces."""

import pytest

from gacd.losses import fused


@pytest.fixture(params=["one chunk", "chunks kept", "chunks formed again"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the anchors in one piece and in pieces of 4."""
    if request.param != "one chunk":
        monkeypatch.setattr(fused, "CPU_BYTES", 160)
    if request.param == "chunks formed again":
        monkeypatch.setattr(fused, "KEPT_BYTES", 400)
