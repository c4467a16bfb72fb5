"""Export of tracks to other programs. The ending of the file selects the format.

.npz          the format of this project (loaders/track_files.py)
.csv          one line per track and frame: track,frame,x,y,visible,occlusion_score,depth
.pt           CoTracker's predictions: a tuple (tracks (1, T, N, 2) float32, visibility (1, T, N) bool)
.nuke         a folder of text files for Nuke's Tracker node, one file per track (loaders/compositing.py)
.ae           a folder of text files for After Effects, one file per track
.blender.py   a Python script that adds the tracks to a movie clip in Blender
.rrd          a Rerun recording: frames, tracks, and 3D points over time (needs the package rerun-sdk)

.npz has the pixels of the sequence's frames, and names their size. .csv, .nuke, .ae and .blender.py have the pixels
and frame numbers of the source if it is known and coordinates = "source", and .pt has its pixels; .rrd has its frame
numbers, and the pixels of the sequence's frames, which it contains.

Notation
    N, T     tracks, frames
    numbers  frame number of each frame (T,)
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files import atomic_path, write_bytes
from loaders.compositing import write_after_effects, write_blender, write_nuke
from loaders.sequence import VideoSequence
from loaders.track_files import PointTracks, save_tracks

IN_SOURCE = (".csv", ".pt", ".nuke", ".ae", ".blender.py")  # formats without a frame size of their own
COLUMNS = ("track", "frame", "x", "y", "visible", "occlusion_score", "depth")
VISIBLE, OCCLUDED = (255, 176, 0), (86, 180, 233)  # RGB; orange and blue, distinguishable with color blindness


def check_format(path: Path) -> str:
    """The ending of `path`. UserError unless it is a supported format. Called before the tracks are computed."""
    ending = next((ending for ending in WRITERS if path.name.lower().endswith(ending)), None)
    if ending is None:
        raise UserError(f"{path}: no format for tracks ends in '{path.suffix}', choose among {', '.join(WRITERS)}")
    if ending == ".rrd":
        _rerun()
    return ending


def export_tracks(path: Path, tracks: PointTracks, sequence: VideoSequence | None = None,
                  coordinates: str = "source") -> None:
    """Write tracks in the format that the ending of `path` selects.

    UserError if the ending is not supported, or if tracks and sequence have different numbers of frames."""
    ending = check_format(path)
    if sequence is not None and len(sequence) != tracks.tracks.shape[1]:
        raise UserError(f"the tracks have {tracks.tracks.shape[1]} frames, {sequence.root} has {len(sequence)}: "
                        "give their own --data_dir")
    numbers = np.arange(tracks.tracks.shape[1])
    if tracks.source is not None and coordinates == "source":
        numbers = tracks.source.numbers
        if ending in IN_SOURCE:
            tracks = tracks.resized(tracks.source.source_size)
    WRITERS[ending](path, tracks, numbers, sequence)


def write_csv(path: Path, tracks: PointTracks, numbers: np.ndarray, sequence: VideoSequence | None) -> None:
    """Write a .csv with the header COLUMNS. Cells of outputs that the tracker does not have are empty."""
    N, T = tracks.visible.shape
    extra = [np.full((N, T), None) if a is None else a for a in (tracks.occlusion_score, tracks.depth)]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for n in range(N):
            for t in range(T):
                (x, y), cells = tracks.tracks[n, t], [a[n, t] for a in extra]
                writer.writerow([n, numbers[t], f"{x:.4f}", f"{y:.4f}", int(tracks.visible[n, t]),
                                 *("" if cell is None else f"{cell:.5f}" for cell in cells)])


def write_cotracker(path: Path, tracks: PointTracks, numbers: np.ndarray, sequence: VideoSequence | None) -> None:
    """Write the tuple that CoTracker's predictor returns; `torch.load(path, weights_only=True)` reads it."""
    positions = torch.from_numpy(np.ascontiguousarray(tracks.tracks.transpose(1, 0, 2), np.float32))[None]
    visibility = torch.from_numpy(np.ascontiguousarray(tracks.visible.T))[None]
    buffer = io.BytesIO()  # torch.save to a path does not report a full disk as such
    torch.save((positions, visibility), buffer)
    write_bytes(path, buffer.getvalue())


def write_rerun(path: Path, tracks: PointTracks, numbers: np.ndarray, sequence: VideoSequence | None) -> None:
    """Write a recording for the Rerun viewer.

    `video`: frames and points, orange where visible, blue where occluded. `space`: points at (x, y, depth) in pixels;
    one unit of depth is half the frame width."""
    rr = _rerun()
    recording = rr.RecordingStream("omnimotion_turbo")
    with atomic_path(path) as temporary:
        recording.save(str(temporary))
        recording.log("space", rr.ViewCoordinates.RDF, static=True)
        for t in range(tracks.tracks.shape[1]):
            recording.set_time("frame", sequence=int(numbers[t]))
            if sequence is not None:
                recording.log("video", rr.Image(sequence.frame(t)).compress(jpeg_quality=85))
            colors = np.where(tracks.visible[:, t, None], VISIBLE, OCCLUDED).astype(np.uint8)
            recording.log("video/tracks", rr.Points2D(tracks.tracks[:, t] + 0.5, colors=colors, radii=2.0))
            if tracks.depth is not None:
                depth = tracks.depth[:, t, None] * tracks.frame_size[1] / 2
                recording.log("space/points", rr.Points3D(np.concatenate([tracks.tracks[:, t], depth], 1),
                                                          colors=colors, radii=1.0))
        recording.disconnect()  # flushes the buffer


def _rerun():
    try:
        import rerun
    except ImportError as error:
        raise UserError("a .rrd needs rerun-sdk: pip install rerun-sdk, or choose another format") from error
    return rerun


WRITERS: dict[str, Callable] = {
    ".npz": lambda path, tracks, numbers, sequence: save_tracks(path, tracks), ".csv": write_csv,
    ".pt": write_cotracker, ".nuke": write_nuke, ".ae": write_after_effects, ".blender.py": write_blender,
    ".rrd": write_rerun}
