"""Fixtures that lie beside the project and are never committed to it (DESIGN.md section 7)."""

from pathlib import Path

import pytest
import torch

from loaders.sequence import open_sequence
from preprocessing.pipeline import Method, build_store
from preprocessing.synthetic import write_scene

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def denormal_numbers():
    """What pick_device sets for the process would otherwise reach into the tests that come after."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def shared():
    """`shared(path)` is the fixture's path; the test skips, saying so, where it is absent."""
    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"fixture ../shared/{name} is not here")
        return path
    return find


@pytest.fixture(scope="session")
def small_sequence(tmp_path_factory):
    """A rendered sequence of 8 frames of 64x64 with its correspondences and annotations."""
    folder = tmp_path_factory.mktemp("small") / "small"
    write_scene(folder, "easy", (64, 64), 8, seed=0, num_points=64)
    build_store(open_sequence(folder), Method())
    return folder
