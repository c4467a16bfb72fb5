"""Whose pixels, whose frames: the source of a sequence's frames, and files in its pixels and frame numbers."""

import csv
import json
import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from common.errors import UserError
from loaders.clip_files import annotations_of_clip, queries_of_clip
from loaders.predicted_tracks import load_tracks
from loaders.sequence import open_sequence
from loaders.source_frames import SourceFrames, own_source, resize_points, same_aspect, source_of
from loaders.track_export import export_tracks
from loaders.track_files import (
    Annotations,
    PointTracks,
    load_annotations,
    sample_queries,
    save_annotations,
    save_queries,
    save_tracks,
)
from loaders.video import write_video
from preprocessing.extract_frames import extract_frames
from tests.launch import launch

WEB = Path(__file__).resolve().parents[1] / "drawing" / "web"
QUICK = ("--num_iters 4 --num_pairs 2 --num_pts 32 --num_samples_ray 8 --coupling_width 32 --affine_width 16 "
         "--affine_layers 3 --field_width 24 --i_img 0 --no_tensorboard").split()
# --short_side 96 --start 3 --stride 2
CLIP = SourceFrames((96, 128), (192, 256), np.arange(3, 16, 2), 25.0, "clip.mp4")
SAME_SIZE = SourceFrames((96, 128), (96, 128), np.arange(3, 16, 2), 25.0, "clip.mp4")


def gray_frames(T, size):
    """Frames whose gray level is 12 times their number."""
    return [np.full((*size, 3), 12 * t, np.uint8) for t in range(T)]


def turn(path, matrix):
    """Write a rotation (a, b, c, d) into the header of an .mp4: (x, y) to (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44  # in version 0 of the box
    a, b, c, d = (n << 16 for n in matrix)
    data[at: at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def described(folder):
    return json.loads((folder / "video.json").read_text())


@pytest.mark.parametrize("start,stop,stride,most,numbers", [
    (0, None, 1, None, range(16)), (3, None, 2, None, range(3, 16, 2)), (0, None, 5, None, [0, 5, 10, 15]),
    (2, 9, 3, None, [2, 5, 8]), (1, None, 2, 3, [1, 3, 5])])
def test_frame_numbers_are_those_of_the_decoded_frames(start, stop, stride, most, numbers, tmp_path):
    write_video(tmp_path / "clip.mp4", gray_frames(16, (32, 48)), 25)
    sequence = extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq", start, stop, stride, most)
    source = source_of(sequence)
    assert source.numbers.tolist() == list(numbers) and source.known and source.name == "clip.mp4"
    levels = [frame.mean() / 12 for frame in sequence.frames()]
    assert np.abs(np.array(levels) - source.numbers).max() < 0.3
    assert source.frame_rate == 25 and source.size == source.source_size == (32, 48)
    assert described(tmp_path / "seq")["frames"]["times"] == pytest.approx([t / 25 for t in numbers])
    assert source_of(open_sequence(tmp_path / "seq", 2)).numbers.tolist() == list(numbers)[:2]  # --num_imgs 2


@pytest.mark.parametrize("matrix,rotation,mirrored,size", [
    ((1, 0, 0, 1), 0, False, (54, 90)), ((0, 1, -1, 0), 90, False, (90, 54)), ((-1, 0, 0, -1), 180, False, (54, 90)),
    ((0, -1, 1, 0), 270, False, (90, 54)), ((-1, 0, 0, 1), 180, True, (54, 90))])
def test_the_size_of_a_phones_video_is_the_upright_one(matrix, rotation, mirrored, size, tmp_path):
    path = tmp_path / "phone.mp4"
    write_video(path, gray_frames(3, (54, 90)))
    turn(path, matrix)
    sequence = extract_frames(str(path), tmp_path / "seq", short_side=27)
    entries = described(tmp_path / "seq")
    assert source_of(sequence).source_size == size and sequence.size == (size[0] // 2, size[1] // 2)
    assert (entries["rotation"], entries["mirrored"]) == (rotation, mirrored)


def test_times_of_a_variable_frame_rate(tmp_path):
    times = [0, 33, 140, 150, 400, 1200]  # milliseconds
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for image, time in zip(gray_frames(6, (32, 48)), times, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq", start=1, stride=2)
    assert described(tmp_path / "seq")["frames"]["times"] == pytest.approx([0.033, 0.15, 1.2], abs=1e-3)


def test_a_folder_of_images_is_a_source(tmp_path):
    (tmp_path / "plate").mkdir()
    for t, image in enumerate(gray_frames(6, (40, 60))):
        cv2.imwrite(str(tmp_path / "plate" / f"img_{t + 1}.png"), image)
    source = source_of(extract_frames(str(tmp_path / "plate"), tmp_path / "seq", 1, None, 2, resize=(20, 20)))
    assert (source.name, source.frame_rate, source.source_size) == ("plate", None, (40, 60))
    assert source.numbers.tolist() == [1, 3, 5] and described(tmp_path / "seq")["frames"]["times"] == [None] * 3


def test_the_hash_is_that_of_the_content(tmp_path):
    hashes = []
    for name, T in (("a", 3), ("b", 3), ("c", 4)):
        write_video(tmp_path / f"{name}.mp4", gray_frames(T, (32, 48)))
        extract_frames(str(tmp_path / f"{name}.mp4"), tmp_path / name)
        hashes.append(described(tmp_path / name)["hash"])
    assert hashes[0] == hashes[1] != hashes[2] and len(hashes[0]) == 32


def test_an_older_folder_is_its_own_source_and_gets_one_from_the_video(tmp_path):
    write_video(tmp_path / "clip.mp4", gray_frames(4, (32, 48)))
    sequence = extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq", stride=2)
    (tmp_path / "seq" / "video.json").unlink()
    source = source_of(sequence)
    assert not source.known and source.is_the_sequence and source.numbers.tolist() == [0, 1]
    extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq", stride=2)
    assert source_of(sequence).numbers.tolist() == [0, 2]


@pytest.mark.parametrize("change", [
    {"size": None}, {"size": [32, 48, 3]}, {"size": [0, 48]}, {"size": [32.5, 48]}, {"frame_rate": 0},
    {"frame_rate": "25"}, {"frames": []}, {"frames": {"size": [32, 48], "names": ["00000.png"], "numbers": [0, 1]}},
    {"frames": {"size": [32, 48], "names": ["00000.png", "00001.png"], "numbers": [0, -1]}}])
def test_a_damaged_description_is_one_line(change, tmp_path):
    write_video(tmp_path / "clip.mp4", gray_frames(2, (32, 48)))
    sequence = extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq")
    (tmp_path / "seq" / "video.json").write_text(json.dumps(described(tmp_path / "seq") | change))
    with pytest.raises(UserError, match=r"video\.json is damaged: remove it"):
        source_of(sequence)


def test_a_description_of_other_frames_is_refused(tmp_path):
    write_video(tmp_path / "clip.mp4", gray_frames(3, (32, 48)))
    extract_frames(str(tmp_path / "clip.mp4"), tmp_path / "seq")
    color = tmp_path / "seq" / "color"
    shutil.copy(color / "00001.png", color / "00007.png")
    with pytest.raises(UserError, match="describes other frames"):
        source_of(open_sequence(tmp_path / "seq"))
    (color / "00007.png").unlink()
    (color / "00001.png").unlink()  # the others keep their numbers
    assert source_of(open_sequence(tmp_path / "seq")).numbers.tolist() == [0, 2]
    for path in color.iterdir():
        cv2.imwrite(str(path), np.zeros((16, 24, 3), np.uint8))
    with pytest.raises(UserError, match="describes other frames"):
        source_of(open_sequence(tmp_path / "seq"))


@pytest.mark.parametrize("size,source", [((96, 128), (192, 256)), ((27, 45), (54, 90)), ((64, 64), (480, 854)),
                                         ((455, 256), (854, 480))])
def test_pixel_centers_and_edges_of_both_sides(size, source):
    """The center of frame pixel x lies in the middle of the source pixels that it covers."""
    H, W = size
    x = np.arange(W)
    covered = [(left + right) / 2 - 0.5 for left, right in zip(x * source[1] / W, (x + 1) * source[1] / W, strict=True)]
    points = np.stack([x, np.zeros(W)], axis=-1)
    found = resize_points(points, size, source)
    assert np.allclose(found[:, 0], covered, atol=1e-3)
    assert np.allclose(resize_points(found, source, size), points, atol=1e-4)
    corners = np.array([[-0.5, -0.5], [W - 0.5, H - 0.5]])
    assert np.allclose(resize_points(corners, size, source), [[-0.5, -0.5], [source[1] - 0.5, source[0] - 0.5]])


@pytest.mark.parametrize("a,b,expected", [((96, 128), (192, 256), True), ((480, 854), (256, 455), True),
                                          ((854, 480), (256, 455), False), ((192, 256), (256, 256), False),
                                          ((1080, 1920), (1088, 1920), False), ((1080, 1920), (540, 960), True)])
def test_sizes_of_the_same_aspect(a, b, expected):
    assert same_aspect(a, b) == same_aspect(b, a) == expected


IN_FRAMES = [[1, 20, 29.75], [3, 44.75, 49.75]]  # (t, y, x) of 128x96 frames 1 and 3, which are 5 and 9 of the clip


@pytest.mark.parametrize("clip,size,coordinates,queries,expected", [
    # no frame size: the source's if all fit, else the frames'
    (CLIP, None, "source", [[5, 40.5, 60], [9, 90, 100]], IN_FRAMES),
    (CLIP, None, "source", [[5, 40.5, 60], [4, 20, 10]], [[5, 40.5, 60], [4, 20, 10]]),
    (CLIP, None, "source", [[0, 20, 30]], [[0, 20, 30]]),
    (CLIP, None, "source", [[3, -0.5, 255.5]], [[0, -0.5, 127.5]]),
    (CLIP, None, "frames", [[5, 40.5, 60], [3, 90, 100]], [[5, 40.5, 60], [3, 90, 100]]),
    # the source's size
    (CLIP, (192, 256), "source", [[5, 40.5, 60], [9, 90, 100]], IN_FRAMES),
    (CLIP, (192, 256), "source", [[1, 40.5, 60], [3, 90, 100]], IN_FRAMES),  # 1 is no frame number of the source
    (CLIP, (192, 256), "frames", [[1, 40.5, 60], [3, 90, 100]], IN_FRAMES),
    # the frames' size
    (CLIP, (96, 128), "source", IN_FRAMES, IN_FRAMES), (CLIP, (96, 128), "frames", IN_FRAMES, IN_FRAMES),
    (CLIP, (96, 128), "source", [[5, 40.5, 60]], [[5, 40.5, 60]]),
    # another size of the same aspect
    (CLIP, (384, 512), "source", [[5, 81.5, 120.5], [9, 180.5, 200.5]], IN_FRAMES),
    # frames of the source's size: its frame numbers, if all are
    (SAME_SIZE, (96, 128), "source", [[5, 40, 60], [15, 90, 100]], [[1, 40, 60], [6, 90, 100]]),
    (SAME_SIZE, (96, 128), "frames", [[5, 40, 60]], [[5, 40, 60]]),
    (SAME_SIZE, None, "source", [[6, 40, 60]], [[6, 40, 60]]),
    # --resize to another aspect
    (SourceFrames((64, 64), (192, 256), np.arange(4)), (192, 256), "source", [[2, 1, 1.5]], [[2, 0, 0]]),
    (SourceFrames((64, 64), (192, 256), np.arange(4)), (128, 128), "source", [[2, 0.5, 2.5]], [[2, 0, 1]]),
    # no source is known
    (own_source((96, 128), 7), None, "source", [[5, 40.5, 60]], [[5, 40.5, 60]]),
    (own_source((96, 128), 7), (192, 256), "source", [[5, 40.5, 60]], [[5, 20, 29.75]])])
def test_query_points_are_brought_to_the_frames(clip, size, coordinates, queries, expected, tmp_path):
    path = tmp_path / ("q.npz" if size else "q.csv")
    if size:
        save_queries(path, np.array(queries, np.float32), size)
    else:
        path.write_text("t,y,x\n" + "".join(f"{t},{y},{x}\n" for t, y, x in queries))
    found = queries_of_clip(path, clip, coordinates)
    assert found.dtype == np.float32 and np.allclose(found, expected, atol=1e-4)
    if not size:  # an .npz without a size
        np.savez(tmp_path / "bare.npz", query_points=np.array(queries, np.float32))
        assert np.array_equal(queries_of_clip(tmp_path / "bare.npz", clip, coordinates), found)


@pytest.mark.parametrize("clip,size,coordinates,query,words", [
    (CLIP, None, "source", [5, 10, 300], ["row 1", "fits neither", "256x192", "128x96", "3, 5, ..., 15"]),
    (CLIP, None, "source", [4, 10, 200], ["row 1", "256x192", "128x96"]),
    (CLIP, None, "source", [20, 10, 20], ["row 1", "256x192", "128x96", "frames 0 to 6"]),
    (CLIP, None, "frames", [5, 10, 200], ["row 1", "128x96"]),
    (CLIP, (192, 256), "source", [4, 10, 256], ["row 1", "256x192", "128x96"]),
    (CLIP, (96, 128), "source", [9, 10, 20], ["row 1", "128x96"]),
    (CLIP, (256, 192), "source", [5, 10, 20], ["192x256", "128x96", "256x192"]),
    (CLIP, (100, 100), "frames", [5, 10, 20], ["100x100", "128x96", "256x192"]),
    (own_source((96, 128), 7), (100, 100), "source", [5, 10, 20], ["100x100", "128x96"]),
    (own_source((96, 128), 7), None, "source", [7, 10, 20], ["row 1", "7 frames", "128x96"])])
def test_query_points_that_fit_nothing_are_refused(clip, size, coordinates, query, words, tmp_path):
    path = tmp_path / ("q.npz" if size else "q.csv")
    if size:
        save_queries(path, np.array([[3, 5, 5], query], np.float32), size)
    else:
        path.write_text(f"t,y,x\n3,5,5\n{query[0]},{query[1]},{query[2]}\n")
    with pytest.raises(UserError) as caught:
        queries_of_clip(path, clip, coordinates)
    assert all(word in str(caught.value) for word in [*words, path.name]) and "\n" not in str(caught.value)


def test_how_query_points_were_read_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    for t in (3, 0):
        (tmp_path / f"{t}.csv").write_text(f"t,y,x\n{t},20,30\n")
        queries_of_clip(tmp_path / f"{t}.csv", CLIP, "source")
    first, second = caplog.messages
    assert "query points are in clip.mp4 (256x192, frames 3, 5, ..., 15)" in first
    assert "do not fit clip.mp4" in second and "they are read in the sequence's frames, 128x96, frames 0 to 6" in second


def annotated(T, size, queries=None):
    """Two points that move by (2, -1) px a frame, of a clip of T frames."""
    t = np.arange(T)
    points = np.stack([np.stack([x + 2 * t, 80 - t], axis=-1) for x in (10, 40)]).astype(np.float32)
    occluded = np.zeros((2, T), bool)
    occluded[1, ::2] = True
    return Annotations(points, occluded, size, queries, ~occluded)


def test_annotations_of_all_frames_of_the_source(tmp_path):
    whole = annotated(16, (192, 256), np.array([[3, 97, 16], [9, 91, 58]], np.float32))
    save_annotations(tmp_path / "a.npz", whole)
    found = annotations_of_clip(tmp_path / "a.npz", CLIP, "source")
    assert found.frame_size == (96, 128) and found.points.shape == (2, 7, 2)
    assert np.allclose(found.points, (whole.points[:, 3::2] + 0.5) / 2 - 0.5)
    assert np.array_equal(found.occluded, whole.occluded[:, 3::2])
    assert np.array_equal(found.evaluated, whole.evaluated[:, 3::2])
    assert np.allclose(found.query_points, [[0, 48.25, 7.75], [3, 45.25, 28.75]])
    with pytest.raises(UserError, match="16 frames, the sequence 7"):
        annotations_of_clip(tmp_path / "a.npz", CLIP, "frames")
    save_annotations(tmp_path / "a.npz", annotated(16, (192, 256), np.array([[3, 97, 16], [4, 9, 5]], np.float32)))
    with pytest.raises(UserError, match=r"row 1 is in frame 4 of the source, the sequence has its frames 3, 5, \.\.\."):
        annotations_of_clip(tmp_path / "a.npz", CLIP, "source")


@pytest.mark.parametrize("size", [(96, 128), (192, 256), (384, 512)])
@pytest.mark.parametrize("coordinates", ["source", "frames"])
def test_annotations_of_the_sequences_frames(size, coordinates, tmp_path):
    truth = annotated(7, size)
    save_annotations(tmp_path / "a.npz", truth)
    found = annotations_of_clip(tmp_path / "a.npz", CLIP, coordinates)
    assert np.allclose(found.points, (truth.points + 0.5) * 96 / size[0] - 0.5) and found.frame_size == (96, 128)


def test_annotations_of_another_aspect(tmp_path, caplog):
    caplog.set_level("INFO")
    save_annotations(tmp_path / "a.npz", annotated(7, (100, 100)))
    with pytest.raises(UserError, match="for frames of 100x100, the sequence's are 128x96, its source 256x192"):
        annotations_of_clip(tmp_path / "a.npz", CLIP, "source")
    found = annotations_of_clip(tmp_path / "a.npz", own_source((96, 128), 7), "source")
    assert found.frame_size == (96, 128) and "100x100 are stretched to the frames' 128x96" in caplog.text


@pytest.fixture
def tracks():
    """Two tracks in CLIP's frames; the second one is hidden in the clip's frame 9."""
    points = np.stack([np.stack([x + 2 * np.arange(7), 20 - np.arange(7)], axis=-1) for x in (30, 60)])
    visible = np.ones((2, 7), bool)
    visible[1, 3] = False
    return PointTracks(points.astype(np.float32), visible, np.array([[0, 20, 30], [2, 18, 64]], np.float32), (96, 128),
                       source=CLIP)


def test_csv_is_in_the_source(tracks, tmp_path):
    for coordinates in ("source", "frames"):
        export_tracks(tmp_path / f"{coordinates}.csv", tracks, None, coordinates)
    rows = list(csv.DictReader(open(tmp_path / "source.csv")))
    assert [int(row["frame"]) for row in rows] == 2 * [3, 5, 7, 9, 11, 13, 15]
    assert [float(row["x"]) for row in rows[:7]] == [60.5 + 4 * t for t in range(7)]
    assert [float(row["y"]) for row in rows[:7]] == [40.5 - 2 * t for t in range(7)]
    rows = list(csv.DictReader(open(tmp_path / "frames.csv")))
    assert [int(row["frame"]) for row in rows] == 2 * list(range(7)) and float(rows[1]["x"]) == 32


def test_npz_is_in_the_frames_and_names_the_source(tracks, tmp_path):
    for coordinates in ("source", "frames"):
        export_tracks(tmp_path / "t.npz", tracks, None, coordinates)
        arrays = np.load(tmp_path / "t.npz")
        assert np.array_equal(arrays["tracks"], tracks.tracks) and arrays["frame_size"].tolist() == [96, 128]
        assert arrays["frame_numbers"].tolist() == [3, 5, 7, 9, 11, 13, 15]
        assert arrays["source_size"].tolist() == [192, 256] and arrays["frame_rate"] == 25
    back = load_tracks(tmp_path / "t.npz").source
    assert back.numbers.tolist() == CLIP.numbers.tolist() and back.size == (96, 128)
    assert (back.source_size, back.frame_rate) == ((192, 256), 25.0)
    save_tracks(tmp_path / "bare.npz", PointTracks(tracks.tracks, tracks.visible, tracks.query_points, (96, 128)))
    assert set(np.load(tmp_path / "bare.npz")) == {"tracks", "visible", "query_points", "frame_size"}


@pytest.mark.parametrize("change,words", [({"frame_numbers": np.arange(6)}, "frame_numbers"),
                                          ({"frame_numbers": np.arange(7)[::-1]}, "ascending"),
                                          ({"source_size": np.array([0, 5])}, "source_size"),
                                          ({"frame_rate": np.array(np.nan)}, "frame_rate")])
def test_a_wrong_source_of_tracks_is_one_line(change, words, tracks, tmp_path):
    save_tracks(tmp_path / "t.npz", tracks)
    np.savez(tmp_path / "t.npz", **dict(np.load(tmp_path / "t.npz")) | change)
    with pytest.raises(UserError, match=words):
        load_tracks(tmp_path / "t.npz")


def test_nuke_is_in_the_source(tracks, tmp_path):
    export_tracks(tmp_path / "t.nuke", tracks)
    lines = (tmp_path / "t.nuke" / "track_00001.txt").read_text().splitlines()
    assert lines[:2] == ["# track 1, query point: frame 7, x 129.000, y 155.000", "# occluded in frames: 9"]
    values = np.array([line.split() for line in lines[2:]], float)
    assert values[:, 0].tolist() == [3, 5, 7, 9, 11, 13, 15]
    assert values[:, 1].tolist() == [121 + 4 * t for t in range(7)]
    assert values[:, 2].tolist() == [192 - 41 + 2 * t for t in range(7)]


def made(arguments):
    """Run eval.py; its exit code must be 0."""
    result = launch("eval.py", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def seq(tmp_path_factory):
    """A sequence of a clip of 128x96 and 16 frames that moves by (2, -1) px a frame: --short_side 48, 3, 5, ..., 15."""
    folder = tmp_path_factory.mktemp("source")
    noise = np.random.default_rng(0).normal(size=(140, 200, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    image = np.clip(128 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)
    write_video(folder / "clip.mp4", [image[20 + t: 116 + t, 50 - 2 * t: 178 - 2 * t] for t in range(16)], 24)
    assert launch("preprocessing", "--video", folder / "clip.mp4", "--data_dir", folder / "seq", "--short_side", 48,
                  "--start", 3, "--stride", 2, "--num_workers", 1).returncode == 0
    return folder / "seq"


def test_eval_tracks_and_exports_in_the_source(seq, tmp_path):
    run = ["--data_dir", seq, "--save_dir", tmp_path]
    assert launch("train.py", *run, *QUICK).returncode == 0
    save_queries(tmp_path / "q.npz", np.array([[5, 40.5, 60], [9, 60, 33]], np.float32), (96, 128))
    (tmp_path / "q.csv").write_text("t,y,x\n5,40.5,60\n9,60,33\n")
    for name in ("q.npz", "q.csv"):
        made([*run, "--queries", tmp_path / name, "--out", tmp_path / f"{name}.npz"])
        made([*run, "--queries", tmp_path / name, "--out", tmp_path / f"{name}.csv"])
        arrays = np.load(tmp_path / f"{name}.npz")
        assert np.allclose(arrays["query_points"], [[1, 20, 29.75], [3, 29.75, 16.25]])
        assert arrays["frame_numbers"].tolist() == [3, 5, 7, 9, 11, 13, 15]
        assert arrays["source_size"].tolist() == [96, 128] and arrays["frame_size"].tolist() == [48, 64]
        rows = list(csv.DictReader(open(tmp_path / f"{name}.csv")))
        assert [float(rows[1][key]) for key in ("frame", "y", "x")] == [5, 40.5, 60]
        assert [float(rows[7 + 3][key]) for key in ("frame", "y", "x")] == [9, 60, 33]
    save_annotations(tmp_path / "a.npz", annotated(16, (96, 128)))
    made([*run, "--annotations", tmp_path / "a.npz", "--query_mode", "first"])
    own = np.load(tmp_path / "default_seq" / "annotation_tracks.npz")
    assert own["frame_numbers"].tolist() == [3, 5, 7, 9, 11, 13, 15]
    scored = ["--annotations", tmp_path / "a.npz", "--query_mode", "first"]
    made(["--predictions", tmp_path / "default_seq" / "annotation_tracks.npz", *scored, "--out", tmp_path / "m.json"])
    metrics, again = (json.loads(path.read_text()) for path in (tmp_path / "default_seq" / "metrics.json",
                                                                tmp_path / "m.json"))
    assert all(metrics[key] == pytest.approx(again[key], abs=1e-6) for key in again if key != "query_mode")
    (tmp_path / "q.csv").write_text("t,y,x\n5,40.5,160\n")
    result = launch("eval.py", *run, "--queries", tmp_path / "q.csv")
    assert result.returncode == 2 and "128x96" in result.stderr and "64x48" in result.stderr


def test_converting_needs_no_folder_if_the_file_names_the_source(seq, tmp_path):
    points = np.stack([np.arange(7) * 2 + 10, 40 - np.arange(7)], axis=-1)[None].astype(np.float32)
    own = PointTracks(points, np.ones((1, 7), bool), np.array([[0, 40, 10]], np.float32), (48, 64))
    save_tracks(tmp_path / "bare.npz", own)
    save_tracks(tmp_path / "large.npz", own.resized((96, 128)))
    made(["--predictions", tmp_path / "bare.npz", "--data_dir", seq, "--out", tmp_path / "named.npz"])
    for name, more in (("bare", ["--data_dir", seq]), ("large", ["--data_dir", seq]), ("named", [])):
        made(["--predictions", tmp_path / f"{name}.npz", *more, "--out", tmp_path / f"{name}.csv"])
    text = (tmp_path / "bare.csv").read_text()
    assert text.splitlines()[1].startswith("0,3,20.5000,80.5000,1") and text.count("\n") == 8
    assert (tmp_path / "named.csv").read_text() == text == (tmp_path / "large.csv").read_text()
    made(["--predictions", tmp_path / "bare.npz", "--out", tmp_path / "alone.csv"])
    assert (tmp_path / "alone.csv").read_text().splitlines()[1].startswith("0,0,10.0000,40.0000,1")
    save_tracks(tmp_path / "other.npz", own.resized((50, 50)))
    result = launch("eval.py", "--predictions", tmp_path / "other.npz", "--data_dir", seq, "--out", tmp_path / "o.csv")
    assert result.returncode == 2
    assert all(word in result.stderr for word in ("50x50", "64x48", "128x96")), result.stderr


@pytest.mark.parametrize("size", [(60, 80), (480, 640), (256, 256)])
@pytest.mark.parametrize("scaled_by", ["centers at integers", "factor", "rounded factor"])
def test_predictions_of_another_size_have_the_same_score(size, scaled_by, small_sequence, tmp_path):
    truth = load_annotations(small_sequence / "annotations.npz").resized((120, 160))
    queries, rows = sample_queries(truth, "first")
    keep = (queries[:, 1:] > 2).all(axis=1)
    queries, rows = queries[keep], rows[keep]
    save_annotations(tmp_path / "a.npz", Annotations(truth.points[rows], truth.occluded[rows], (120, 160)))
    tracks = PointTracks(truth.points[rows] + 1, ~truth.occluded[rows], queries, (120, 160))
    save_tracks(tmp_path / "same.npz", tracks)
    other = tracks.resized(size)
    if "factor" in scaled_by:  # x * scale, as programs do that have pixel centers at half-integers
        points = tracks.query_points * np.array([1, size[0] / 120, size[1] / 160], np.float32)
        points = np.rint(points) if "rounded" in scaled_by else points
        other = PointTracks(other.tracks, other.visible, points, size)
    save_tracks(tmp_path / "other.npz", other)
    scores = []
    for name in ("same", "other"):
        made(["--predictions", tmp_path / f"{name}.npz", "--annotations", tmp_path / "a.npz", "--query_mode", "first",
              "--out", tmp_path / "m.json"])
        scores.append(json.loads((tmp_path / "m.json").read_text()))
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    points = other.query_points.copy()
    points[3, 1:] += 2.5 * max(1, size[0] / 120)
    save_tracks(tmp_path / "other.npz", PointTracks(other.tracks, other.visible, points, size))
    result = launch("eval.py", "--predictions", tmp_path / "other.npz", "--annotations", tmp_path / "a.npz",
                    "--query_mode", "first")
    assert result.returncode == 2 and f"{size[1]}x{size[0]}" in result.stderr and "160x120" in result.stderr


def test_tracks_of_others_and_annotations_of_all_frames_of_the_source(seq, tmp_path):
    """The tracks of the strided sequence are exact, so their score is 1."""
    truth = annotated(16, (96, 128))
    save_annotations(tmp_path / "a.npz", Annotations(truth.points, np.zeros((2, 16), bool), (96, 128)))
    tracks = resize_points(truth.points[:, 3::2], (96, 128), (48, 64))
    queries = np.concatenate([np.zeros((2, 1)), tracks[:, 0, ::-1]], axis=1).astype(np.float32)
    np.savez(tmp_path / "t.npz", tracks=tracks, visible=np.ones((2, 7), bool), query_points=queries,
             frame_size=(48, 64))
    scored = ["--predictions", tmp_path / "t.npz", "--annotations", tmp_path / "a.npz", "--query_mode", "first"]
    made([*scored, "--data_dir", seq, "--out", tmp_path / "m.json"])
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["average_jaccard"] == metrics["pts_within_1"] == 1
    result = launch("eval.py", *scored)
    assert result.returncode == 2 and "7 frames, 16 are needed" in result.stderr, result.stderr


def test_correspondences_from_tracks_of_the_sources_size(seq, tmp_path):
    from loaders.correspondences import open_correspondences

    shutil.copytree(seq / "color", tmp_path / "seq" / "color")
    shutil.copy(seq / "video.json", tmp_path / "seq")
    y, x = (grid.ravel() for grid in np.mgrid[10:90:4, 10:100:4])
    points = np.stack([np.stack([x + 4 * t, y - 2 * t], axis=-1) for t in range(7)], axis=1).astype(np.float32)
    tracks = PointTracks(points, ((points >= 0) & (points < (128, 96))).all(-1),
                         np.stack([0 * y, y, x], axis=-1).astype(np.float32), (96, 128))
    save_tracks(tmp_path / "t.npz", tracks)
    result = launch("preprocessing", "--data_dir", tmp_path / "seq", "--tracks", tmp_path / "t.npz")
    assert result.returncode == 0, result.stderr
    pair = open_correspondences(open_sequence(tmp_path / "seq")).stored(0, 2)
    assert np.allclose(pair.flow(slice(None)), [4, -2], atol=1 / 32)


def test_the_pages_table_is_in_the_source():
    """The function csv() of the page, run by Node.js."""
    if not (node := shutil.which("node")):
        pytest.skip("Node.js is not installed")
    from drawing.page import _saved_as
    from drawing.page_data import PageData

    data = PageData("x", 10, np.zeros((2, 96, 128, 3), np.uint8), [0, 3], [], 4, 0.99, None, None, None, source=CLIP)
    saved = [_saved_as(data)]
    data.source = None
    saved.append(_saved_as(data))
    text = (WEB / "main.js").read_text()
    function = text[text.index("function csv()"): text.index("function save()")]
    track = '{x: [30, 36], y: [20, 17], visible: [1, 0], score: [0, 1], depth: [0.5, 0.5]}'
    tables = []
    for value in saved:
        script = (f"const meta = {{count: 2, saved: {json.dumps(value)}}}, state = {{selection: [{track}]}};\n"
                  f"{function}\nprocess.stdout.write(csv());")
        tables.append(subprocess.run([node, "-e", script], capture_output=True, text=True, check=True).stdout)
    head = "track,frame,x,y,visible,occlusion_score,depth\n"
    assert tables[0] == head + "0,3,60.5000,40.5000,1,0.0000,0.5000\n0,9,72.5000,34.5000,0,1.0000,0.5000\n"
    assert tables[1] == head + "0,0,30.0000,20.0000,1,0.0000,0.5000\n0,3,36.0000,17.0000,0,1.0000,0.5000\n"
