"""Frames: images of several bit depths and channels, videos of phones, truncated clips."""

import errno
import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from loaders.correspondences import open_correspondences
from loaders.images import read_image, read_levels, write_png
from loaders.sequence import open_sequence
from loaders.video import read_video, write_gif, write_video
from preprocessing.cli import main
from preprocessing.extract_frames import extract_frames
from tests.launch import launch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def picture():
    """A smooth colored picture `(48, 80, 3)` uint8 RGB that no rotation or mirroring maps to itself."""
    y, x = np.mgrid[:48, :80].astype(np.float32)
    return np.stack([40 + 2 * x, 60 + 3 * y, 120 + x - y], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("name,make", [
    ("16 bits.png", lambda rgb: rgb[..., ::-1].astype(np.uint16) * 257),
    ("rgba.png", lambda rgb: np.dstack([rgb[..., ::-1], np.full(rgb.shape[:2], 90, np.uint8)])),
    ("rgba 16 bits.png", lambda rgb: np.dstack([rgb[..., ::-1], np.full(rgb.shape[:2], 90)]).astype(np.uint16) * 257)])
def test_depth_and_transparency_leave_the_colors(name, make, picture, tmp_path):
    cv2.imwrite(str(tmp_path / name), make(picture))
    assert np.array_equal(read_image(tmp_path / name), picture)


@pytest.mark.parametrize("name", ["gray.png", "gray 16 bits.png", "gray 16 bits.tif"])
def test_grey_is_repeated(name, picture, tmp_path):
    gray = picture[..., 0]
    cv2.imwrite(str(tmp_path / name), gray.astype(np.uint16) * 257 if "16" in name else gray)
    assert np.array_equal(read_image(tmp_path / name), np.repeat(gray[..., None], 3, axis=-1))


def test_a_cameras_orientation_is_applied(picture, tmp_path):
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[274] = 6  # to be turned clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(picture, -1))


@pytest.mark.parametrize("matrix,expected", [  # a, b, c, d of the file: (x, y) to (a x + c y, b x + d y)
    ((0, 1, -1, 0), lambda x: np.rot90(x, -1)), ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    ((0, -1, 1, 0), np.rot90), ((-1, 0, 0, 1), np.fliplr), ((0, 1, 1, 0), lambda x: x.transpose(1, 0, 2))])
def test_a_phones_rotation_is_applied(matrix, expected, picture, tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, [picture] * 2)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44  # in version 0 of the box
    a, b, c, d = (n << 16 for n in matrix)
    data[at: at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    for frame in read_video(path):
        assert np.abs(frame.astype(int) - expected(picture)).mean() < 4


def test_frames_of_a_variable_rate_come_one_after_the_other(picture, tmp_path):
    times = [0, 33, 140, 150, 400, 1200]  # milliseconds
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for k, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 12 * k, axis=1), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = list(read_video(tmp_path / "clip.mp4"))
    assert len(frames) == 6
    for k, frame in enumerate(frames):
        assert np.abs(frame.astype(int) - np.roll(picture, 12 * k, axis=1)).mean() < 8


def test_a_file_that_is_not_a_video_is_one_line(picture, tmp_path):
    write_video(tmp_path / "one.mp4", [picture])
    write_video(tmp_path / "whole.mp4", [picture] * 5)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "whole.mp4").read_bytes()[:900])
    (tmp_path / "text.mp4").write_text("no video")
    for name, words in (("one", "gives one frame"), ("cut", "cannot be decoded"), ("text", "cannot be decoded")):
        with pytest.raises(UserError, match=words):
            extract_frames(str(tmp_path / f"{name}.mp4"), tmp_path / name)
        assert not any((tmp_path / name).iterdir())


@pytest.mark.parametrize("size", [(61, 37), (16, 16), (16, 70)])
def test_portrait_odd_and_tiny_frames_work(size, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    (tmp_path / "images").mkdir()
    for t in range(3):
        cv2.imwrite(str(tmp_path / "images" / f"{t}.png"), np.roll(cv2.GaussianBlur(noise, (0, 0), 1.5), t, axis=1))
    main(["--video", str(tmp_path / "images"), "--data_dir", str(tmp_path / "seq"), "--chain"])
    sequence = open_sequence(tmp_path / "seq")
    store = open_correspondences(sequence)
    assert sequence.size == size and len(store.pairs) == 6
    pair = store.dense(0, 1)
    assert np.abs(np.median(pair.flow[pair.cycle], axis=0) - (1, 0)).max() < 0.3


def test_a_folder_that_cannot_be_made_is_one_line(picture, tmp_path):
    write_video(tmp_path / "clip.mp4", [picture] * 2)
    result = launch("preprocessing", "--video", tmp_path / "clip.mp4", "--data_dir", tmp_path / "clip.mp4" / "seq")
    assert result.returncode == 2 and "give another --data_dir" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_frames_compressed_by_another_program_are_the_same_frames(picture, tmp_path):
    write_video(tmp_path / "clip.mp4", [picture] * 2)
    extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq")
    for path in sorted((tmp_path / "seq" / "color").iterdir()):
        before = path.read_bytes()
        cv2.imwrite(str(path), cv2.imread(str(path)))
        assert path.read_bytes() != before
    extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq")
    cv2.imwrite(str(path), 255 - cv2.imread(str(path)))
    with pytest.raises(UserError, match="already has other frames"):
        extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq")


def test_files_that_are_not_frames_are_not_replaced(picture, tmp_path):
    video = tmp_path / "seq" / "color" / "clip.mp4"
    video.parent.mkdir(parents=True)
    write_video(video, [picture] * 2)
    with pytest.raises(UserError, match=r"has clip\.mp4, but no images"):
        extract_frames(str(video), tmp_path / "seq")
    assert [path.name for path in (tmp_path / "seq").rglob("*")] == ["color", "clip.mp4"]


def test_a_frame_that_cannot_be_written_stops_decoding_and_leaves_nothing(picture, tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", [picture] * 12)
    written = []

    def write(path, image):
        written.append(path.name)
        if path.stem == "00003":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_png(path, image)

    monkeypatch.setattr("preprocessing.extract_frames.write_png", write)
    with pytest.raises(OSError, match="No space left"):
        extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq")
    assert len(written) < 10 and not list((tmp_path / "seq").iterdir())


@pytest.mark.parametrize("shape,dtype", [((30, 41, 3), np.uint8), ((30, 41), np.uint8), ((30, 41), np.uint16)])
def test_png_files_keep_all_pixels(shape, dtype, tmp_path):
    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    write_png(tmp_path / "a.png", image)
    assert np.array_equal(read_image(tmp_path / "a.png") if len(shape) == 3 else read_levels(tmp_path / "a.png"), image)


@pytest.mark.parametrize("fps", [10, 30_000 / 1001])
def test_videos_are_written_for_browsers(fps, picture, tmp_path):
    write_video(tmp_path / "a.mp4", [picture[:-1, :-1]] * 4, fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p" and stream.frames == 4
        assert (stream.height, stream.width) == picture.shape[:2] and abs(stream.average_rate - fps) < 1e-3
    write_gif(tmp_path / "a.gif", [np.roll(picture, t, axis=1) for t in range(4)])
    frames = list(read_video(tmp_path / "a.gif"))
    assert len(frames) == 4 and np.abs(frames[0].astype(int) - picture).mean() < 8


@pytest.mark.parametrize("write,name", [(write_video, "a.mp4"), (write_gif, "a.gif")])
def test_a_video_that_fails_halfway_leaves_no_file(write, name, picture, tmp_path):
    def frames():
        yield picture
        raise UserError("no second frame")

    with pytest.raises(UserError, match="no second frame"):
        write(tmp_path / name, frames())
    with pytest.raises(UserError, match="no frames to write"):
        write(tmp_path / name, [])
    assert not any(tmp_path.iterdir())
