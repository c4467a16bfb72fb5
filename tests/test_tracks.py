"""Correspondences from tracks: files of any tracker, and CoTracker's predictor.

The checkout in these tests is a stand-in with CoTracker's hub entry and call signature, not CoTracker itself."""

import shutil

import cv2
import numpy as np
import pytest
import torch

from common.errors import UserError
from loaders.correspondences import open_correspondences
from loaders.sequence import open_sequence
from loaders.track_files import PointTracks, save_tracks
from preprocessing.cli import main
from preprocessing.flow import ModelOptions
from preprocessing.options import main_parser
from preprocessing.track_correspondences import TrackerOptions, build_from_cotracker, correspondences, query_grid

STAND_IN = '''
import torch

class Predictor(torch.nn.Module):
    """Every point moves by `velocity` a frame; points that leave the frame are not visible."""
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.register_buffer("velocity", torch.zeros(2))

    def forward(self, video, queries=None, segm_mask=None, grid_size=0, grid_query_frame=0, backward_tracking=False):
        B, T, C, H, W = video.shape
        assert C == 3 and video.max() > 1 and backward_tracking
        t = torch.arange(T)[None, :, None, None]
        tracks = queries[:, None, :, 1:] + (t - queries[:, None, :, :1]) * self.model.velocity  # (B, T, N, 2)
        inside = (tracks >= 0) & (tracks <= torch.tensor([W - 1, H - 1]))
        return tracks, inside.all(-1)

def cotracker3_offline(*, pretrained=True, **kwargs):
    assert not pretrained
    return Predictor()
'''


@pytest.fixture
def sequence(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 40, 3), np.uint8)
    (tmp_path / "seq" / "color").mkdir(parents=True)
    for t, frame in enumerate(frames):
        cv2.imwrite(str(tmp_path / "seq" / "color" / f"{t:05d}.png"), frame)
    return open_sequence(tmp_path / "seq")


def tracks_of(queries, velocity=(3, -1), T=5, size=(32, 40)):
    t = np.arange(T)[None, :, None]
    tracks = (queries[:, None, :0:-1] + (t - queries[:, None, :1]) * np.array(velocity)).astype(np.float32)
    visible = ((tracks >= 0) & (tracks <= np.array(size[::-1]) - 1)).all(-1)
    return PointTracks(tracks, visible, queries.astype(np.float32), size)


def test_a_pixel_takes_the_nearest_track():
    tracks = np.array([[[4.4, 5], [6.4, 5]], [[4.1, 5], [9.1, 6]], [[7, 2], [0, 0]], [[-3, 1], [1, 1]]], np.float32)
    visible = np.array([[1, 1], [1, 1], [1, 0], [1, 1]], bool)
    flow, valid = correspondences(tracks, visible, 0, 1, (8, 10))
    assert np.argwhere(valid).tolist() == [[5, 4]] and np.allclose(flow[5, 4], (5, 1))


def test_files_of_two_query_frames_make_a_store(sequence, tmp_path):
    for t in (0, 4):
        save_tracks(tmp_path / f"{t}.npz", tracks_of(query_grid(t, (32, 40), 4)))
    main(["--data_dir", str(sequence.root), "--tracks", str(tmp_path / "0.npz"), str(tmp_path / "4.npz")])
    store = open_correspondences(sequence)
    assert len(store.pairs) == 16 and store.meta["method"]["flow"] == "tracks"
    for i, j in ((0, 1), (0, 4), (4, 2)):
        pair = store.stored(i, j)
        assert len(pair.pixels) > 20 and pair.cycle.all()  # of adjacent frames too: only what a track says
        assert np.allclose(pair.flow(slice(None)), np.array([3, -1]) * (j - i))


def test_training_takes_a_store_of_tracks(sequence, tmp_path):
    from loaders.pair_sampler import PairSampler

    save_tracks(tmp_path / "t.npz", tracks_of(query_grid(2, (32, 40), 4)))
    main(["--data_dir", str(sequence.root), "--tracks", str(tmp_path / "t.npz")])
    sampler = PairSampler(sequence.frames(), open_correspondences(sequence), 4, 16, torch.Generator().manual_seed(0))
    batch = sampler.batch(4, lambda interval: 1.0)
    moved = (batch.pixels2 - batch.pixels1) / (batch.ids2 - batch.ids1)[:, None, None]
    assert torch.allclose(moved, torch.tensor([3.0, -1.0]).expand_as(moved), atol=1e-4)


def test_files_of_other_trackers_make_the_same_store(sequence, tmp_path):
    made = tracks_of(query_grid(0, (32, 40), 4))
    made.visible[:, 2] = False
    save_tracks(tmp_path / "own.npz", made)
    turned = torch.from_numpy(made.tracks).transpose(0, 1)[None], torch.from_numpy(made.visible.T.copy())[None]
    torch.save(turned, tmp_path / "cotracker.pt")
    tracks = np.where(made.visible[..., None], made.tracks, np.nan)  # nothing is known of hidden points
    np.savez(tmp_path / "tapir.npz", tracks=tracks, occlusion=np.where(made.visible, 0.2, 0.4))
    flows = []
    for name in ("own.npz", "cotracker.pt", "tapir.npz"):
        shutil.rmtree(sequence.root / "correspondences", ignore_errors=True)
        main(["--data_dir", str(sequence.root), "--tracks", str(tmp_path / name), "--visible_th", "0.7"])
        store = open_correspondences(sequence)
        flows.append([(store.stored(0, j).pixels, store.stored(0, j).flow(slice(None))) for j in (1, 2, 4)])
        assert store.meta["method"]["visible_th"] == 0.7
    for other in flows[1:]:
        for (pixels, flow), (same_pixels, same_flow) in zip(flows[0], other, strict=True):
            assert np.array_equal(pixels, same_pixels) and np.array_equal(flow, same_flow)
    assert len(flows[0][0][0]) > 20 and len(flows[0][1][0]) == 0


def test_positions_of_any_layout_make_a_store(sequence, tmp_path):
    made = tracks_of(query_grid(0, (32, 40), 8))
    for tracks in (made.tracks, made.tracks.swapaxes(0, 1), np.rint(made.tracks).astype(np.int16)):
        shutil.rmtree(sequence.root / "correspondences", ignore_errors=True)
        np.save(tmp_path / "t.npy", tracks)
        main(["--data_dir", str(sequence.root), "--tracks", str(tmp_path / "t.npy")])
        pair = open_correspondences(sequence).stored(0, 1)
        assert np.allclose(pair.flow(slice(None)), (3, -1))
    shutil.rmtree(sequence.root / "correspondences")
    np.save(tmp_path / "t.npy", made.tracks[:5])  # five tracks of five frames
    with pytest.raises(UserError, match=r"may be \(tracks, frames\) or \(frames, tracks\)"):
        main(["--data_dir", str(sequence.root), "--tracks", str(tmp_path / "t.npy")])
    assert main_parser().parse_args(["--data_dir", "x"]).visible_th == 0.5
    with pytest.raises(SystemExit):
        main(["--data_dir", "x", "--visible_th", "1.5"])


@pytest.mark.parametrize("T,size,words", [(5, (40, 32), "resize the frames or the tracks"), (4, (32, 40), "4 frames")])
def test_tracks_that_do_not_fit_are_refused(T, size, words, sequence, tmp_path):
    save_tracks(tmp_path / "t.npz", tracks_of(query_grid(0, (16, 16), 4), T=T, size=size))
    with pytest.raises(UserError, match=words):
        main(["--data_dir", str(sequence.root), "--tracks", str(tmp_path / "t.npz")])


def test_tracks_without_a_correspondence_are_refused(sequence, tmp_path):
    tracks = tracks_of(query_grid(0, (32, 40), 4))
    tracks.visible[:, 1:] = False
    save_tracks(tmp_path / "t.npz", tracks)
    with pytest.raises(UserError, match="no track is visible in two frames"):
        main(["--data_dir", str(sequence.root), "--tracks", str(tmp_path / "t.npz")])


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "hubconf.py").write_text(STAND_IN)
    torch.save({"velocity": torch.tensor([2.0, 1.0])}, tmp_path / "scaled_offline.pth")
    return tmp_path / "checkout"


def test_cotracker_tracks_grids_of_several_frames(sequence, checkout):
    models = ModelOptions(weights_dir=checkout.parent, offline=True)
    store = build_from_cotracker(sequence, TrackerOptions(checkout, grid=2, every=3), models)
    assert store.meta["method"]["query_frames"] == [0, 3, 4] and len(store.pairs) == 20
    for i, j in ((0, 4), (2, 1), (4, 0)):
        pair = store.stored(i, j)
        assert len(pair.pixels) > 150 and np.allclose(pair.flow(slice(None)), np.array([2, 1]) * (j - i))


def test_cotracker_that_cannot_be_loaded_is_one_line(sequence, checkout):
    with pytest.raises(UserError, match=r"no hubconf\.py"):
        build_from_cotracker(sequence, TrackerOptions(sequence.root), ModelOptions(weights_dir=checkout.parent))
    torch.save({"other": torch.zeros(1)}, checkout.parent / "scaled_offline.pth")
    with pytest.raises(UserError, match=r"cannot be loaded from .*checkout"):
        build_from_cotracker(sequence, TrackerOptions(checkout), ModelOptions(weights_dir=checkout.parent), resume=True)
