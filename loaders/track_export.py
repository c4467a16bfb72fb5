"""Export of tracks to other programs. The file suffix selects the format.

.npz    the format of this project (loaders/track_files.py)
.csv    one line per track and frame: track,frame,x,y,visible,occlusion_score,depth
.pt     CoTracker's predictions: a tuple (tracks (1, T, N, 2) float32, visibility (1, T, N) bool)
.nuke   a folder of text files for Nuke's Tracker node, one file per track
.rrd    a Rerun recording: frames, tracks, and 3D points over time (needs the package rerun-sdk)

Notation
    N, T     tracks, frames
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from common.files import atomic_folder, atomic_path, write_bytes
from loaders.sequence import VideoSequence
from loaders.track_files import PointTracks, save_tracks

COLUMNS = ("track", "frame", "x", "y", "visible", "occlusion_score", "depth")
VISIBLE, OCCLUDED = (255, 176, 0), (86, 180, 233)  # RGB; orange and blue, distinguishable with color blindness


def check_format(path: Path) -> None:
    """UserError unless the suffix of `path` is a supported format. Called before the tracks are computed."""
    suffix = path.suffix.lower()
    if suffix not in WRITERS:
        raise UserError(f"{path}: no format for tracks ends in '{suffix}', choose among {', '.join(WRITERS)}")
    if suffix == ".rrd":
        _rerun()


def export_tracks(path: Path, tracks: PointTracks, sequence: VideoSequence | None = None) -> None:
    """Write tracks in the format that the suffix of `path` selects.

    UserError if the suffix is not supported, or if tracks and sequence have different numbers of frames."""
    check_format(path)
    if sequence is not None and len(sequence) != tracks.tracks.shape[1]:
        raise UserError(f"the tracks have {tracks.tracks.shape[1]} frames, {sequence.root} has {len(sequence)}: "
                        "give their own --data_dir")
    WRITERS[path.suffix.lower()](path, tracks, sequence)


def write_csv(path: Path, tracks: PointTracks, sequence: VideoSequence | None = None) -> None:
    """Write a .csv with the header COLUMNS. Cells of outputs that the tracker does not have are empty."""
    N, T = tracks.visible.shape
    extra = [np.full((N, T), None) if a is None else a for a in (tracks.occlusion_score, tracks.depth)]
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for n in range(N):
            for t in range(T):
                (x, y), cells = tracks.tracks[n, t], [a[n, t] for a in extra]
                writer.writerow([n, t, f"{x:.4f}", f"{y:.4f}", int(tracks.visible[n, t]),
                                 *("" if cell is None else f"{cell:.5f}" for cell in cells)])


def write_cotracker(path: Path, tracks: PointTracks, sequence: VideoSequence | None = None) -> None:
    """Write the tuple that CoTracker's predictor returns; `torch.load(path, weights_only=True)` reads it."""
    positions = torch.from_numpy(np.ascontiguousarray(tracks.tracks.transpose(1, 0, 2), np.float32))[None]
    visibility = torch.from_numpy(np.ascontiguousarray(tracks.visible.T))[None]
    buffer = io.BytesIO()  # torch.save to a path does not report a full disk as such
    torch.save((positions, visibility), buffer)
    write_bytes(path, buffer.getvalue())


def write_nuke(path: Path, tracks: PointTracks, sequence: VideoSequence | None = None) -> None:
    """Write a folder with track_00000.txt and so on: lines `frame x y`, as Nuke's Tracker reads them with File > Import
    Time+value Ascii; lines that begin with # are comments (Foundry, Nuke online help, "Importing Tracking Data",
    learn.foundry.com/nuke/10.5/content/comp_environment/tracking_stabilizing/importing_trackdata.html).

    Nuke's origin is the lower left corner of the frame, and pixel centers are at half-integers. Frame numbers start
    at 0. All frames are written; a comment lists the frames where the track is occluded."""
    H = tracks.frame_size[0]
    if path.exists() and (path.is_file() or any(not file.match("track_*.txt") for file in path.iterdir())):
        raise UserError(f"{path} is not a folder of exported tracks: remove it, or choose another name")
    with atomic_folder(path) as folder:
        for n, (points, visible) in enumerate(zip(tracks.tracks, tracks.visible, strict=True)):
            t, y, x = tracks.query_points[n]
            lines = [f"# track {n}, query point: frame {t:.0f}, x {x + 0.5:.3f}, y {H - y - 0.5:.3f}",
                     f"# occluded in frames: {_ranges(np.flatnonzero(~visible)) or 'none'}"]
            lines += [f"{t} {x + 0.5:.4f} {H - y - 0.5:.4f}" for t, (x, y) in enumerate(points)]
            (folder / f"track_{n:05d}.txt").write_text("\n".join(lines) + "\n")


def write_rerun(path: Path, tracks: PointTracks, sequence: VideoSequence | None = None) -> None:
    """Write a recording for the Rerun viewer.

    `video`: frames and points, orange where visible, blue where occluded. `space`: points at (x, y, depth) in pixels;
    one unit of depth is half the frame width."""
    rr = _rerun()
    recording = rr.RecordingStream("omnimotion_turbo")
    with atomic_path(path) as temporary:
        recording.save(str(temporary))
        recording.log("space", rr.ViewCoordinates.RDF, static=True)
        for t in range(tracks.tracks.shape[1]):
            recording.set_time("frame", sequence=t)
            if sequence is not None:
                recording.log("video", rr.Image(sequence.frame(t)).compress(jpeg_quality=85))
            colors = np.where(tracks.visible[:, t, None], VISIBLE, OCCLUDED).astype(np.uint8)
            recording.log("video/tracks", rr.Points2D(tracks.tracks[:, t] + 0.5, colors=colors, radii=2.0))
            if tracks.depth is not None:
                depth = tracks.depth[:, t, None] * tracks.frame_size[1] / 2
                recording.log("space/points", rr.Points3D(np.concatenate([tracks.tracks[:, t], depth], 1),
                                                          colors=colors, radii=1.0))
        recording.disconnect()  # flushes the buffer


def _ranges(frames: np.ndarray) -> str:
    """Text for ascending frame numbers: `3-5, 9` for 3, 4, 5, 9."""
    runs = np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1) if len(frames) else []
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _rerun():
    try:
        import rerun
    except ImportError as error:
        raise UserError("a .rrd needs rerun-sdk: pip install rerun-sdk, or choose another format") from error
    return rerun


WRITERS: dict[str, Callable] = {
    ".npz": lambda path, tracks, sequence: save_tracks(path, tracks), ".csv": write_csv, ".pt": write_cotracker,
    ".nuke": write_nuke, ".rrd": write_rerun}
