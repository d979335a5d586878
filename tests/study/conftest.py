"""Made-up studies."""

import pytest

from made_up import Maker


@pytest.fixture
def maker(tmp_path):
    return Maker(tmp_path)
