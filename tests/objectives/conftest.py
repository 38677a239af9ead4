from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where text and token cache of all tiny trainings here lie."""
    return tmp_path_factory.getbasetemp()
