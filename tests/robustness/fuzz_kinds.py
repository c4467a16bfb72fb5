"""The kinds of files that this project reads: for each, a valid example, its reader, and generated content."""

import io
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from common.errors import UserError
from configs.options import parse
from evaluation.report import _record
from inference.load_run import run_options
from loaders.checkpoint import read_checkpoint
from loaders.clip_files import annotations_of_clip, queries_of_clip
from loaders.correspondences import open_correspondences
from loaders.depth import load_depth
from loaders.images import read_image, read_levels, read_mask
from loaders.omnimotion_layout import OmniMotionFolder
from loaders.predicted_tracks import load_tracks, read_tracks
from loaders.sequence import VideoSequence, open_sequence, save_values
from loaders.source_frames import SourceFrames, source_of, write_source
from loaders.tapvid import TapVideo, open_benchmark, save_tapvid
from loaders.track_files import (
    Annotations,
    PointTracks,
    load_annotations,
    load_queries,
    save_annotations,
    save_queries,
    save_tracks,
)
from loaders.video import read_video, write_gif, write_video
from models.factory import checkpoint_num_frames, model_from_checkpoint, new_model
from preprocessing.convert import to_omnimotion_layout
from preprocessing.correspondence_writer import StoreWriter
from tests.exr_files import write_exr

SIZE, FRAMES = (24, 32), 3  # pixels (H, W), number of frames
QUICK = "--num_samples_ray 4 --coupling_width 16 --affine_width 8 --affine_layers 2 --field_width 8".split()


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    make(folder) writes a valid file and the other files that its reader needs; read(path) calls the project's reader;
    `invented` generates file contents from nothing."""
    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]
    invented: st.SearchStrategy | None = None
    share: int = 4  # relative number of inputs


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A smooth RGB image `(H, W, 3)` uint8, which compresses like a photograph."""
    y, x = np.mgrid[: size[0], : size[1]]
    return np.stack([(x * 7 + seed * 20) % 256, (y * 9) % 256, (x + y + seed) % 256], -1).astype(np.uint8)


def image(suffix: str, **options) -> Callable[[Path], Path]:
    """A function that writes an image."""
    def make(folder: Path) -> Path:
        path = folder / f"image{suffix}"
        Image.fromarray(picture()).save(path, **options)
        return path
    return make


def deep_image(suffix: str, bits: str) -> Callable[[Path], Path]:
    """A function that writes a color image whose values have the data type `bits`."""
    def make(folder: Path) -> Path:
        path = folder / f"image{suffix}"
        values = picture().astype(bits)
        if suffix == ".exr":
            write_exr(path, {name: np.ascontiguousarray(values[..., k]) for k, name in enumerate("RGB")})
        else:
            cv2.imwrite(str(path), values)
        return path
    return make


def exr_zip(folder: Path) -> Path:
    """A compressed OpenEXR file."""
    encoder = av.CodecContext.create("exr", "w")
    encoder.height, encoder.width, encoder.pix_fmt = *SIZE, "gbrpf32le"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {"compression": "zip16"}
    frame = av.VideoFrame.from_ndarray(picture().astype(np.float32), format="gbrpf32le")
    path = folder / "image.exr"
    path.write_bytes(b"".join(bytes(packet) for packet in encoder.encode(frame) + encoder.encode(None)))
    return path


def read_deep(path: Path) -> None:
    """Read an image of more than 8 bits as a clip of one frame, and as a mask."""
    for _ in read_video(path.parent):
        pass
    read_mask(path, SIZE)


def deep_video(folder: Path) -> Path:
    """A lossless video of 16-bit counts."""
    path = folder / "video.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "gray16le"
        for t in range(FRAMES):
            values = 30_000 + picture(t)[..., 0].astype(np.uint16)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(values, format="gray16le")))
        container.mux(stream.encode())
    return path


def values_json(folder: Path) -> Path:
    """The range of the values of a sequence whose frames have 16 bits."""
    (folder / "color").mkdir()
    for t in range(FRAMES):
        values = 30_000 + picture(t)[..., 0].astype(np.uint16)
        Image.fromarray(values).save(folder / "color" / f"{t:05d}.png")
    save_values(folder, open_sequence(folder).values)
    return folder / "values.json"


def mask(folder: Path) -> Path:
    """An RGBA mask."""
    path = folder / "mask.png"
    Image.fromarray(np.dstack([picture(), picture()[..., 0]])).save(path)
    return path


def labels(folder: Path) -> Path:
    """A mask with a palette, as DAVIS has them."""
    path = folder / "labels.png"
    out = Image.fromarray(picture()[..., 0] // 100, "P")
    out.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    out.save(path)
    return path


def sequence_mask(folder: Path) -> Path:
    """The only mask of a sequence, with 16 bits."""
    sequence(folder)
    (folder / "mask").mkdir()
    path = folder / "mask" / "object.png"
    Image.fromarray((picture()[..., 0] // 100).astype(np.uint16)).save(path)
    return path


def count_map(folder: Path) -> Path:
    """A 16-bit count map."""
    path = folder / "counts.png"
    Image.fromarray(np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE)).save(path)
    return path


def video(suffix: str) -> Callable[[Path], Path]:
    """A function that writes a short video."""
    def make(folder: Path) -> Path:
        path = folder / f"video{suffix}"
        (write_gif if suffix == ".gif" else write_video)(path, [picture(t) for t in range(FRAMES)])
        return path
    return make


def sequence(folder: Path) -> VideoSequence:
    """A sequence folder with constant flows as correspondences."""
    (folder / "color").mkdir()
    for t in range(FRAMES):
        Image.fromarray(picture(t)).save(folder / "color" / f"{t:05d}.png")
    out = open_sequence(folder)
    writer, good = StoreWriter(out, {"flow": "by hand"}), np.ones(SIZE, bool)
    good[::3] = False
    for i in range(FRAMES):
        for j in range(FRAMES):
            if i != j:
                writer.write(i, j, np.full((*SIZE, 2), j - i, np.float32), good, ~good & False)
    writer.finish()
    return out


def store_file(name: str) -> Callable[[Path], Path]:
    """A function that writes correspondences and returns one of their files."""
    def make(folder: Path) -> Path:
        return sequence(folder).root / "correspondences" / name
    return make


def published_file(pattern: str) -> Callable[[Path], Path]:
    """A function that writes a sequence in OmniMotion's layout and returns the first file that matches `pattern`."""
    def make(folder: Path) -> Path:
        made = sequence(folder)
        to_omnimotion_layout(made, open_correspondences(made))
        return next(folder.glob(pattern))
    return make


def everything(store) -> None:
    """Read every pair and every count map of the correspondences."""
    for i, j in store.pairs.tolist():
        if store.counts[i, j]:
            store.dense(i, j)
    for i in range(store.num_frames):
        store.count_map(i)


def part(folder: Path) -> Path:
    """The file of one pair of unfinished correspondences."""
    made = sequence(folder)
    writer = StoreWriter(made, {"flow": "by hand"})
    writer.write(0, 1, np.ones((*SIZE, 2), np.float32), np.ones(SIZE, bool), np.zeros(SIZE, bool))
    return writer._part(0, 1)


def read_part(path: Path) -> None:
    """Read the pair as a resumed preprocessing does."""
    made = VideoSequence(path.parents[3], tuple(f"{t:05d}.png" for t in range(FRAMES)), SIZE)
    writer = StoreWriter(made, {"flow": "by hand"}, resume=True)
    if writer.has(0, 1):
        writer.dense(0, 1)


def depth_file(name: str) -> Callable[[Path], Path]:
    """A function that writes depth maps and returns one of their files."""
    def make(folder: Path) -> Path:
        made = sequence(folder)
        (folder / "depth").mkdir()
        for frame in made.names:
            np.save(folder / "depth" / frame.replace(".png", ".npy"), np.ones(SIZE, np.float16))
        hashes = dict(zip(made.names, made.hashes, strict=True))
        (folder / "depth" / "meta.json").write_text(json.dumps({"kind": "npz", "low": 0, "high": 1, "hashes": hashes}))
        return folder / "depth" / name
    return make


def truth() -> Annotations:
    """Annotations of four points."""
    points = np.arange(4 * FRAMES * 2, dtype=np.float32).reshape(4, FRAMES, 2) % 20
    occluded = np.zeros((4, FRAMES), bool)
    return Annotations(points, occluded, SIZE, np.zeros((4, 3), np.float32), ~occluded)


def annotations(folder: Path) -> Path:
    """annotations.npz"""
    save_annotations(folder / "annotations.npz", truth())
    return folder / "annotations.npz"


def tracks(folder: Path) -> Path:
    """An uncompressed tracks.npz."""
    path, t = folder / "tracks.npz", truth()
    save_tracks(path, PointTracks(t.points, ~t.occluded, np.zeros((4, 3), np.float32), SIZE))
    arrays = dict(np.load(path))
    np.savez(path, **arrays)
    return path


def other_tracks(suffix: str) -> Callable[[Path], Path]:
    """A function that writes tracks as CoTracker's users do."""
    def make(folder: Path) -> Path:
        path = folder / f"tracks{suffix}"
        points = truth().points.swapaxes(0, 1)[None]  # (1, T, N, 2)
        if suffix == ".npy":
            np.save(path, points)
        else:
            torch.save((torch.from_numpy(points), torch.ones(points.shape[:3], dtype=torch.bool)), path)
        return path
    return make


def queries(suffix: str) -> Callable[[Path], Path]:
    """A function that writes query points."""
    def make(folder: Path) -> Path:
        path = folder / f"queries{suffix}"
        if suffix == ".csv":
            path.write_text("t,y,x\n0,1.5,2\n2,20,30\n")
        else:
            save_queries(path, np.array([[0, 1.5, 2], [2, 20, 30]], np.float32), SIZE)
        return path
    return make


def source_file(folder: Path) -> Path:
    """video.json of a sequence."""
    made = sequence(folder)
    source = SourceFrames(SIZE, (48, 64), np.arange(1, 2 * FRAMES, 2), 25.0, "clip.mp4")
    write_source(folder, source, list(made.names), [0.1] * FRAMES, {"hash": "0"})
    return folder / "video.json"


def source_queries(suffix: str) -> Callable[[Path], Path]:
    """A function that writes query points of the source's frames."""
    def make(folder: Path) -> Path:
        path = folder / f"queries{suffix}"
        if suffix == ".csv":
            path.write_text("t,y,x\n1,1.5,2\n5,40,60\n")
        else:
            save_queries(path, np.array([[1, 1.5, 2], [5, 40, 60]], np.float32), (48, 64))
        return path
    return make


def read_of_clip(read: Callable) -> Callable[[Path], object]:
    """The reader `read` for frames that come from a larger source."""
    source = SourceFrames(SIZE, (48, 64), np.arange(1, 2 * FRAMES, 2), 25.0, "clip.mp4")
    return lambda path: read(path, source, "source")


def benchmark(layout: str) -> Callable[[Path], Path]:
    """A function that writes a TAP-Vid pickle of one video."""
    def make(folder: Path) -> Path:
        frames = np.stack([picture(t) for t in range(FRAMES)])
        save_tapvid(folder / "videos.pkl", {"bear": TapVideo(frames, truth())}, layout)
        return folder / "videos.pkl"
    return make


def read_benchmark(path: Path) -> None:
    """Read every video; names must be plain file names."""
    for name, read in open_benchmark(path):
        assert Path(name).name == name and not name.startswith("."), name
        read()


@cache
def model_options():
    """Options of a tiny model."""
    return parse("train", ["--data_dir", "x", "--device", "cpu", "--mlp_backend", "torch", *QUICK])


def checkpoint(folder: Path) -> Path:
    """A checkpoint in this project's format that holds only the model."""
    model, path = new_model(model_options(), FRAMES, SIZE, torch.device("cpu")), folder / "model_000001.pth"
    torch.save({"format": 1, "step": 1, "config": vars(model.config), "model": model.state_dict()}, path)
    return path


def open_checkpoint(path: Path) -> None:
    """Read the checkpoint and build its model, as eval.py does."""
    content = read_checkpoint(path)
    if checkpoint_num_frames(content, path) == FRAMES:
        model_from_checkpoint(content, SIZE, model_options(), torch.device("cpu"))


def raft_weights(folder: Path) -> Path:
    """Random weights of the small RAFT, in PyTorch's older file format, which RAFT's released weights use."""
    from third_party.raft import RAFT

    torch.save(RAFT("small").state_dict(), folder / "raft.pth", _use_new_zipfile_serialization=False)
    return folder / "raft.pth"


def read_raft(path: Path) -> object:
    """Build RAFT from the weights."""
    from third_party.raft_flow import load_raft

    return load_raft(path)


def config(folder: Path) -> Path:
    """A config file."""
    path = folder / "config.txt"
    path.write_text("# a preset\nnum_iters = 100\nlr_deform = 1e-4\nuse_mask = true\nquery_mode = first\n")
    return path


def read_config(path: Path) -> None:
    """Parse the config file as the scripts do. Exit code 2, for wrong options, becomes a UserError."""
    try:
        parse("train", ["--config", str(path)])
    except SystemExit as error:
        if error.code not in (0, 2):
            raise
        raise UserError(f"{path}: refused by the parser") from error


def args(folder: Path) -> Path:
    """The options file of a run."""
    path = folder / "x_y" / "args.txt"
    path.parent.mkdir()
    path.write_text("follow_flow = True\nnum_imgs = 60\nocclusion_th = 0.99\nexpname = x\nuse_max_loc = False\n")
    return path


def read_args(path: Path) -> None:
    """Take the options of the run as eval.py does. Exit code 2, for a wrong value, becomes a UserError."""
    try:
        parse("eval", ["--data_dir", "y", "--expname", "x", "--save_dir", str(path.parents[1])], run_options)
    except SystemExit as error:
        if error.code not in (0, 2):
            raise
        raise UserError(f"{path}: refused by the parser") from error


def result(folder: Path) -> Path:
    """The result file of one video of a benchmark."""
    (folder / "bear.json").write_text(json.dumps({
        "video": "bear", "num_queries": 3, "num_frames": 3, "metrics": {"average_jaccard": 0.5},
        "error_since_query": {"frames": [1], "median": [0.5]}, "seconds": {"train": 1.0}, "machine": "x"}))
    return folder / "bear.json"


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
                        ["format", "size", "names", "numbers", "frames", "frame_rate", "hashes", "method", "00000.png",
                         "00001.png", "metrics", "seconds", "../../x"]) | st.text(max_size=5), inner, max_size=6),
                    max_leaves=12)
JSON_BYTES = st.one_of(JSON.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40),
                       st.integers(1, 100_000).map(lambda depth: b"[" * depth), st.text(max_size=30).map(str.encode))
CELL = st.one_of(st.floats().map(str), st.integers().map(str), st.sampled_from(["nan", "-inf", "1e999", "=1+1", '"']),
                 st.text(max_size=4))
CSV_BYTES = st.lists(st.lists(CELL, min_size=1, max_size=4).map(",".join), max_size=6).map(
    lambda rows: "\n".join(["t,y,x", *rows]).encode("utf-8", "surrogatepass"))
OPTION_LINES = st.lists(st.tuples(st.sampled_from(["num_iters", "lr_deform", "query_mode", "config", "no_reload", "x"]),
                                  st.sampled_from([" = ", ":", " ", "==", "="]), CELL).map("".join), max_size=6)
TAKEN = st.sampled_from(["follow_flow", "num_imgs", "occlusion_th", "max_depth", "use_max_loc"])
ARGS_BYTES = st.lists(st.tuples(TAKEN, st.sampled_from([" = ", "=", " "]), CELL).map("".join), max_size=6).map(
    lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))
CONFIG_BYTES = st.one_of(OPTION_LINES.map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")),
                         st.binary(max_size=40))


def npy(dtype: str, shape: tuple, data: bytes) -> bytes:
    """The bytes of an .npy file with the given dtype and shape in its header, which `data` need not match."""
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def npz(arrays: dict[str, bytes]) -> bytes:
    """The bytes of an .npz file of such arrays."""
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


DTYPE = st.sampled_from(["<f4", "<f8", "|b1", "<i8", "<u2", "|O", "<U3", "|S0", "|V0", "<f2", "<c8", "<M8[s]", "x",
                         "<f16"])
SIDE = st.sampled_from([0, 1, 2, 3, 4, 24, 32, -1, 10**6, 10**12, 2**63 - 1, 2**64])
ARRAY = st.builds(npy, DTYPE, st.lists(SIDE, max_size=4).map(tuple), st.binary(max_size=96))


@st.composite
def fitting_arrays(draw, other_names: bool = False) -> bytes:
    """The bytes of an .npz file with the expected array names, mostly consistent shapes, and arbitrary values.

    other_names: use names of other trackers, and sometimes CoTracker's layout.
    Each array is left out with probability 1/10."""
    T, N = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    shapes = {"points": (N, T, 2), "tracks": (N, T, 2), "occluded": (N, T), "visible": (N, T), "frame_size": (2,),
              "query_points": (N, 3), "source_size": (2,), "evaluated": (N, T), "depth": (N, T),
              "occlusion_score": (N, T)}
    floats = st.sampled_from([0.0, 1.0, 2.5, 30.0, -1.0, np.nan, np.inf, 1e30, 1e300])
    out = {}
    for name, shape in shapes.items():
        if draw(st.integers(0, 9)) == 0:
            continue
        flat = [draw(floats) for _ in range(int(np.prod(shape)))]
        dtype = draw(st.sampled_from(["f4", "f8", "?", "i8", "f2"])) if draw(st.integers(0, 5)) == 0 else (
            "?" if name in ("occluded", "visible", "evaluated") else "i8" if name.endswith("_size") else "f4")
        with np.errstate(all="ignore"):
            out[name] = np.nan_to_num(flat).clip(-2**62, 2**62).astype(dtype).reshape(shape) if dtype == "i8" else \
                np.array(flat).astype(dtype).reshape(shape)
    if draw(st.booleans()):
        out["frame_numbers"] = 2 * np.arange(T) + draw(st.sampled_from([0, 1, -1, 2**40]))
    if other_names:
        out = {OTHER_NAMES.get(name, name): array for name, array in out.items()}
        for name in ("pred_tracks", "visibility"):
            if name in out and draw(st.booleans()):
                out[name] = out[name].swapaxes(0, 1)[None]
    buffer = io.BytesIO()
    np.savez(buffer, **out)
    return buffer.getvalue()


OTHER_NAMES = {"tracks": "pred_tracks", "visible": "visibility", "query_points": "queries"}
OTHER_NPZ_BYTES = fitting_arrays(other_names=True)
NPZ_BYTES = st.one_of(fitting_arrays(), st.dictionaries(st.sampled_from(
    ["points", "occluded", "frame_size", "query_points", "tracks", "visible", "../x"]), ARRAY, max_size=5).map(npz))
OPCODES = [getattr(pickle, name) for name in dir(pickle) if name.isupper() and isinstance(getattr(pickle, name), bytes)
           and len(getattr(pickle, name)) == 1]
ARGUMENTS = st.one_of(st.sampled_from([
    b"numpy\ndtype\n", b"numpy\nndarray\n", b"numpy._core.multiarray\n_reconstruct\n", b"os\nsystem\n", b"1\n",
    b"\x05video", b"\xff\xff\xff\xff", b"\x00" * 8, b"\x02f4", b"\x02O8"]), st.binary(max_size=6))
PICKLE_BYTES = st.lists(st.tuples(st.sampled_from(OPCODES), st.one_of(st.just(b""), ARGUMENTS)).map(b"".join),
                        max_size=30).map(lambda parts: b"".join(parts) + b".")

KINDS = [
    Kind("frame.png", image(".png"), read_image), Kind("frame.jpg", image(".jpg"), read_image),
    Kind("frame.tif", image(".tif", compression="tiff_lzw"), read_image),
    Kind("frame.webp", image(".webp"), read_image),
    Kind("frame16.png", deep_image(".png", "u2"), read_deep), Kind("frame16.tif", deep_image(".tif", "u2"), read_deep),
    Kind("float.tif", deep_image(".tif", "f4"), read_deep),
    Kind("frame.exr", deep_image(".exr", "f4"), read_deep, share=6),
    Kind("half.exr", deep_image(".exr", "f2"), read_deep), Kind("zip.exr", exr_zip, read_deep),
    Kind("values.json", values_json, lambda path: open_sequence(path.parent), JSON_BYTES),
    Kind("video16.mkv", deep_video, lambda path: list(read_video(path)), share=2),
    Kind("frame.bmp", image(".bmp"), read_image), Kind("mask.png", mask, lambda path: read_mask(path, SIZE)),
    Kind("labels.png", labels, lambda path: read_mask(path, (20, 30))),
    Kind("mask_of_frame.png", sequence_mask, lambda path: open_sequence(path.parents[1]).mask(1)),
    Kind("count_map.png", count_map, read_levels),
    Kind("video.mp4", video(".mp4"), lambda path: list(read_video(path)), share=3),
    Kind("video.gif", video(".gif"), lambda path: list(read_video(path)), share=3),
    Kind("meta.json", store_file("meta.json"), lambda path: everything(open_correspondences(
        open_sequence(path.parents[1]))), JSON_BYTES),
    Kind("row", store_file("00001.row"), lambda path: everything(open_correspondences(
        open_sequence(path.parents[1]))), share=6),
    Kind("unfinished.pair", part, read_part),
    Kind("flow_stats.json", published_file("flow_stats.json"), lambda path: everything(OmniMotionFolder(
        open_sequence(path.parent))), JSON_BYTES),
    Kind("flow.npy", published_file("raft_exhaustive/*.npy"), lambda path: everything(OmniMotionFolder(
        open_sequence(path.parents[1]))), ARRAY),
    Kind("flow_mask.png", published_file("raft_masks/*.png"), lambda path: everything(OmniMotionFolder(
        open_sequence(path.parents[1])))),
    Kind("depth.npy", depth_file("00001.npy"), lambda path: load_depth(open_sequence(path.parents[1])), ARRAY),
    Kind("depth_meta.json", depth_file("meta.json"), lambda path: load_depth(open_sequence(path.parents[1])),
         JSON_BYTES),
    Kind("annotations.npz", annotations, lambda path: load_annotations(path, FRAMES), NPZ_BYTES, share=6),
    Kind("tracks.npz", tracks, load_tracks, NPZ_BYTES, share=6),
    Kind("other_tracks.npz", tracks, lambda path: read_tracks(path, FRAMES, hidden=False), OTHER_NPZ_BYTES, share=6),
    Kind("tracks.npy", other_tracks(".npy"), lambda path: read_tracks(path, FRAMES), ARRAY),
    Kind("tracks.pt", other_tracks(".pt"), lambda path: load_tracks(path, FRAMES, np.zeros((4, 3), np.float32), SIZE)),
    Kind("queries.npz", queries(".npz"), load_queries, NPZ_BYTES),
    Kind("queries.csv", queries(".csv"), lambda path: load_queries(path, FRAMES, SIZE), CSV_BYTES),
    Kind("video.json", source_file, lambda path: source_of(open_sequence(path.parent)), JSON_BYTES),
    Kind("source_queries.npz", source_queries(".npz"), read_of_clip(queries_of_clip), NPZ_BYTES),
    Kind("source_queries.csv", source_queries(".csv"), read_of_clip(queries_of_clip), CSV_BYTES),
    Kind("source_annotations.npz", annotations, read_of_clip(annotations_of_clip), NPZ_BYTES),
    Kind("tapvid.pkl", benchmark("dict"), read_benchmark, PICKLE_BYTES, share=8),
    Kind("tapvid_jpeg.pkl", benchmark("jpeg"), read_benchmark, PICKLE_BYTES),
    Kind("checkpoint.pth", checkpoint, read_checkpoint),
    Kind("raft.pth", raft_weights, read_raft, share=1),
    Kind("args.txt", args, read_args, ARGS_BYTES, share=2),
    Kind("config.txt", config, read_config, CONFIG_BYTES, share=2), Kind("result.json", result, _record, JSON_BYTES),
]
