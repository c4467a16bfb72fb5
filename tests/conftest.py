"""Fixtures that lie beside the project and are never committed to it (DESIGN.md section 7)."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
torch.set_num_threads(2)


@pytest.fixture
def shared():
    """`shared(path)` is the fixture's path; the test skips, saying so, where it is absent."""
    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"fixture ../shared/{name} is not here")
        return path
    return find
