"""Frames of more than 8 bits per value: counts, 16-bit color, floating-point TIFF, OpenEXR; images and video."""

import json
import logging
import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from loaders.deep_images import ValueRange, clip_range, sample, srgb
from loaders.images import find_range, read_image, read_mask, read_values
from loaders.sequence import open_sequence
from loaders.tapvid import read_folder
from loaders.track_files import Annotations, save_annotations
from loaders.video import read_video
from preprocessing.cli import main
from preprocessing.extract_frames import extract_frames
from tests.exr_files import write_exr

H, W, T = 48, 64, 5


def textures(seed: int = 0) -> np.ndarray:
    """Smooth gray pictures `(T, H, W)` in [0, 1], each the previous one moved by a pixel."""
    noise = np.random.default_rng(seed).normal(size=(H, W + T)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    return np.stack([smooth[:, T - t: T - t + W] for t in range(T)])


def counts() -> np.ndarray:
    """Thermal frames `(T, H, W)` uint16 of 30,000 to 31,000."""
    return np.rint(30_000 + 1_000 * textures()).astype(np.uint16)


def write_images(folder: Path, frames, suffix: str) -> Path:
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{t}{suffix}"), frame)
    return folder


def write_ffv1(path: Path, frames, pixel_format: str, given: str = "gray16le") -> Path:
    """A lossless video of frames whose arrays have the format `given`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = H, W, pixel_format
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=given).reformat(format=pixel_format)))
        container.mux(stream.encode())
    return path


CLIPS = {
    "gray.png": lambda folder: write_images(folder, counts(), ".png"),
    "gray.tif": lambda folder: write_images(folder, counts(), ".tif"),
    "color.png": lambda folder: write_images(folder, np.repeat(counts()[..., None], 3, -1), ".png"),
    "color.tif": lambda folder: write_images(folder, np.repeat(counts()[..., None], 3, -1), ".tif"),
    "32 bits.tif": lambda folder: write_images(folder, counts().astype(np.int32) * 100, ".tif"),
    "video of 16 bits": lambda folder: write_ffv1(folder.with_suffix(".mkv"), counts(), "gray16le"),
    "video of 14 bits": lambda folder: write_ffv1(folder.with_suffix(".mkv"), counts(), "gray14le"),
    "video of 16 bits in color": lambda folder: write_ffv1(folder.with_suffix(".mkv"), np.repeat(
        counts()[..., None], 3, -1), "gbrp16le", "rgb48le"),
    "temperatures.tif": lambda folder: write_images(folder, 290 + 20 * textures(), ".tif"),
    "temperatures around 0.tif": lambda folder: write_images(folder, 20 * textures() - 10, ".tif"),
}


@pytest.mark.parametrize("name", list(CLIPS))
def test_the_levels_of_a_narrow_range_are_kept_and_that_is_said(name, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    clip = CLIPS[name](tmp_path / "clip")
    sequence = extract_frames(str(clip), tmp_path / "seq")
    frames = sequence.frames()
    assert np.array_equal(frames[..., 0], frames[..., 1])
    assert len(np.unique(frames[0])) > 150
    assert np.abs(frames[..., 0] - 255 * textures()).max() < 14  # percentiles are inside of the extremes
    said = [record.message for record in caplog.records if "is shown as black" in record.message]
    assert len(said) == 1 and str(clip) in said[0] and "--value_range" in said[0]
    recorded = json.loads((tmp_path / "seq" / "values.json").read_text())
    assert f"{recorded['low']:.6g} is shown as black, {recorded['high']:.6g} as white" in said[0]
    assert not recorded["curve"] and not recorded["whole"]
    extract_frames(str(clip), tmp_path / "seq")  # the same frames again


def test_the_range_is_the_same_for_all_frames(tmp_path):
    frames = counts()
    frames[2, 10:30, 10:30] = 33_000  # something hot
    sequence = extract_frames(str(write_images(tmp_path / "clip", frames, ".png")), tmp_path / "seq")
    seen = sequence.frames()[..., 0]
    assert (seen[2, 10:30, 10:30] == 255).all()
    assert abs(seen[1, :, :-1].astype(int) - seen[2, :, 1:])[31:].max() == 0  # the texture moves by a pixel


@pytest.mark.parametrize("name", ["gray.png", "color.tif", "video of 16 bits"])
def test_a_range_can_be_fixed(name, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    clip = CLIPS[name](tmp_path / "clip")
    main(["--video", str(clip), "--data_dir", str(tmp_path / "seq"), "--pairs", "window:1", "--value_range", "29000",
          "32000"])
    expected = np.rint((counts().astype(np.float32) - 29_000) / 3_000 * 255)
    assert np.array_equal(open_sequence(tmp_path / "seq").frames()[..., 0], expected)
    assert "29000 is shown as black, 32000 as white" in caplog.text
    for wrong in (("3", "3"), ("5", "1"), ("nan", "1"), ("0", "inf")):
        with pytest.raises(UserError, match="--value_range"):
            main(["--video", str(clip), "--data_dir", str(tmp_path / "new"), "--value_range", *wrong])


def test_pixels_without_a_value_do_not_widen_the_range(tmp_path):
    frames = counts()
    frames[:, :8] = 0            # a border
    frames[:, 20, 20] = 65_535   # a dead pixel
    sequence = extract_frames(str(write_images(tmp_path / "clip", frames, ".png")), tmp_path / "seq")
    recorded = json.loads((tmp_path / "seq" / "values.json").read_text())
    assert 30_000 < recorded["low"] < 30_200 and 30_800 < recorded["high"] < 31_000
    assert len(np.unique(sequence.frames()[:, 8:])) > 150


@pytest.mark.parametrize("shape", [(T, H, W), (T, H, W, 3)])
@pytest.mark.parametrize("kind", ["png", "tif", "mkv"])
def test_of_a_clip_that_spans_the_range_the_upper_bits_are_used(shape, kind, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    frames = np.random.default_rng(0).integers(0, 65_536, shape).astype(np.uint16)
    if kind == "mkv":
        clip = write_ffv1(tmp_path / "clip.mkv", frames, "gray16le" if len(shape) == 3 else "gbrp16le",
                          "gray16le" if len(shape) == 3 else "rgb48le")
        expected = [frame.to_ndarray(format="rgb24") for frame in av.open(str(clip)).decode(video=0)]
    else:
        clip = write_images(tmp_path / "clip", frames if len(shape) == 3 else frames[..., ::-1], f".{kind}")
        expected = np.broadcast_to((frames >> 8).reshape(T, H, W, -1), (T, H, W, 3))
    assert np.array_equal(extract_frames(str(clip), tmp_path / "seq").frames(), expected)
    assert "the upper 8 bits are used" in caplog.text


def test_frames_of_8_bits_have_no_range(tmp_path):
    clip = write_images(tmp_path / "clip", (30 + 8 * textures()).astype(np.uint8), ".png")
    sequence = extract_frames(str(clip), tmp_path / "seq")
    assert len(np.unique(sequence.frames())) <= 9 and sequence.values is None
    assert not (tmp_path / "seq" / "values.json").exists()
    with pytest.raises(UserError, match="--value_range is for frames of more than 8 bits"):
        main(["--video", str(clip), "--data_dir", str(tmp_path / "new"), "--value_range", "0", "9"])
    with pytest.raises(UserError, match="--value_range is for frames of more than 8 bits"):
        main(["--data_dir", str(tmp_path / "seq"), "--value_range", "0", "9"])


def test_video_in_yuv_of_10_bits_is_mapped_as_before(tmp_path):
    frames = (255 * textures()).astype(np.uint8)
    clip = write_ffv1(tmp_path / "clip.mkv", np.repeat(frames[..., None], 3, -1), "yuv444p10le", "rgb24")
    expected = [frame.to_ndarray(format="rgb24") for frame in av.open(str(clip)).decode(video=0)]
    assert np.array_equal(list(read_video(clip)), expected)
    assert np.abs(np.stack(expected)[..., 0].astype(int) - frames).max() <= 3


def test_16_bit_frames_that_are_in_color_already(tmp_path):
    write_images(tmp_path / "color", counts(), ".png")
    before = open_sequence(tmp_path)
    assert len(np.unique(before.frames()[0])) > 150
    assert np.array_equal(open_sequence(tmp_path, 2).frames(), before.frames()[:2])  # the range is that of all frames
    main(["--data_dir", str(tmp_path), "--pairs", "window:1"])
    assert (tmp_path / "values.json").is_file()
    after = open_sequence(tmp_path)
    assert np.array_equal(after.frames(), before.frames()) and after.hashes == before.hashes
    assert np.array_equal(after.frame(1), after.frames()[1])
    with pytest.raises(UserError, match=r"values\.json has another range than --value_range: delete it"):
        main(["--data_dir", str(tmp_path), "--value_range", "29000", "32000"])
    for damage in ("{", "{}", '{"low": 2, "high": 1, "curve": false, "whole": false}',
                   '{"low": 0, "high": "x", "curve": false, "whole": false}',
                   '{"low": 0, "high": 9, "curve": false, "whole": true}',
                   '{"low": NaN, "high": 9, "curve": 1, "whole": true}'):
        (tmp_path / "values.json").write_text(damage)
        with pytest.raises(UserError, match=r"values\.json is damaged"):
            open_sequence(tmp_path)


def test_a_benchmark_clip_of_16_bits_is_read_with_one_range(tmp_path):
    write_images(tmp_path / "color", counts(), ".png")
    truth = Annotations(np.zeros((1, T, 2), np.float32), np.zeros((1, T), bool), (H, W), None, None)
    save_annotations(tmp_path / "annotations.npz", truth)
    assert np.array_equal(read_folder(tmp_path).frames, open_sequence(tmp_path).frames())


def light() -> np.ndarray:
    """Linear light `(T, H, W, 3)` float32; the brightest is at about 4."""
    return np.stack([4 * textures(seed) ** 2 for seed in range(3)], axis=-1).astype(np.float32)


def shown(values: np.ndarray) -> np.ndarray:
    """The standard view of linear light: the 99th percentile of the clip, without zeros, is white; sRGB's curve."""
    white = np.percentile(values[values > 0], 99)
    return np.rint(255 * srgb((values / white).clip(0, 1)))


def exr_of_ffmpeg(path: Path, frame: np.ndarray, pixel_format: str, **options) -> None:
    context = av.CodecContext.create("exr", "w")
    context.height, context.width, context.pix_fmt = *frame.shape[:2], pixel_format
    context.time_base = Fraction(1, 25)
    context.options = options
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=pixel_format)
    path.write_bytes(b"".join(bytes(packet) for packet in context.encode(picture) + context.encode(None)))


def rgb_channels(frame: np.ndarray, prefix: str = "") -> dict[str, np.ndarray]:
    return {f"{prefix}{name}": np.ascontiguousarray(frame[..., k]) for k, name in enumerate("RGB")}


FLOATS = {  # file name -> writer of a frame (H, W, 3)
    "float.exr": lambda path, x: write_exr(path, rgb_channels(x)),
    "half.exr": lambda path, x: write_exr(path, rgb_channels(x.astype(np.float16))),
    "alpha.exr": lambda path, x: write_exr(path, rgb_channels(x) | {"A": np.ones((H, W), np.float32)}),
    "depth.exr": lambda path, x: write_exr(path, rgb_channels(x) | {"Z": np.full((H, W), 9, np.float32)}),
    "layer.exr": lambda path, x: write_exr(path, rgb_channels(x, "beauty.") | {"Z": np.ones((H, W), np.float32)}),
    "zip.exr": lambda path, x: exr_of_ffmpeg(path, x, "gbrpf32le", compression="zip16"),
    "zip half.exr": lambda path, x: exr_of_ffmpeg(path, x, "gbrpf32le", compression="zip1", format="half"),
    "rle.exr": lambda path, x: exr_of_ffmpeg(path, x, "gbrpf32le", compression="rle"),
    "float.tif": lambda path, x: cv2.imwrite(str(path), x[..., ::-1]),
    "double.tif": lambda path, x: cv2.imwrite(str(path), x[..., ::-1].astype(np.float64)),
}


@pytest.mark.parametrize("name", list(FLOATS))
def test_linear_light_is_exposed_by_percentile_and_shown_through_srgb(name, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = tmp_path / "clip"
    folder.mkdir()
    for t, frame in enumerate(light()):
        FLOATS[name](folder / f"{t}{Path(name).suffix}", frame)
    frames = extract_frames(str(folder), tmp_path / "seq").frames()
    difference = np.abs(frames - shown(light()))
    assert np.percentile(difference, 99) <= 1 and difference.max() <= (3 if "half" in name else 1)
    assert "as white, through sRGB's curve" in caplog.text
    assert json.loads((tmp_path / "seq" / "values.json").read_text())["curve"]


def test_gray_light_and_files_without_values_are_read(tmp_path):
    gray = np.ascontiguousarray(light()[..., 0])
    (tmp_path / "exr").mkdir()
    for t in range(T):
        write_exr(tmp_path / "exr" / f"{t}.exr", {"Y": gray[t]})
    write_images(tmp_path / "tif", gray, ".tif")
    for kind in ("exr", "tif"):
        frames = np.stack(list(read_video(tmp_path / kind)))
        assert np.abs(frames - shown(gray)[..., None]).max() <= 1
    broken = gray[0].copy()
    broken[:4] = np.nan
    broken[4:6] = np.inf
    write_exr(tmp_path / "broken.exr", {"Y": broken})
    image = read_image(tmp_path / "broken.exr")[..., 0]
    assert (image[:4] == 0).all() and (image[4:6] == 255).all() and len(np.unique(image[6:])) > 100


def test_the_picture_of_an_exr_file_is_its_display_window(tmp_path):
    frame = light()[0]
    write_exr(tmp_path / "cropped.exr", rgb_channels(frame), (10, 5), (H + 20, W + 30))
    values = read_values(tmp_path / "cropped.exr")
    assert values.shape == (H + 20, W + 30, 3)
    assert np.array_equal(values[5: 5 + H, 10: 10 + W], frame) and values.sum(dtype=float) == frame.sum(dtype=float)
    write_exr(tmp_path / "overscan.exr", rgb_channels(frame), (-10, -5), (H - 10, W - 20))
    assert np.array_equal(read_values(tmp_path / "overscan.exr"), frame[5:-5, 10:-10])


def test_what_no_reader_knows_is_one_line(tmp_path):
    write_exr(tmp_path / "depth only.exr", {"Z": np.ones((H, W), np.float32)})
    write_exr(tmp_path / "cut.exr", rgb_channels(light()[0]))
    (tmp_path / "cut.exr").write_bytes((tmp_path / "cut.exr").read_bytes()[:300])
    (tmp_path / "start.exr").write_bytes(b"v/1\x01rest")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=f"{path.name} cannot be read as an image"):
            read_image(path)


def test_large_files_are_refused_before_they_are_decoded(tmp_path):
    write_exr(tmp_path / "a.exr", rgb_channels(light()[0]))
    data = (tmp_path / "a.exr").read_bytes()
    window = struct.pack("<4i", 0, 0, W - 1, H - 1)
    assert data.count(window) == 2
    large = struct.pack("<4i", 0, 0, (1 << 20) - 1, (1 << 20) - 1)
    (tmp_path / "a.exr").write_bytes(data.replace(window, large))
    (tmp_path / "b.exr").write_bytes(data.replace(window, large, 1))  # only the data window
    cv2.imwrite(str(tmp_path / "c.tif"), light()[0])
    cv2.imwrite(str(tmp_path / "d.png"), np.zeros((H, W, 3), np.uint16))
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match=f"{path.name} is .*more than --max_pixels 1000"):
            find_range([path], 1000)
        with pytest.raises(UserError, match="more than --max_pixels 1000"):
            read_mask(path, (H, W), 1000)


@pytest.mark.parametrize("name", ["rgb 16.png", "rgba 16.png", "labels 16.tif", "matte.exr", "gray.exr", "float.tif"])
def test_masks_of_more_bits_have_their_object(name, tmp_path):
    mask = np.zeros((H, W), bool)
    mask[10:30, 20:50] = True
    path = tmp_path / name
    photo = np.random.default_rng(0).integers(0, 65_536, (H, W, 3)).astype(np.uint16)
    if name == "rgb 16.png":
        cv2.imwrite(str(path), np.repeat(mask[..., None], 3, -1).astype(np.uint16))
    elif name == "rgba 16.png":
        cv2.imwrite(str(path), np.dstack([photo, mask * np.uint16(65_535)]))
    elif name == "labels 16.tif":
        cv2.imwrite(str(path), np.dstack([mask * np.uint16(700), mask * np.uint16(3), photo[..., 0] * 0]))
    elif name == "matte.exr":
        write_exr(path, rgb_channels(light()[0]) | {"A": mask.astype(np.float32)})
    elif name == "gray.exr":
        write_exr(path, {"Y": mask.astype(np.float16)})
    else:
        cv2.imwrite(str(path), np.repeat(mask[..., None], 3, -1).astype(np.float32) * 0.7)
    assert np.array_equal(read_mask(path, (H, W)), mask)


def test_an_orientation_tag_is_applied_to_16_bit_color(tmp_path):
    values = np.random.default_rng(0).integers(30_000, 31_000, (H, W, 3)).astype(np.uint16)
    picture = Image.fromarray((values >> 8).astype(np.uint8))
    for turn in range(1, 9):
        cv2.imwrite(str(tmp_path / "a.tif"), values[..., ::-1], [cv2.IMWRITE_TIFF_COMPRESSION, 1])
        data = bytearray((tmp_path / "a.tif").read_bytes())
        (at,) = struct.unpack_from("<I", data, 4)
        tags = {struct.unpack_from("<H", data, at + 2 + 12 * k)[0]: at + 2 + 12 * k
                for k in range(struct.unpack_from("<H", data, at)[0])}
        spare = next(tag for tag in (274, 284, 305) if tag in tags)  # replaced by the orientation
        struct.pack_into("<HHIHH", data, tags[spare], 274, 3, 1, turn, 0)
        (tmp_path / "a.tif").write_bytes(data)
        exif = Image.Exif()
        exif[274] = turn
        picture.save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(read_values(tmp_path / "a.tif") >> 8, read_image(tmp_path / "a.png")), turn


def test_flow_of_a_pair_of_16_bit_images(tmp_path):
    write_images(tmp_path / "clip", counts(), ".png")
    for suffix, frames in ((".png", counts()), (".tif", 290 + 20 * textures())):
        write_images(tmp_path / suffix[1:], frames, suffix)
        a, b = (str(tmp_path / suffix[1:] / f"{t}{suffix}") for t in range(2))
        main(["flow", a, b, "--out", str(tmp_path / "flow.npy")])
        assert np.abs(np.median(np.load(tmp_path / "flow.npy")[8:-8, 8:-8], axis=(0, 1)) - (1, 0)).max() < 0.1


def test_ranges_of_constant_empty_and_fixed_clips():
    assert clip_range([]) == clip_range([np.zeros(9, np.uint16)[:0]])
    assert clip_range([np.full(9, 700, np.uint16)]) == ValueRange(700, 701)
    assert clip_range([np.full(9, 3.0, np.float32)]).high > clip_range([np.full(9, 3.0, np.float32)]).low
    assert clip_range([np.ones(3, np.float32)], (0, 2)) == ValueRange(0, 2, True)
    assert clip_range([np.ones(3, np.float32)], (290, 310)) == ValueRange(290, 310)
    assert clip_range([np.ones(3, np.uint16)], (0, 2)) == ValueRange(0, 2)
    assert not (sample(np.array([[0, 1], [2, 0]])) == 0).any()
    assert ValueRange(0, 1023, whole=True).to_bytes(np.array([[0, 3, 4, 1023, 2000]]))[0, :, 0].tolist() == [
        0, 0, 1, 255, 255]


@pytest.mark.parametrize("bits", [10, 16])
def test_one_percent_of_outliers_does_not_decide_the_range(bits):
    """But it does if the others are noise in one level of 8 bits."""
    rng = np.random.default_rng(0)
    top = 2**bits - 1
    for share, expected in ((0.06, True), (0.5, False), (0.002, False)):
        values = rng.integers(1, int(share * top) + 2, 20_000).astype(np.uint16)
        values[:200] = top
        found = clip_range([values], bits=bits)
        assert found.whole != expected
        assert not expected or (found.low < 0.01 * top and 0.05 * top < found.high < 0.07 * top)


def test_the_line_about_16_bits_names_the_option_that_changes_them():
    assert "--value_range A B" in str(clip_range([np.array([0, 65535])]))
