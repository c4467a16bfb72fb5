"""Tracks in the formats of other programs, read back as those programs would."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch

from common.errors import UserError
from loaders.predicted_tracks import load_tracks
from loaders.sequence import open_sequence
from loaders.track_export import check_format, export_tracks
from loaders.track_files import PointTracks

N, T, SIZE = 3, 8, (64, 64)


@pytest.fixture
def tracks():
    rng = np.random.default_rng(0)
    queries = np.array([[0, 5, 7], [3, 10, 20], [7, 40, 50]], np.float32)
    return PointTracks(rng.uniform(0, 63, (N, T, 2)).astype(np.float32), rng.random((N, T)) > 0.3, queries, SIZE,
                       rng.random((N, T)).astype(np.float32), rng.random((N, T)).astype(np.float32))


def test_csv_has_a_line_a_track_and_frame(tracks, tmp_path):
    export_tracks(tmp_path / "t.csv", tracks)
    rows = list(csv.DictReader(open(tmp_path / "t.csv")))
    assert len(rows) == N * T
    row = rows[2 * T + 5]
    assert (row["track"], row["frame"], row["visible"]) == ("2", "5", str(int(tracks.visible[2, 5])))
    values = [float(row[key]) for key in ("x", "y", "occlusion_score", "depth")]
    assert values == pytest.approx([*tracks.tracks[2, 5], tracks.occlusion_score[2, 5], tracks.depth[2, 5]], abs=1e-4)


def test_cells_of_what_a_tracker_does_not_have_are_empty(tracks, tmp_path):
    export_tracks(tmp_path / "t.csv", PointTracks(tracks.tracks, tracks.visible, tracks.query_points, SIZE))
    assert (tmp_path / "t.csv").read_text().splitlines()[1].endswith(",,")


def test_cotrackers_shapes(tracks, tmp_path):
    export_tracks(tmp_path / "t.pt", tracks)
    positions, visibility = torch.load(tmp_path / "t.pt", weights_only=True)
    assert positions.shape == (1, T, N, 2) and visibility.shape == (1, T, N) and visibility.dtype == torch.bool
    assert np.array_equal(positions[0].numpy().transpose(1, 0, 2), tracks.tracks)
    assert np.array_equal(visibility[0].numpy().T, tracks.visible)


def test_nukes_origin_is_the_lower_left_corner(tracks, tmp_path):
    """Read as Nuke's Time+value import documents: lines of three numbers, comments begin with #."""
    for _ in range(2):  # again over its own files
        export_tracks(tmp_path / "t.nuke", tracks)
    files = sorted((tmp_path / "t.nuke").iterdir())
    assert [file.name for file in files] == [f"track_{n:05d}.txt" for n in range(N)]
    for n, file in enumerate(files):
        values = np.loadtxt(file, comments="#")
        assert np.array_equal(values[:, 0], np.arange(T))
        assert np.allclose(values[:, 1], tracks.tracks[n, :, 0] + 0.5, atol=1e-4)
        assert np.allclose(values[:, 2], SIZE[0] - (tracks.tracks[n, :, 1] + 0.5), atol=1e-4)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_a_folder_of_something_else_is_not_replaced(tracks, tmp_path):
    (tmp_path / "t.nuke").mkdir()
    (tmp_path / "t.nuke" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a folder of exported tracks"):
        export_tracks(tmp_path / "t.nuke", tracks)
    assert (tmp_path / "t.nuke" / "notes.txt").read_text() == "mine"


def test_npz_is_the_same_again(tracks, tmp_path):
    export_tracks(tmp_path / "t.npz", tracks)
    assert np.array_equal(load_tracks(tmp_path / "t.npz").tracks, tracks.tracks)


def test_an_unknown_ending_is_found_before_anything_is_computed(tmp_path):
    with pytest.raises(UserError, match=r"\.csv"):
        check_format(tmp_path / "tracks.docx")


def test_rerun_reads_its_recording(tracks, small_sequence, tmp_path):
    pytest.importorskip("rerun", reason="rerun-sdk is not installed")
    export_tracks(tmp_path / "t.rrd", tracks, open_sequence(small_sequence))
    result = subprocess.run([sys.executable, "-m", "rerun", "rrd", "stats", str(tmp_path / "t.rrd")],
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    # frames, tracks and space points of every frame; the axes and the recording's properties, once
    assert f"num_rows = {3 * T + 2}\n" in result.stdout and "num_entity_paths = 5\n" in result.stdout
