"""flow_frames/: flow is computed at the resolution of the clip, and stored at that of the frames."""

import cv2
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from evaluation.scoring import baseline_tracks
from evaluation.video_job import write_sequence
from loaders.correspondences import read_meta
from loaders.images import image_files, read_image, write_png
from loaders.sequence import open_sequence
from loaders.tapvid import TapVideo
from loaders.track_files import Annotations
from preprocessing.extract_frames import extract_frames
from preprocessing.flow import FLOW_MODELS, ModelOptions, flow_between, resize_flow
from tests.launch import launch
from third_party.dis import DisFlow

SIZE = (96, 160)   # of the clip
SMALL = (48, 40)   # of the frames: another aspect ratio, as TAP-Vid's 256x256


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder of three images of a picture that moves by (4, 2) pixels a frame."""
    folder = tmp_path_factory.mktemp("clip")
    noise = np.random.default_rng(0).uniform(0, 255, (140, 200, 3)).astype(np.float32)
    picture = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    for t in range(3):
        y, x = 20 - 2 * t, 20 - 4 * t
        write_png(folder / f"{t:05d}.png", np.ascontiguousarray(picture[y: y + SIZE[0], x: x + SIZE[1]]))
    return folder


def test_they_are_written_where_frames_are_smaller_than_the_clip(clip, tmp_path):
    small = extract_frames(str(clip), tmp_path / "small", resize=SMALL)
    assert small.size == SMALL and small.flow_size == SIZE and len(small.flow_frames) == 3
    own = read_image(image_files(clip)[1]).astype(float)
    assert np.abs((small.flow_frame(1) - own).mean(axis=-1)).mean() < 2  # gray levels; a JPEG file
    for name, arguments in (("whole", {}), ("large", {"resize": (120, 200)}),
                            ("off", {"resize": SMALL, "flow_frames": False})):
        sequence = extract_frames(str(clip), tmp_path / name, **arguments)
        assert sequence.flow_frames == [] and sequence.flow_size == sequence.size
        assert np.array_equal(sequence.flow_frame(1), sequence.frame(1))


def test_their_shorter_side_is_limited(tmp_path):
    for t in range(2):
        write_png(tmp_path / "clip" / f"{t}.png", np.full((600, 640, 3), 10 * t, np.uint8))
    sequence = extract_frames(str(tmp_path / "clip"), tmp_path / "seq", short_side=64)
    assert sequence.flow_size == (512, 546)


def test_a_benchmark_writes_them_too(clip, tmp_path):
    frames = np.stack([read_image(path) for path in image_files(clip)])
    points = np.full((1, 3, 2), 20, np.float32)
    truth = Annotations(points, np.zeros((1, 3), bool), SIZE)
    write_sequence(tmp_path / "on", TapVideo(frames, truth), 64)
    write_sequence(tmp_path / "off", TapVideo(frames, truth), 64, flow_frames=False)
    assert open_sequence(tmp_path / "on").flow_size == SIZE
    assert open_sequence(tmp_path / "off").flow_size == (64, 64)


@pytest.mark.parametrize("adjacent", [True, False])
def test_flow_is_in_pixels_of_the_frames(clip, adjacent):
    a, b = (read_image(path) for path in image_files(clip)[:2])
    model = FLOW_MODELS["dis"](ModelOptions(), SIZE, 1 << 30)
    there, back = flow_between(model, a, b, adjacent, SMALL)
    assert there.shape == (*SMALL, 2) and there.dtype == np.float32
    assert np.abs(np.median(there[8:-8, 8:-8], axis=(0, 1)) - (4 * 40 / 160, 2 * 48 / 96)).max() < 0.1
    assert np.abs(there + back)[8:-8, 8:-8].mean() < 0.1


def test_resizing_flow_scales_it():
    flow = np.broadcast_to(np.array([6, 4], np.float32), (20, 30, 2)).copy()
    assert resize_flow(flow, (20, 30)) is flow
    assert np.allclose(resize_flow(flow, (10, 60)), (12, 2))


def test_the_store_is_made_from_them_and_names_them(clip, tmp_path):
    for name, options in (("high", []), ("low", ["--no-flow_frames"])):
        assert launch("preprocessing", "--video", clip, "--data_dir", tmp_path / name, "--resize", *SMALL,
                      *options).returncode == 0
    assert "flow_frames" not in read_meta(tmp_path / "low/correspondences/meta.json")["method"]
    high = open_sequence(tmp_path / "high")
    assert read_meta(tmp_path / "high/correspondences/meta.json")["method"]["flow_frames"] == high.flow_frames_hash
    again = launch("preprocessing", "--data_dir", tmp_path / "high")
    assert again.returncode == 0 and "finished already" in again.stderr
    other = launch("preprocessing", "--data_dir", tmp_path / "high", "--no-flow_frames")
    assert other.returncode == 2 and "meta.json was made from other images (flow_frames/" in other.stderr
    high.flow_frames[1].unlink()
    damaged = launch("preprocessing", "--data_dir", tmp_path / "high")
    assert damaged.returncode == 2 and "no image of frame 00001.png" in damaged.stderr
    assert launch("preprocessing", "--data_dir", tmp_path / "low", "--no-flow_frames").returncode == 0


@pytest.mark.parametrize("old", ["killed", "complete"])
def test_those_of_an_older_run_are_replaced(clip, tmp_path, old):
    """flow_frames/ is renamed before color/: a run that is killed in between leaves flow_frames/ only."""
    folder = tmp_path / "flow_frames"
    for t in range(5):
        write_png(folder / f"{t:05d}.jpg", np.zeros((*SIZE, 3), np.uint8))
    if old == "complete":  # its color/ was removed, as the error message for another video says
        write_png(tmp_path / "flow_frames.partial/00007.jpg", np.zeros((*SIZE, 3), np.uint8))
        write_png(tmp_path / "color.partial/00007.png", np.zeros((*SMALL, 3), np.uint8))
    sequence = extract_frames(str(clip), tmp_path, stop=3, stride=2, resize=SMALL)
    assert [path.name for path in image_files(folder)] == ["00000.jpg", "00001.jpg"]
    own = read_image(image_files(clip)[2]).astype(float)
    assert np.abs((sequence.flow_frame(1) - own).mean(axis=-1)).mean() < 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["color", "flow_frames", "video.json"]


def test_those_of_other_frames_are_refused(clip, tmp_path):
    extract_frames(str(clip), tmp_path, resize=SMALL)
    color = tmp_path / "color"
    (color / "00000.png").rename(tmp_path / "first.png")
    rest = open_sequence(tmp_path)  # the others keep their own
    assert [path.stem for path in rest.flow_frames] == ["00001", "00002"]
    write_png(color / "00000.png", np.zeros((*SMALL, 3), np.uint8))
    with pytest.raises(UserError, match=r"00000\.jpg does not show the same as frame 00000\.png"):
        _ = open_sequence(tmp_path).flow_frames
    (tmp_path / "first.png").replace(color / "00000.png")
    write_png(tmp_path / "flow_frames/00001.jpg", np.zeros((50, 50, 3), np.uint8))
    with pytest.raises(UserError, match=r"00001\.jpg is 50x50, the first image there is 160x96"):
        open_sequence(tmp_path).flow_frame(1)


def test_a_folder_that_was_made_without_them_stays_without_and_says_so(clip, tmp_path, caplog):
    caplog.set_level("INFO")
    extract_frames(str(clip), tmp_path, resize=SMALL, flow_frames=False)
    assert "without flow_frames" not in caplog.text
    assert extract_frames(str(clip), tmp_path, resize=SMALL).flow_frames == []
    assert "was made without flow_frames" in caplog.text


def test_they_have_8_bits_and_are_upright_as_the_frames(tmp_path):
    """Of a 16-bit clip, and of images that a camera turned."""
    y, x = np.mgrid[:SIZE[0], :SIZE[1]]
    for t in range(2):
        (tmp_path / "deep").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / f"deep/{t}.png"), (20_000 + 10 * x + 20 * y + t).astype(np.uint16))
        image = Image.fromarray((x + y).astype(np.uint8))
        exif = image.getexif()
        exif[274] = 6  # to be turned clockwise
        (tmp_path / "turned").mkdir(exist_ok=True)
        image.save(tmp_path / f"turned/{t}.png", exif=exif)
    for name, size in (("deep", SIZE), ("turned", SIZE[::-1])):
        whole = extract_frames(str(tmp_path / name), tmp_path / f"{name} whole")
        small = extract_frames(str(tmp_path / name), tmp_path / f"{name} small", short_side=32)
        assert small.flow_size == whole.size == size
        assert np.abs(small.flow_frame(1).astype(float) - whole.frame(1)).mean() < 2


@pytest.mark.parametrize("options", ["", "--no-flow_frames"])
def test_flow_over_several_intervals_is_computed_from_them(clip, tmp_path, options, monkeypatch):
    sequence = extract_frames(str(clip), tmp_path, resize=SMALL)
    sizes = set()
    gray = DisFlow.gray
    monkeypatch.setattr(DisFlow, "gray", lambda self, image: sizes.add(image.shape[:2]) or gray(self, image))
    queries = np.array([[0, 20, 15], [2, 25, 20]], np.float32)  # (t, y, x)
    found = baseline_tracks("multiflow", sequence, queries, options)
    assert sizes == {SMALL if options else SIZE}
    truth = queries[:, None, :0:-1] + (np.arange(3) - queries[:, :1])[..., None] * (4 * 40 / 160, 2 * 48 / 96)
    assert found.visible.all() and np.abs(found.tracks - truth).max() < 0.5
    with pytest.raises(UserError, match="--flow cotracker computes no optical flow"):
        baseline_tracks("multiflow", sequence, queries, "--flow cotracker")
