"""ALIKED and XFeat as appearance features: kornia's networks with random weights, and with the authors' if present."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import cv2
import kornia
import numpy as np
import pytest
import torch

from common.errors import UserError
from common.geometry import pixel_grid, similarity
from loaders.correspondences import open_correspondences
from loaders.sequence import open_sequence
from preprocessing import pretrained
from preprocessing.cli import main
from preprocessing.features import FEATURE_EXTRACTORS
from preprocessing.flow import ModelOptions
from third_party.kornia_features import AlikedFeatures, XFeatFeatures

KINDS = {"aliked": AlikedFeatures, "xfeat": XFeatFeatures}
FILES = {"aliked": "aliked-n16.pth", "xfeat": "xfeat.pt"}
CHANNELS = {"aliked": 128, "xfeat": 64}
kinds = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """A folder with random weights of both networks; ALIKED's file lacks the constant that the authors' file lacks."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    aliked = kornia.feature.ALIKED("aliked-n16").state_dict()
    del aliked["dkd.hw_grid"]
    torch.save(aliked, folder / FILES["aliked"])
    torch.save(kornia.feature.XFeatModel().state_dict(), folder / FILES["xfeat"])
    return folder


@pytest.fixture
def small(monkeypatch):
    """Smaller images for the networks, so that the tests are quick."""
    for extractor in KINDS.values():
        monkeypatch.setattr(extractor, "SIDE", 97)


def picture(size, seed=0):
    noise = np.random.default_rng(seed).uniform(0, 255, (*size, 3)).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def translated(size, shift, seed=0):
    """Two pictures: the point p of the first is at p - shift in the second."""
    big = picture((size[0] + shift[1], size[1] + shift[0]), seed)
    return big[:size[0], :size[1]].copy(), big[shift[1]:, shift[0]:].copy()


@kinds
def test_features_are_a_normalized_grid_with_four_pixels_between(kind, random_weights, small):
    extract = KINDS[kind](random_weights / FILES[kind])
    for size, grid in (((97, 129), (25, 33)), ((151, 77), (48, 25)), ((40, 60), (25, 37)), ((16, 800), (3, 98))):
        features = extract(picture(size))
        assert features.shape == (*grid, CHANNELS[kind]) and features.dtype == np.float16
        assert np.allclose(np.linalg.norm(features.astype(np.float32), axis=-1), 1, atol=2e-3)
    for value in (0, 255):
        assert np.isfinite(extract(np.full((40, 60, 3), value, np.uint8))).all()
    assert 0 < extract.chain_threshold < extract.threshold < 1


@kinds
def test_features_do_not_depend_on_threads(kind, random_weights, small):
    extract = KINDS[kind](random_weights / FILES[kind])
    images = [picture((97, 129), seed) for seed in range(4)]
    alone = [extract(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(extract, images))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


@kinds
def test_features_of_a_translated_image_translate(kind, random_weights, small):
    """The shift is a multiple of the networks' coarsest cells, so that features are nearly the same."""
    extract = KINDS[kind](random_weights / FILES[kind])
    a, b = (torch.from_numpy(extract(image)).float() for image in translated((97, 129), (32, 32)))
    a, b = (f - torch.cat([a.flatten(0, 1), b.flatten(0, 1)]).mean(0) for f in (a, b))  # random networks' have a mean
    p = pixel_grid((97, 129))[44:84, 44:100].reshape(-1, 2)
    right = similarity(a, b, p, p - 32, (97, 129)).mean()
    for wrong in ((0, 0), (32, 0), (0, 32), (24, 32), (32, 40), (-32, -32)):
        assert right > similarity(a, b, p, p - torch.tensor(wrong), (97, 129)).mean() + 0.1, (right, wrong)


@kinds
def test_features_at_grid_points_are_kornias_own_at_these_pixels(kind, random_weights, small):
    """Of an image that is not resized, away from the border; XFeat's own look-up is off by up to half a pixel."""
    extract = KINDS[kind](random_weights / FILES[kind])
    image = picture((97, 129))
    features = torch.from_numpy(extract(image)).float()
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    rows, columns = torch.meshgrid(torch.arange(5, 20), torch.arange(5, 28), indexing="ij")
    pixels = torch.stack([columns, rows], -1).reshape(-1, 2).float() * 4
    with torch.inference_mode():
        if kind == "aliked":
            where = pixels.double() / torch.tensor([128, 96]) * 2 - 1 + 1e-9
            found = extract.model.desc_head(extract.model.extract_dense_map(x)[0], [where])[0][0]
        else:
            cells = torch.nn.functional.normalize(
                extract.model(torch.nn.functional.pad(x, (16, 15, 16, 15), mode="replicate"))[0], dim=1)
            look_up = kornia.feature.xfeat.InterpolateSparse2d("bicubic")
            found = look_up(cells, pixels[None] + 16, *(n * 8 for n in cells.shape[2:]))[0]
    same = torch.cosine_similarity(found, features[rows, columns].reshape(len(pixels), -1), dim=-1)
    assert same.min() > (0.9999 if kind == "aliked" else 0.99)


@kinds
def test_the_authors_weights_tell_points_apart(kind, shared):
    """At the right place features are nearly the same; at the best other place and at random places they are not."""
    extract = FEATURE_EXTRACTORS[kind](ModelOptions(weights_dir=shared("weights"), offline=True))
    size = (192, 224)
    a, b = (torch.from_numpy(extract(image)).float() for image in translated(size, (13, 8)))
    p = pixel_grid(size)[40:180:4, 40:200:4].reshape(-1, 2)
    shifts = {(x, y): similarity(a, b, p, p - torch.tensor([x, y]), size).median().item()
              for x in range(3, 24, 2) for y in range(-2, 19, 2)}
    assert max(shifts, key=shifts.get) == (13, 8) and shifts[13, 8] > extract.threshold
    assert similarity(a, b, p, p.flip(0), size).median() < extract.chain_threshold


# Loading


@kinds
def test_missing_weights_are_downloaded_or_named(kind, tmp_path, monkeypatch):
    source = pretrained.WEIGHTS[FILES[kind]]
    monkeypatch.setitem(pretrained.WEIGHTS, FILES[kind], pretrained.WeightsFile(source.url, source.sha256))
    options = ModelOptions(weights_dir=tmp_path, offline=True)
    with pytest.raises(UserError, match=rf"--offline, and .*{FILES[kind]} does not exist: download https://github.com"):
        FEATURE_EXTRACTORS[kind](options)
    (tmp_path / "other").write_bytes(b"other")
    for url, words in (((tmp_path / "other").as_uri(), "wrong checksum"), ((tmp_path / "no").as_uri(), "by hand")):
        monkeypatch.setitem(pretrained.WEIGHTS, FILES[kind], pretrained.WeightsFile(url, source.sha256))
        with pytest.raises(UserError, match=words):
            FEATURE_EXTRACTORS[kind](ModelOptions(weights_dir=tmp_path))
    assert not (tmp_path / FILES[kind]).exists()


@kinds
def test_the_listed_checksum_is_that_of_the_authors_file(kind, shared, tmp_path, monkeypatch):
    path = shared("weights") / FILES[kind]
    source = pretrained.WeightsFile(path.as_uri(), pretrained.WEIGHTS[FILES[kind]].sha256)
    monkeypatch.setitem(pretrained.WEIGHTS, FILES[kind], source)
    assert pretrained.find_weights([FILES[kind]], tmp_path) == tmp_path / FILES[kind]


def test_weights_of_an_installed_package_are_used_if_they_are_the_listed_ones(tmp_path, monkeypatch):
    package = tmp_path / "site" / "weights_package"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('it is not imported')")
    (package / "weights" / "a.pt").write_bytes(b"a")
    monkeypatch.syspath_prepend(package.parent)
    right = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # SHA-256 of "a"
    for digest, found in ((right, package / "weights" / "a.pt"), ("0" * 64, None)):
        source = pretrained.WeightsFile((tmp_path / "no").as_uri(), digest, package="weights_package")
        monkeypatch.setitem(pretrained.WEIGHTS, "a.pt", source)
        if found:
            assert pretrained.find_weights(["a.pt"], tmp_path, offline=True) == found
        else:
            with pytest.raises(UserError, match="--offline"):
                pretrained.find_weights(["a.pt"], tmp_path, offline=True)


@kinds
def test_files_that_do_not_fit_are_one_line(kind, random_weights, tmp_path):
    other = {"aliked": "xfeat", "xfeat": "aliked"}[kind]
    state = torch.load(random_weights / FILES[kind])
    shorter = dict(list(state.items())[:-1])
    first = next(iter(state))
    for content in (torch.load(random_weights / FILES[other]), shorter, state | {first: torch.zeros(3)}, [1, 2]):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(UserError, match="download it again") as caught:
            KINDS[kind](tmp_path / "x.pth")
        assert "\n" not in str(caught.value)
    (tmp_path / "x.pth").write_bytes((random_weights / FILES[kind]).read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        KINDS[kind](tmp_path / "x.pth")


def test_kornia_without_the_network_is_one_line(random_weights, monkeypatch):
    monkeypatch.delattr(kornia.feature, "XFeatModel")
    with pytest.raises(UserError, match=r"has no XFeatModel: pip install"):
        XFeatFeatures(random_weights / FILES["xfeat"])


@kinds
def test_the_command_writes_what_the_features_depend_on(kind, random_weights, small, small_sequence, tmp_path):
    shutil.copytree(small_sequence / "color", tmp_path / "seq" / "color")
    main(["--data_dir", str(tmp_path / "seq"), "--features", kind, "--weights_dir", str(random_weights), "--offline",
          "--chain", "--pairs", "window:3", "--num_workers", "2"])
    method = open_correspondences(open_sequence(tmp_path / "seq")).meta["method"]
    assert method["features"] == kind and method["feature_weights"].startswith(FILES[kind])
    assert method["feature_th"] == KINDS[kind].threshold and method["feature_side"] == 97
