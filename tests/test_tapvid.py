"""TAP-Vid files: every official layout, the coordinates, and one clear line for every bad or hostile file."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from loaders.tapvid import TapVideo, open_benchmark, read_pickle, resize_frames, save_tapvid
from loaders.track_files import Annotations, sample_queries, save_annotations
from loaders.video import write_video

T, N, H, W = 6, 3, 24, 40


def example(**changes):
    """A good video of a TAP-Vid file with some entries changed, or left out where None."""
    rng = np.random.default_rng(0)
    entries = {"video": rng.integers(0, 255, (T, H, W, 3), np.uint8), "points": np.full((N, T, 2), 0.5, np.float32),
               "occluded": np.zeros((N, T), bool), **changes}
    return {key: value for key, value in entries.items() if value is not None}


class Command:
    """Unpickled by pickle itself, this would write a file."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


def write(path, data, protocol=None):
    path.write_bytes(pickle.dumps(data, protocol))
    return path


def read_all(path):
    """Videos by name, or what is wrong with them."""
    out = {}
    for name, read in open_benchmark(path):
        try:
            out[name] = read()
        except UserError as error:
            out[name] = str(error)
    return out


def test_raster_points_become_pixels(tmp_path):
    """In raster coordinates the frame's edges are 0 and 1; its outer pixels' centers are half a pixel inside."""
    points = np.zeros((N, T, 2), np.float32)
    points[0], points[1], points[2] = (0, 0), (1, 1), (0.5 / W, 2.5 / H)
    video = read_all(write(tmp_path / "a.pkl", {"bear": example(points=points)}))["bear"]
    assert np.allclose(video.annotations.points[:, 0], [(-0.5, -0.5), (W - 0.5, H - 0.5), (0, 2)], atol=1e-5)
    assert np.allclose(video.annotations.resized((256, 256)).points[:, 0],
                       [(-0.5, -0.5), (255.5, 255.5), (128 / W - 0.5, 640 / H - 0.5)], atol=1e-4)


@pytest.mark.parametrize("layout,names", [("dict", ["a", "b"]), ("list", ["0000", "0001"]), ("jpeg", ["0000", "0001"])])
def test_layouts_round_trip(layout, names, tmp_path):
    rng = np.random.default_rng(1)
    flat = np.repeat(rng.integers(0, 255, (T, 1, 1, 3), np.uint8), H, axis=1).repeat(W, axis=2)
    truth = Annotations(rng.uniform(0, 20, (N, T, 2)).astype(np.float32), rng.random((N, T)) < 0.3, (H, W))
    save_tapvid(tmp_path / "x.pkl", {"a": TapVideo(flat, truth), "b": TapVideo(flat, truth)}, layout)
    videos = read_all(tmp_path / "x.pkl")
    assert list(videos) == names
    for video in videos.values():
        assert abs(video.frames.astype(int) - flat).max() <= (3 if layout == "jpeg" else 0)
        assert np.allclose(video.annotations.points, truth.points, atol=1e-4)
        assert np.array_equal(video.annotations.occluded, truth.occluded)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(protocol, tmp_path):
    images = np.array([b"\xff\xd8one", b"two"], object)
    data = read_pickle(write(tmp_path / "a.pkl", [{**example(), "images": images, "rate": np.float64(25)}], protocol))
    assert np.array_equal(data[0]["video"], example()["video"]) and list(data[0]["images"]) == list(images)


def test_a_folder_of_shards_is_one_benchmark(tmp_path):
    for i in range(2):
        write(tmp_path / f"000{i}_of_0002.pkl", [example(), example()])
    assert list(read_all(tmp_path)) == [f"000{i}_of_0002_000{k}" for i in range(2) for k in range(2)]


def test_a_bad_shard_is_one_line_and_the_others_are_read(tmp_path):
    for i in range(4):
        write(tmp_path / f"000{i}_of_0004.pkl", [example()])
    write(tmp_path / "0001_of_0004.pkl", [Command()])
    (tmp_path / "0002_of_0004.pkl").write_bytes((tmp_path / "0003_of_0004.pkl").read_bytes()[:9000])
    videos = read_all(tmp_path)
    assert list(videos) == ["0000_of_0004_0000", "0001_of_0004", "0002_of_0004", "0003_of_0004_0000"]
    assert "refused" in videos["0001_of_0004"] and "cannot be read" in videos["0002_of_0004"]
    assert isinstance(videos["0003_of_0004_0000"], TapVideo)


def test_names_cannot_leave_the_folder(tmp_path):
    data = {"../../evil": example(), "a b": example(), "a/b": example(), ".hidden": example(), 7: example()}
    assert list(read_all(write(tmp_path / "a.pkl", data))) == ["_.._evil", "a_b", "a_b_2", "hidden", "7"]


def test_folders_of_frames_and_of_a_video_file(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (T, H, W, 3), np.uint8)
    truth = Annotations(np.full((N, T, 2), 100, np.float32), np.zeros((N, T), bool), (240, 400))
    for name in ("images", "clip"):
        save_annotations(tmp_path / name / "annotations.npz", truth)
    (tmp_path / "images" / "color").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "images" / "color" / f"{t:05d}.png")
    write_video(tmp_path / "clip" / "clip.mp4", frames)
    videos = read_all(tmp_path)
    assert list(videos) == ["clip", "images"]
    assert np.array_equal(videos["images"].frames, frames) and len(videos["images"].files) == T
    for video in videos.values():  # annotated at ten times the frames' size
        assert video.frames.shape == frames.shape and np.allclose(video.annotations.points, 100.5 / 10 - 0.5)


def test_frames_are_resized_with_lanczos():
    frames = np.random.default_rng(0).integers(0, 255, (2, H, W, 3), np.uint8)
    small = resize_frames(frames, (16, 16))
    assert small.shape == (2, 16, 16, 3)
    assert np.array_equal(small[1], Image.fromarray(frames[1]).resize((16, 16), Image.Resampling.LANCZOS))
    assert resize_frames(frames, (H, W)) is frames


@pytest.mark.parametrize("changes,words", [
    ({"points": None}, "has no `points`: it has video, occluded"), ({"occluded": None}, "has no `occluded`"),
    ({"video": None}, "has no `video`"),
    ({"points": np.full((N, T, 2), 1.5)}, "point 0 in frame 0 is (1.5, 1.5)"),
    ({"points": np.full((N, T, 2), -0.2)}, "in [0, 1]"), ({"points": np.full((N, T, 2), 120.0)}, "in [0, 1]"),
    ({"points": np.full((N, T, 2), np.nan)}, "is (nan, nan) though it is visible"),
    ({"points": np.zeros((N, T + 1, 2))}, "(points, 6, 2)"), ({"points": np.zeros((N, T, 2), "S1")}, "must be numbers"),
    ({"occluded": np.zeros((N + 1, T), bool)}, "`occluded` is bool (4, 6)"),
    ({"occluded": np.full((N, T), 2)}, "true or false"), ({"video": np.zeros((T, H, W, 3))}, "must be uint8"),
    ({"video": np.zeros((T, H, W), np.uint8)}, "must be uint8"), ({"video": [b"not a picture"] * T}, "frame 0"),
    ({"video": np.zeros((1, H, W, 3), np.uint8)}, "at least two frames"), ({"video": 3}, "at least two frames")])
def test_a_bad_video_is_one_line_and_the_others_are_read(changes, words, tmp_path):
    videos = read_all(write(tmp_path / "a.pkl", {"good": example(), "bad": example(**changes), "last": example()}))
    assert isinstance(videos["good"], TapVideo) and isinstance(videos["last"], TapVideo)
    assert words in videos["bad"] and "video bad" in videos["bad"] and "\n" not in videos["bad"]


def test_occluded_points_may_be_anywhere(tmp_path):
    points, occluded = np.full((N, T, 2), 0.5), np.zeros((N, T), bool)
    points[0, 2], occluded[0, 2] = (np.nan, 40), True
    points[1, 1] = 1.01  # visible, just over the edge: TAP-Vid's own code takes it
    video = read_all(write(tmp_path / "a.pkl", {"v": example(points=points, occluded=occluded)}))["v"]
    assert np.isfinite(video.annotations.points).all() and len(sample_queries(video.annotations, "first")[0]) == N


@pytest.mark.parametrize("data,words", [
    (pickle.dumps({"bear": Command()}), "refused"), (pickle.dumps({"bear": example(points=Command())}), "refused"),
    (pickle.dumps([np.array([Command()], object)]), "posix.system" if os.name == "posix" else "system"),
    (b"cbuiltins\neval\n(V1\ntR.", "builtins.eval"), (b"c_codecs\nencode\n(Vx\nVzip\ntR.", "codec zip"),
    (pickle.dumps({"bear": example()})[:5000], "cannot be read"), (b"", "damaged or cut short"),
    (b"PK\x03\x04 a zip", "cannot be read"), (pickle.dumps(3), "holds a int"), (pickle.dumps({}), "has no videos")])
def test_hostile_and_damaged_files_are_one_line(data, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_all(tmp_path / "a.pkl")
    assert words in str(caught.value) and "a.pkl" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


def test_missing_files(tmp_path):
    for path, words in ((tmp_path / "no.pkl", "no file"), (tmp_path, "has no videos")):
        with pytest.raises(UserError, match=words):
            read_all(path)
