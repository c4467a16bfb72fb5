"""From a clip to a trained run in one folder, and to its tracks: what track.py and `track_video` do.

Preprocessing and training are processes. Each is left out if its result is there; one that was interrupted continues.

Files in the folder
    sequence/         the clip as a sequence folder, with correspondences
    PRESET_STEPS_ID/  a trained run; ID stands for all of its settings, so that other settings give another run
    frames/           the images, if the clip was given as an array
"""

import hashlib
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.errors import UserError
from common.files import atomic_folder
from common.locks import lock_folder
from common.progress import Part, WholeProgress
from configs.options import OPTIONS, parse, run_dir
from inference.load_run import load_run
from inference.processes import ROOT, STOPPED, run_command, train
from inference.query_points import queries_in_frames
from inference.tracker import Tracker, Tracks
from loaders.checkpoint import checkpoint_path
from loaders.correspondences import open_correspondences
from loaders.images import write_png
from loaders.sequence import VideoSequence, open_sequence
from loaders.source_frames import FILE_NAME, SourceFrames, is_made_from, resize_points, source_of
from loaders.track_files import checked_queries
from loaders.video import clip_header
from models.factory import pick_device

PRESETS = {"cpu": "configs/fast.txt", "cuda": "configs/default.txt"}
SHORT_SIDES = {"cpu": 256, "cuda": 480}  # pixels; smaller clips keep their size
PAGE = "page.html"  # in the run's folder
RATE = 10.0    # frames per second of videos, if the clip has no frame rate
PIECE = 2_048  # query points that are tracked at a time
UNKNOWN_FRAMES = 100  # assumed for the first estimate if the file does not name its number of frames
# Estimated seconds on two CPU cores, for frames of 256x256 (about those of docs/results/clip.json)
SECONDS_PER_FEATURE = 0.02   # a frame
SECONDS_PER_FLOW = 0.05      # a pair of frames, in both directions
SECONDS_PER_CHAIN = 0.05     # a frame
SECONDS_PER_STEP = 0.03      # a training step
SECONDS_PER_SAMPLE = 2e-5    # a query point in a frame
PAIRS_PER_FRAME = 0.85       # times log2 of the number of frames


class ClipRun:
    """A clip, and the folder of what is computed from it."""

    def __init__(self, clip: Path, folder: Path, config: str = "", num_iters: int | None = None,
                 device: str = "auto"):
        """clip: video file or folder of images. config: preset; empty: that of the device. num_iters: training steps;
        None: the preset's. UserError if the clip cannot be opened, or the folder belongs to another clip."""
        self.clip = clip
        self.folder = folder
        self.device = pick_device(device).type
        self.config = config or str(ROOT / PRESETS[self.device])
        self.num_iters = num_iters
        count, self.size = clip_header(clip)
        self.num_frames = count or UNKNOWN_FRAMES
        self.zoom = min(1, SHORT_SIDES[self.device] / min(self.size))  # from the clip to the sequence's frames
        self.sequence = self._opened()
        self.is_trained = False
        if self.sequence is not None:
            self.num_frames = len(self.sequence)
            options = self.options()
            self.is_trained = checkpoint_path(run_dir(options), options.num_iters).is_file()

    def _opened(self) -> VideoSequence | None:
        """The sequence of the clip, if its frames and correspondences are there."""
        root = self.folder / "sequence"
        if not (root / FILE_NAME).is_file():
            return None
        if not is_made_from(root, self.clip):
            raise UserError(f"{self.folder} has the results of another clip than {self.clip}: give another folder with "
                            "--keep_work, or remove it")
        try:
            sequence = open_sequence(root, None)
            open_correspondences(sequence)
        except UserError:  # unfinished; preprocessing continues, and reports what is wrong
            return None
        return sequence

    def parts(self) -> list[Part]:
        """What is missing of the run."""
        out = []
        frames = self.num_frames
        if self.sequence is None:
            area = self.size[0] * self.size[1] * self.zoom**2 / 256**2
            pairs = PAIRS_PER_FRAME * frames * np.log2(frames)
            seconds = {"features": SECONDS_PER_FEATURE * frames, "flow": SECONDS_PER_FLOW * pairs,
                       "chains": SECONDS_PER_CHAIN * frames}
            out = [Part("correspondences", bar, value * area) for bar, value in seconds.items()]
        if not self.is_trained:
            options = self.options()
            out.append(Part("training", run_dir(options).name, SECONDS_PER_STEP * options.num_iters))
        return out

    def has_page(self) -> bool:
        """Whether the run's page is there (drawing/page.py)."""
        return self.sequence is not None and (run_dir(self.options()) / PAGE).is_file()

    def options(self) -> Namespace:
        """The options of the run: of training, inference, and drawing. SystemExit 2 if the preset has a mistake."""
        words = ["--config", self.config, "--data_dir", str(self.folder / "sequence"), "--save_dir", str(self.folder),
                 "--num_imgs", str(max(self.num_frames, 2)), "--device", self.device, "--no-tensorboard", "--i_img=0"]
        options = parse("train", words + (["--num_iters", str(self.num_iters)] if self.num_iters else []))
        values = {option.name: getattr(options, option.name) for option in OPTIONS if "train" in option.drivers
                  and option.name not in ("data_dir", "save_dir", "expname", "num_imgs")}
        identity = hashlib.blake2b(repr(sorted(values.items())).encode(), digest_size=3).hexdigest()
        options.expname = f"{Path(self.config).stem}_{options.num_iters}_{identity}"
        return options

    def complete(self, show: Callable[[str], object], check: Callable[[SourceFrames], object]) -> Namespace:
        """Run what is missing; returns the options of the trained run.

        show:  is called with the output of processes
        check: is called with the frames' source before training, to refuse queries that are not in the clip
        SystemExit 130 if a signal stopped it. UserError for a clip that cannot be read or tracked, and from `check`."""
        if self.sequence is None:
            resize = ["--short_side", str(SHORT_SIDES[self.device])] if self.zoom < 1 else []
            run_command(["-m", "preprocessing", "--video", str(self.clip), "--data_dir", str(self.folder / "sequence"),
                         "--resume", "--device", self.device, *resize], show=show)
            self.sequence = open_sequence(self.folder / "sequence", None)
            self.num_frames = len(self.sequence)
        source = source_of(self.sequence)
        check(source)
        options = self.options()
        options.fps = source.frame_rate or RATE
        train(options, show=show)
        self.is_trained = True
        return options


def track_in_pieces(tracker: Tracker, queries: np.ndarray) -> Tracks:
    """`tracker.track(queries)` with a progress bar, "tracks"."""
    pieces = np.array_split(queries, max(1, -(-len(queries) // PIECE)))
    found = [tracker.track(piece) for piece in tqdm(pieces, "tracks")]
    return Tracks(*(np.concatenate(values) for values in zip(*(vars(f).values() for f in found), strict=True)))


def tracking_part(num_queries: float, num_frames: int) -> Part:
    """`track_in_pieces` as a part of the work."""
    return Part("tracks", "tracks", SECONDS_PER_SAMPLE * num_queries * num_frames)


def track_video(frames: np.ndarray | str | Path, query_points: np.ndarray, num_iters: int | None = None,
                keep_work: str | Path | None = None, config: str = "", device: str = "auto",
                progress: bool = True) -> Tracks:
    """Optimize a model on a clip and track points through it. It takes minutes on a CPU.

    frames: `(T, H, W, 3)` uint8 RGB, or a video file or folder of images
    query_points: `(N, 3)` = (t, y, x): frame number, and position in pixels of the given frames
    num_iters, config: training steps and preset; by default those of track.py
    keep_work: folder of the trained model, so that another call for the same clip only tracks; None: nothing is kept
    progress: show a progress bar
    The tracks are in pixels of the given frames, one column for each of them.
    UserError if the clip or a query point cannot be used; KeyboardInterrupt after Ctrl-C: with `keep_work`, the same
    call continues."""
    queries = np.asarray(query_points, np.float64)
    if queries.ndim != 2 or queries.shape[1] != 3 or len(queries) == 0:
        raise UserError(f"query_points has the shape {queries.shape}, it must be (N, 3): (t, y, x), at least one")
    with _folder(keep_work) as folder, lock_folder(folder, make=True):
        clip = Path(frames) if isinstance(frames, str | Path) else _write_frames(folder / "frames", frames, queries)
        job = ClipRun(clip, folder, config, num_iters, device)
        parts = [*job.parts(), tracking_part(len(queries), job.num_frames)]
        bar = WholeProgress(clip.name, parts, progress)
        try:
            run = load_run(job.complete(bar.write, lambda source: queries_in_frames(queries, source, "query_points")))
            source = source_of(run.sequence)
            with bar.of_this_process():
                out = track_in_pieces(run.tracker, queries_in_frames(queries, source, "query_points"))
        except SystemExit as stopped:
            if stopped.code == STOPPED:
                raise KeyboardInterrupt from None
            raise
        finally:
            bar.close()
    out.tracks = resize_points(out.tracks, source.size, source.source_size)
    return out


@contextmanager
def _folder(keep: str | Path | None) -> Iterator[Path]:
    if keep is not None:
        yield Path(keep)
        return
    with tempfile.TemporaryDirectory(prefix="track_video_") as folder:
        yield Path(folder)


def _write_frames(folder: Path, frames: np.ndarray, queries: np.ndarray) -> Path:
    """Write frames as images; returns `folder`. UserError for other arrays, or query points outside of them."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise UserError(f"frames are {frames.dtype} of shape {frames.shape}: give uint8 RGB of shape (T, H, W, 3), or "
                        "the path of a video")
    checked_queries(queries, "query_points", len(frames), frames.shape[1:3])
    with atomic_folder(folder) as temporary:
        for t, frame in enumerate(frames):
            write_png(temporary / f"{t:05d}.png", frame)
    return folder
