"""Foreground masks: one rule for --foreground_mask_path and mask/, for all kinds of image files."""

import logging

import cv2
import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from configs.options import parse
from drawing.run_views import Views
from loaders.images import read_mask
from loaders.masks import resize_nearest
from loaders.sequence import open_sequence

H, W, T = 96, 128, 4
DAVIS = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128]


@pytest.fixture(scope="module")
def two():
    """Labels of two objects `(H, W)`: an ellipse and a rectangle."""
    y, x = np.mgrid[:H, :W]
    out = np.zeros((H, W), np.uint8)
    out[((x - 40) / 25) ** 2 + ((y - 50) / 18) ** 2 < 1] = 1
    out[20:50, 80:110] = 2
    return out


def palette(labels, colors=DAVIS):
    image = Image.fromarray(labels.astype(np.uint8), "P")
    image.putpalette(colors)
    return image


def noisy(mask, seed=0):
    """Levels 0 to 6 and 250 to 255, as a JPEG has them."""
    rng = np.random.default_rng(seed)
    return np.where(mask, rng.integers(250, 256, mask.shape), rng.integers(0, 7, mask.shape)).astype(np.uint8)


def soft(mask, high, dtype=np.uint8):
    """A mask with soft edges; half of `high` is at the edge."""
    return np.rint(cv2.GaussianBlur(mask.astype(np.float64), (0, 0), 2) * high).astype(dtype)


def rgba(mask):
    photo = np.random.default_rng(0).integers(0, 256, (H, W, 3))
    return Image.fromarray(np.dstack([photo, mask * 255]).astype(np.uint8))


def key_color(mask):
    """An RGB image without alpha channel; PNG's tRNS makes one color transparent."""
    image = Image.fromarray(np.where(mask[..., None], [200, 30, 40], [1, 2, 3]).astype(np.uint8))
    image.info["transparency"] = (1, 2, 3)
    return image


KINDS = {  # name: image from the mask (H, W) bool and the labels (H, W), of the same pixels above 0
    "palette.png": lambda m, n: palette(n),
    "palette of one object.png": lambda m, n: palette(m),
    "palette.tif": lambda m, n: palette(n),
    "palette.bmp": lambda m, n: palette(n),
    "gray palette.png": lambda m, n: palette(m, [0, 0, 0, 255, 255, 255]),
    "black palette and white.png": lambda m, n: palette(~m, [255, 255, 255, 0, 0, 0]),
    "labels without palette.png": lambda m, n: Image.fromarray(n),
    "zero and one.png": lambda m, n: Image.fromarray(m.astype(np.uint8)),
    "zero and 255.png": lambda m, n: Image.fromarray(m.astype(np.uint8) * 255),
    "zero and 200.bmp": lambda m, n: Image.fromarray(m.astype(np.uint8) * 200),
    "20 and 200.png": lambda m, n: Image.fromarray(np.where(m, 200, 20).astype(np.uint8)),
    "one bit.png": lambda m, n: Image.fromarray(m),
    "one bit.tif": lambda m, n: Image.fromarray(m),
    "ids.png": lambda m, n: Image.fromarray(n.astype(np.uint16)),
    "ids of classes.png": lambda m, n: Image.fromarray(np.array([0, 1001, 2003], np.uint16)[n]),
    "100 and 200.png": lambda m, n: Image.fromarray(np.array([0, 100, 200], np.uint8)[n]),
    "16 bits, 30,000 and 60,000.png": lambda m, n: Image.fromarray(np.array([0, 30_000, 60_000], np.uint16)[n]),
    "ids.tif": lambda m, n: Image.fromarray(n.astype(np.int32)),
    "16 bits, 0 and 1.png": lambda m, n: Image.fromarray(m.astype(np.uint16)),
    "16 bits.png": lambda m, n: Image.fromarray(m.astype(np.uint16) * 65535),
    "16 bits.tif": lambda m, n: Image.fromarray(m.astype(np.uint16) * 65535),
    "16 bits, soft.png": lambda m, n: Image.fromarray(soft(m, 65535, np.uint16)),
    "16 bits, soft, to 4095.png": lambda m, n: Image.fromarray(soft(m, 4095, np.uint16)),
    "16 bits, soft, to 255.png": lambda m, n: Image.fromarray(soft(m, 255, np.uint16)),
    "16 bits, noisy.png": lambda m, n: Image.fromarray(noisy(m).astype(np.uint16) * 257),
    "soft.png": lambda m, n: Image.fromarray(soft(m, 255)),
    "soft and dim.png": lambda m, n: Image.fromarray(soft(m, 100)),
    "noisy.png": lambda m, n: Image.fromarray(noisy(m)),
    "gray.jpg": lambda m, n: Image.fromarray(m.astype(np.uint8) * 255),
    "colors.jpg": lambda m, n: Image.fromarray(np.repeat(m[..., None], 3, 2).astype(np.uint8) * 255),
    "soft.webp": lambda m, n: Image.fromarray(soft(m, 255)),
    "colors.png": lambda m, n: Image.fromarray(np.repeat(m[..., None], 3, 2).astype(np.uint8) * 255),
    "colors of labels.png": lambda m, n: palette(n, [0, 0, 0, 128, 0, 0, 0, 0, 64]).convert("RGB"),
    "rgba.png": lambda m, n: rgba(m),
    "rgba, half transparent.png": lambda m, n: Image.fromarray(np.dstack([noisy(m)] * 3 + [m * np.uint8(100)])),
    "rgba, soft.png": lambda m, n: Image.fromarray(np.dstack([noisy(m)] * 3 + [soft(m, 255)])),
    "rgba, opaque.png": lambda m, n: Image.fromarray(np.dstack([noisy(m)] * 3 + [np.full((H, W), 255, np.uint8)])),
    "gray and alpha.png": lambda m, n: Image.fromarray(np.dstack([noisy(~m), m * np.uint8(255)]), "LA"),
    "rgba.webp": lambda m, n: rgba(m),
    "rgba.tif": lambda m, n: rgba(m),
    "key color.png": lambda m, n: key_color(m),
    "float, soft.tif": lambda m, n: Image.fromarray(cv2.GaussianBlur(m.astype(np.float32), (0, 0), 2)),
    "float labels.tif": lambda m, n: Image.fromarray(n.astype(np.float32)),
}


def save(image, path):
    """Save without loss of alpha; the transparent color of an RGB image is written, too."""
    options = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    image.save(path, **options, **({"lossless": True} if path.suffix == ".webp" and image.mode == "RGBA" else {}))


def frames(folder, count=T, size=(H, W)):
    (folder / "color").mkdir(parents=True)
    for t in range(count):
        noise = np.random.default_rng(t).integers(0, 255, (*size, 3), np.uint8)
        cv2.imwrite(str(folder / "color" / f"{t:05d}.png"), noise)


@pytest.mark.parametrize("name", list(KINDS))
def test_every_kind_of_mask_has_its_object_from_both_readers(name, two, tmp_path):
    frames(tmp_path, 2)
    (tmp_path / "mask").mkdir()
    path = tmp_path / name
    save(KINDS[name](two > 0, two), path)
    for t in range(2):
        (tmp_path / "mask" / f"{t}{path.suffix}").write_bytes(path.read_bytes())
    found = read_mask(path, (H, W))
    wrong = (found != (two > 0)).sum()
    assert found.dtype == bool and wrong <= (30 if "jpg" in name or "webp" in name or "soft" in name else 0), wrong
    assert np.array_equal(open_sequence(tmp_path).masks(), [found] * 2)


EMPTY = [name for name in KINDS if name not in ("20 and 200.png", "rgba, opaque.png")]


@pytest.mark.parametrize("name", EMPTY)
def test_a_mask_without_object_is_empty(name, two, tmp_path):
    nothing = np.zeros((H, W), bool)
    save(KINDS[name](nothing, nothing.astype(np.uint8)), tmp_path / name)
    assert not read_mask(tmp_path / name, (H, W)).any()


@pytest.mark.parametrize("name", ["zero and one.png", "palette.png", "ids.png", "16 bits.png", "gray.jpg", "rgba.png"])
def test_an_object_may_fill_the_frame(name, tmp_path):
    labels = np.ones((H, W), np.uint8)
    image = KINDS[name](labels > 0, labels)
    if name == "rgba.png":
        image = Image.fromarray(np.full((H, W, 4), 255, np.uint8))
    save(image, tmp_path / name)
    assert read_mask(tmp_path / name, (H, W)).all()


def test_noise_is_no_object_and_said(tmp_path, caplog):
    for name in ("dark.jpg", "dark.png"):
        Image.fromarray(noisy(np.zeros((H, W), bool))).save(tmp_path / name)
        assert not read_mask(tmp_path / name, (H, W)).any()
        assert f"{name}: its values reach" in caplog.text
        caplog.clear()


def test_thin_and_scattered_objects_of_a_binary_mask_stay(tmp_path):
    dots = np.random.default_rng(0).random((H, W)) < 0.02
    for value in (1, 3, 255):
        Image.fromarray(dots.astype(np.uint8) * value).save(tmp_path / "dots.png")
        assert np.array_equal(read_mask(tmp_path / "dots.png", (H, W)), dots)


@pytest.mark.parametrize("name", ["palette.png", "labels without palette.png", "ids.png", "ids.tif"])
def test_one_label_can_be_chosen(name, two, tmp_path):
    path = tmp_path / name
    save(KINDS[name](two > 0, two), path)
    for label in (1, 2):
        assert np.array_equal(read_mask(path, (H, W), label=label), two == label)
    with pytest.raises(UserError, match=f"{name} has no label 3: choose --mask_label among 1, 2"):
        read_mask(path, (H, W), label=3)
    save(KINDS["rgba.png"](two > 0, two), tmp_path / "rgba.png")
    with pytest.raises(UserError, match="has colors and no labels"):
        read_mask(tmp_path / "rgba.png", (H, W), label=1)


def test_a_label_may_be_missing_in_some_frames(two, tmp_path):
    frames(tmp_path)
    (tmp_path / "mask").mkdir()
    for t in range(T):
        palette(np.where(two == 2, 2 * (t > 1), two)).save(tmp_path / "mask" / f"{t}.png")
    sequence = open_sequence(tmp_path)
    assert sequence.masks(2).sum(axis=(1, 2)).tolist() == [0, 0, 900, 900]
    with pytest.raises(UserError, match="no label 7"):
        sequence.masks(7)


@pytest.mark.parametrize("factor", [0.5, 2, 1.3])
def test_masks_of_another_size_are_resized_and_that_is_said_once(factor, two, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    frames(tmp_path)
    (tmp_path / "mask").mkdir()
    size = (round(W * factor), round(H * factor))
    for t in range(T):
        palette(cv2.resize(two, size, interpolation=cv2.INTER_NEAREST_EXACT)).save(tmp_path / "mask" / f"{t}.png")
    found = open_sequence(tmp_path).masks()
    said = f"4 masks of {size[0]}x{size[1]}, resized to the frames' {W}x{H}"
    assert caplog.text.count(said) == 1 and len(caplog.records) == 1
    assert (found != (two > 0)).mean() < 0.01 and found.shape == (T, H, W)
    caplog.clear()
    read_mask(tmp_path / "mask" / "0.png", (H, W))
    assert f"0.png: mask of {size[0]}x{size[1]}, resized" in caplog.text


def test_nearest_neighbor_takes_the_value_at_the_pixels_center():
    mask = np.array([[1, 0], [0, 1]], bool)
    assert np.array_equal(resize_nearest(mask, (4, 6)), np.kron(mask, np.ones((2, 3), bool)))
    assert np.array_equal(resize_nearest(np.arange(9).reshape(3, 3), (1, 1)), [[4]])
    assert np.array_equal(resize_nearest(np.arange(10)[None], (1, 5)), [[1, 3, 5, 7, 9]])


def test_one_mask_of_the_query_frame_is_enough(two, tmp_path):
    frames(tmp_path)
    folder = tmp_path / "mask"
    folder.mkdir()
    sequence = open_sequence(tmp_path)
    assert sequence.mask(2) is None and sequence.masks() is None
    palette(two).save(folder / "object.png")
    assert np.array_equal(sequence.mask(2), two > 0)
    with pytest.raises(UserError, match="1 masks for 4 frames"):
        sequence.masks()
    (folder / "object.png").rename(folder / "00002.png")
    assert np.array_equal(sequence.mask(2, 1), two == 1)
    with pytest.raises(UserError, match=r"no mask of frame 1: give one a frame, or one named 00001.png"):
        sequence.mask(1)
    palette(two == 2).save(folder / "00001.png")
    assert np.array_equal(sequence.mask(1), two == 2) and np.array_equal(sequence.mask(2), two > 0)


def views_of(folder, *arguments):
    """The views of a run without its model."""
    out = Views.__new__(Views)
    out.options = parse("viz", ["--data_dir", str(folder), "--grid_interval", "2", *map(str, arguments)])
    out.sequence = open_sequence(folder)
    out.size = out.sequence.size
    out.query_frame = out.options.query_frame_id
    return out


def test_the_drawn_points_are_those_of_the_mask(two, tmp_path):
    frames(tmp_path)
    (tmp_path / "mask").mkdir()
    palette(two).save(tmp_path / "davis.png")
    palette(two).save(tmp_path / "mask" / "object.png")
    palette(two * 0).save(tmp_path / "empty.png")
    everywhere = views_of(tmp_path).points.astype(int)
    for options in (["--foreground_mask_path", tmp_path / "davis.png"], ["--use_mask", "--query_frame_id", 3]):
        for more, expected in (([], two > 0), (["--mask_label", 2], two == 2)):
            points = views_of(tmp_path, *options, *more).points.astype(int)
            assert expected[points[:, 1], points[:, 0]].all()
            assert len(points) == expected[everywhere[:, 1], everywhere[:, 0]].sum() > 0
    with pytest.raises(UserError, match=r"empty\.png has no object: give another mask"):
        views_of(tmp_path, "--foreground_mask_path", tmp_path / "empty.png").grid(2)


def test_an_unknown_region_is_half_of_white_and_no_object(two, tmp_path):
    Image.fromarray(np.array([0, 127, 255], np.uint8)[two]).save(tmp_path / "trimap.png")
    assert np.array_equal(read_mask(tmp_path / "trimap.png", (H, W)), two == 2)


def test_labels_beyond_the_palette_are_labels(two, tmp_path):
    palette(two, [0, 0, 0]).save(tmp_path / "short.png")
    assert np.array_equal(read_mask(tmp_path / "short.png", (H, W)), two > 0)
