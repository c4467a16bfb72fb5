"""Hostile files: no code in them runs, no path leads out of its folder, and memory is limited by the file's size.

Each test makes the attack file. `Command` is what a pickle needs to run a shell command when it is read."""

import http.server
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.files import MAX_PIXELS, read_json
from configs.options import parse
from drawing.pack import GridTracks
from drawing.page import PageData, page_html
from evaluation.benchmark import prepare
from loaders.checkpoint import read_checkpoint
from loaders.correspondences import open_correspondences
from loaders.depth import load_depth
from loaders.images import read_image, read_levels
from loaders.npy import ArrayFile, map_npy, read_npy
from loaders.omnimotion_layout import OmniMotionFolder
from loaders.sequence import open_sequence
from loaders.tapvid import TapVideo, save_tapvid
from loaders.tapvid_pickle import read_pickle
from loaders.track_files import load_annotations, load_queries
from loaders.video import read_video, write_video
from preprocessing.cli import main as preprocessing
from preprocessing.pretrained import WeightsFile, _download
from third_party.raft_flow import load_raft
from training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]


class Command:
    """Unpickled by pickle itself, it makes the file `ran` in the working directory."""

    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    """Works in an empty folder, and fails the test if a command ran in it."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


def refused(read, path, *words):
    """`read(path)` ends with one line that names the file and has the words."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert Path(path).name in message and "\n" not in message, message
    assert all(word in message for word in words), message


def frames(folder, size=(24, 32), count=3):
    for t in range(count):
        folder.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.full((*size, 3), 40 * t, np.uint8)).save(folder / f"{t:05d}.png")


# Code in files


def test_the_attack_itself_works(tmp_path):
    pickle.loads(pickle.dumps(Command()))
    (tmp_path / "ran").unlink()


@pytest.mark.parametrize("load", [read_checkpoint, load_raft])
def test_a_command_in_weights(load):
    torch.save({"model": Command()}, "zip.pth")
    torch.save({"model": Command()}, "old.pth", _use_new_zipfile_serialization=False)
    Path("raw.pth").write_bytes(pickle.dumps({"model": Command()}))
    for name in ("zip.pth", "old.pth", "raw.pth"):
        refused(load, Path(name))


def test_published_files_are_read(shared):
    assert load_raft(shared("weights/raft-small.pth")).size == "small"
    assert read_checkpoint(shared("reference/omnimotion_000030.pth")).model["num_imgs"] == 6


def test_a_command_in_arrays():
    np.savez("a.npz", query_points=np.array([[Command(), 0, 0]], object))
    np.save("a.npy", np.array([Command()], object))
    refused(load_queries, "a.npz", "Python objects")
    refused(lambda path: read_npy(path, "."), "a.npy", "Python objects")
    Path("b.npy").write_bytes(pickle.dumps(Command()))
    refused(lambda path: map_npy(path, "."), "b.npy")


def test_a_command_in_a_tapvid_file():
    Path("a.pkl").write_bytes(pickle.dumps({"bear": {"video": Command()}}))
    refused(read_pickle, Path("a.pkl"), "refused", "system", "do not trust")


def objects_that_say_they_are_numbers() -> bytes:
    """An array of eight bytes that numpy would take for a Python object: a dtype `O` whose flags say that it is not."""
    dtype = b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8I00\nI01\ntR(I3\nX\x01\x00\x00\x00|NNNI-1\nI-1\nI0\ntb"
    array = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntX\x01\x00\x00\x00btR"
    return b"\x80\x02" + array + b"(I1\n(I1\nt" + dtype + b"I00\nC\x08AAAAAAAAtb."


@pytest.mark.parametrize("data", [
    objects_that_say_they_are_numbers(),
    b"\x80\x02]r\xff\xff\xff\xff.",                       # a list remembered as object 4294967295: 64 GB of room
    b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"Ns.",     # a key whose hash needs 200,000 calls within each other
    b"\x80\x02cnumpy\nndarray\n(I99999999999\ntR.",       # an array of whatever is in memory
    b"\x80\x02cbuiltins\nbytearray\n(I99999999999\ntR.",
    b"\x80\x02cnumpy\ndtype\n(X\x02\x00\x00\x00f4tR}X\x05\x00\x00\x00valueX\x01\x00\x00\x00xsb.",
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0f."])    # bytes of an exabyte
def test_pickles_that_need_no_command(data):
    Path("a.pkl").write_bytes(data)
    result = subprocess.run([sys.executable, "-c", "from pathlib import Path; from loaders.tapvid_pickle import *\n"
                             "try: print(read_pickle(Path('a.pkl')))\n"
                             "except UserError as error: print('refused', error)"],
                            env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("refused a.pkl") or result.stdout == "[]\n", result.stdout


def test_a_picture_that_is_a_program():
    Path("a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(touch ran) system\n")
    refused(read_image, Path("a.png"), "cannot be read as an image")


def test_cotrackers_code_runs_only_if_it_is_asked_for():
    frames(Path("clip/color"))
    with pytest.raises(UserError, match="runs the code of facebookresearch/co-tracker"):
        preprocessing(["--data_dir", "clip", "--flow", "cotracker", "--offline"])


# Names that lead out of the folder


def test_a_weights_archive_with_names_that_lead_out():
    with zipfile.ZipFile("models.zip", "w") as archive:
        archive.writestr("../../outside.pth", "evil")
        archive.writestr("../../raft-small.pth", "evil")
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/models.zip"
        with pytest.raises(UserError, match="has the wrong checksum"):
            _download(WeightsFile(url, "0" * 64, archive=True), Path("a/b/weights/raft-small.pth"))
        server.shutdown()
    assert {path.name for path in Path().rglob("*.pth")} == set()


def test_a_checkpoint_archive_with_names_that_lead_out_or_that_is_packed():
    torch.save({"fnet.conv1.weight": torch.zeros(9)}, "good.pth")
    for name, how in (("../../evil", zipfile.ZIP_STORED), ("good/packed", zipfile.ZIP_DEFLATED)):
        shutil.copy("good.pth", "evil.pth")
        with zipfile.ZipFile("evil.pth", "a", how) as archive:
            archive.writestr(name, b"\0" * 1_000_000)
        refused(load_raft, Path("evil.pth"), "archive")


def test_a_store_and_depths_whose_frames_have_names_that_lead_out(tmp_path):
    frames(tmp_path / "seq/color")
    sequence, away = open_sequence(tmp_path / "seq"), ["../../../a.png", "/etc/passwd", "00002.png"]
    (tmp_path / "seq/correspondences").mkdir()
    meta = tmp_path / "seq/correspondences/meta.json"
    meta.write_text(json.dumps({"format": 1, "size": [24, 32], "names": away, "hashes": sequence.hashes,
                                "method": {}}))
    refused(lambda path: open_correspondences(sequence), meta, "other frames")
    (tmp_path / "seq/depth").mkdir()
    (tmp_path / "seq/depth/meta.json").write_text(json.dumps({"hashes": dict.fromkeys(away, "0")}))
    refused(lambda path: load_depth(sequence), tmp_path / "seq/depth")
    (tmp_path / "seq/flow_stats.json").write_text(json.dumps({a: dict.fromkeys(away, 5) for a in away[:2]}))
    refused(lambda path: OmniMotionFolder(sequence), tmp_path / "seq/flow_stats.json", "no pair")


def test_benchmark_videos_whose_names_lead_out(tmp_path):
    annotations = np.zeros((1, 3, 2), np.float32)
    video = TapVideo(np.zeros((3, 24, 32, 3), np.uint8), load_truth(annotations))
    save_tapvid("a.pkl", dict.fromkeys(["../../../outside", "/etc/cron.d/x", "settings", "x" * 5000, ".."], video))
    options = parse("eval", ["--tapvid", "a.pkl", "--save_dir", "deep/er/out", "--tapvid_size", "0"])
    names, _, unreadable = prepare(options, Path("deep/er/out/root"), ("static",))
    assert len(names) == 5 and not unreadable and all(len(name) <= 100 and "/" not in name for name in names)
    assert "settings" not in names and {path.name for path in Path().iterdir()} == {"a.pkl", "deep"}
    assert {path.name for path in Path("deep/er/out/sequences/a").iterdir()} == set(names)


def load_truth(points):
    np.savez("truth.npz", points=points, occluded=np.zeros(points.shape[:2], bool), frame_size=np.array([24, 32]))
    out = load_annotations("truth.npz")
    Path("truth.npz").unlink()
    return out


def test_a_video_that_is_a_list_of_other_files(tmp_path):
    write_video(tmp_path / "secret.mp4", [np.zeros((32, 32, 3), np.uint8)] * 3)
    Path("a.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    Path("b.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n")
    for name in ("a.mp4", "b.mp4"):
        refused(lambda path: list(read_video(path)), name, "cannot be decoded")


# More than the file has


def png(width, height, mode=0):
    """A PNG that claims a size and has the data of one row of zeros."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(width + 1)))
            + chunk(b"IEND", b""))


def gif(width, height):
    """A GIF of one frame of that size with the data of one pixel."""
    return (b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + b","
            + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;")


def test_pictures_that_claim_more_pixels_than_the_limit():
    Path("a.png").write_bytes(png(60_000, 60_000))
    Path("a.gif").write_bytes(gif(65535, 65535))
    for read in (read_image, read_levels):
        refused(read, Path("a.png"), "--max_pixels")
    refused(lambda path: list(read_video(path)), "a.gif")  # FFmpeg's own bound, below this size
    Path("b.gif").write_bytes(gif(9000, 9000))
    refused(lambda path: list(read_video(path)), "b.gif", "9000x9000", "--max_pixels")
    assert 7680 * 4320 < MAX_PIXELS


def test_the_limit_is_the_users():
    frames(Path("clip/color"))
    assert open_sequence("clip", max_pixels=1000).size == (24, 32)
    frames(Path("large/color"), size=(40, 40))
    refused(lambda path: open_sequence(path, max_pixels=1000), "large", "40x40", "--max_pixels 1000")
    write_video("a.mp4", [np.zeros((40, 40, 3), np.uint8)] * 3)
    refused(lambda path: list(read_video(path, max_pixels=1000)), "a.mp4", "--max_pixels 1000")
    with pytest.raises(UserError, match="--max_pixels 1500"):
        Trainer(parse("train", ["--data_dir", "large", "--max_pixels", "1500"]))
    for command in (["--data_dir", "large"], ["--data_dir", "new", "--video", "a.mp4"],
                    ["convert", "--data_dir", "large", "--to", "store"],
                    ["flow", "large/color/00000.png", "large/color/00001.png", "--out", "flow.npy"]):
        with pytest.raises(UserError, match="--max_pixels 1500"):
            preprocessing([*command, "--max_pixels", "1500"])
    assert open_sequence("large", max_pixels=1600).size == (40, 40)
    assert len(list(read_video("a.mp4", max_pixels=1600))) == 3


def test_pillows_own_limit_is_one_line_without_a_warning(recwarn):
    for side in (10_000, 20_000):
        Path("a.png").write_bytes(png(side, side))
        refused(read_image, Path("a.png"), "--max_pixels")
    refused(lambda path: read_image(path, max_pixels=1 << 40), Path("a.png"), "Pillow")
    assert not [warning for warning in recwarn if issubclass(warning.category, Image.DecompressionBombWarning)]


def claiming(shape):
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)


@pytest.mark.parametrize("shape", ["(1000000, 1000000)", "(0, 99999999999999999999)", "(-1, -8)", "(8,) * 999"])
def test_arrays_that_claim_more_than_the_file_has(shape):
    Path("a.npy").write_bytes(claiming(shape))
    for read in (read_npy, map_npy):
        refused(lambda path, read=read: read(path, "."), "a.npy")
    with zipfile.ZipFile("a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("query_points.npy", claiming(shape))
    refused(load_queries, "a.npz")


def test_an_archive_that_decompresses_to_gigabytes():
    with zipfile.ZipFile("a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("query_points.npy", claiming("(536870000,)"))
    data = bytearray(Path("a.npz").read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24: at + 28] = struct.pack("<I", 0xFFFFFF00)  # the unpacked size that the archive claims
    Path("a.npz").write_bytes(data)
    refused(load_queries, "a.npz", "4.3 GB unpacked")
    assert "query_points" in ArrayFile("a.npz", ".")


def test_text_files_that_are_too_large(tmp_path):
    Path("meta.json").write_text("[" * 1_000_000)
    refused(lambda path: read_json(path, "."), "meta.json", "damaged")
    with open("huge.csv", "wb") as file:
        file.truncate(1 << 40)  # a terabyte of zeros that takes no room
    refused(load_queries, "huge.csv", "MiB")
    with open("huge.json", "wb") as file:
        file.truncate(300 << 20)
    refused(lambda path: read_json(path, "."), "huge.json", "damaged")


# The page


HOSTILE = ('</script><script>window.ran = 1</script><!--<script><img src=x onerror="window.ran = 1">'
           '"\'><svg onload=window.ran=1>%%meta%%\u2028')


def test_a_hostile_name_in_the_page_is_shown_and_not_run(tmp_path):
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    rng = np.random.default_rng(0)
    block = GridTracks(0, (2, 2), np.zeros((4, 3, 2), np.float32), np.ones((4, 3), bool),
                       rng.random((4, 3)).astype(np.float32), rng.random((4, 3)).astype(np.float32))
    data = PageData(HOSTILE, 10, np.zeros((3, 48, 64, 3), np.uint8), [0, 1, 2], [block], 32, 0.99,
                    rng.random((3, 8, 8)), rng.normal(size=(2, 8, 8, 2)), None, [HOSTILE])
    (tmp_path / "page.html").write_text(page_html(data), encoding="utf-8")
    html = page_html(data)
    injected = html.replace("<main>", "<main><img src=x onerror='window.ran = 1'><script>window.ran = 1</script>")
    (tmp_path / "injected.html").write_text(injected, encoding="utf-8")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name in ("page.html", "injected.html"):  # and if markup did get in, the page's policy would not run it
            page = browser.new_page()
            page.goto((tmp_path / name).as_uri())
            page.wait_for_timeout(300)
            assert page.evaluate("typeof window.ran") == "undefined"
            assert page.evaluate("meta.title") == HOSTILE  # the page's own script does run
            assert page.locator("h1").text_content() == HOSTILE and page.locator("h1 *").count() == 0
            assert HOSTILE in page.locator("#notes").text_content() and page.locator("#notes img").count() == 0
        browser.close()


def test_a_folder_of_the_hub_that_brings_code(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from third_party.hub import load_model

    folder, config = tmp_path / "evil", transformers.Dinov2Config(hidden_size=12, num_hidden_layers=1,
                                                                  num_attention_heads=2, image_size=28)
    transformers.Dinov2Model(config).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    (folder / "code.py").write_text("import os\nos.system('touch ran')\n")
    (folder / "config.json").write_text(json.dumps({**written, "model_type": "evil", "auto_map": {
        "AutoConfig": "code.Config", "AutoModel": "code.Model"}}))
    refused(lambda path: load_model("AutoModel", str(path), offline=True), folder)
    (folder / "config.json").write_text(json.dumps(written))
    (folder / "model.safetensors").unlink()
    torch.save({"embeddings.cls_token": Command()}, folder / "pytorch_model.bin")
    refused(lambda path: load_model("AutoModel", str(path), offline=True), folder)
