"""Scenes of a video: which frames show the same place, which are blank, which repeat the frame before.

Notation
    T      number of frames
    scene  (T,) int64: number of the scene of each frame, from 0 in order of appearance; BLANK where a frame is blank

preprocessing/scenes.py finds them and they are kept in the store's meta.json under "scenes". Stores that were made
before have none: then all frames are one scene.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.errors import UserError
from common.files import read_json
from loaders.sequence import VideoSequence

BLANK = -1
STORE_META = "correspondences/meta.json"
CONVERTED_FILE = "scenes.json"


@dataclass(frozen=True)
class Scenes:
    """The scenes of a video of T frames, and its duplicated frames."""
    scene: np.ndarray                 # (T,) int64
    duplicates: tuple[int, ...] = ()  # frames that equal the frame before

    @property
    def blank(self) -> list[int]:
        """Frames of one color: black, white, or another."""
        return np.flatnonzero(self.scene == BLANK).tolist()

    @property
    def cuts(self) -> list[int]:
        """Frames whose scene is another than that of the last frame before that is not blank."""
        shown = np.flatnonzero(self.scene != BLANK)
        changes = np.diff(self.scene[shown]) != 0
        return shown[1:][changes].tolist()

    @property
    def count(self) -> int:
        """Number of scenes."""
        return int(self.scene.max(initial=BLANK)) + 1

    @property
    def same_throughout(self) -> bool:
        """Whether all frames are one scene without blank frames."""
        return bool((self.scene == 0).all())

    def same(self, i: int, j: int) -> bool:
        """Whether frames i and j show the same scene; False if one of them is blank."""
        return bool(self.scene[i] == self.scene[j] != BLANK)

    def wanted(self, i: int, j: int) -> bool:
        """Whether a store has the pair (i, j). Adjacent frames of different scenes have flow without valid pixels."""
        return abs(i - j) == 1 or self.same(i, j)

    def next(self, i: int, step: int) -> int | None:
        """The frame of the same scene that comes after frame i (`step` 1) or before it (-1), if there is one."""
        frames, place = self._places[i]
        place += step
        return frames[place] if 0 <= place < len(frames) else None

    @cached_property
    def _places(self) -> list[tuple[list[int], int]]:
        """Of each frame: the frames of its scene, and its place among them; none for a blank frame."""
        out: list[tuple[list[int], int]] = [([], 0)] * len(self.scene)
        for number in range(self.count):
            frames = np.flatnonzero(self.scene == number).tolist()
            for place, frame in enumerate(frames):
                out[frame] = frames, place
        return out

    def frames_of(self, number: int) -> tuple[int, int]:
        """First frame of a scene, and the frame after its last. UserError if there is no such scene."""
        frames = np.flatnonzero(self.scene == number)
        if not len(frames) or number == BLANK:
            raise UserError(f"--scene {number}: there are {self.count} scenes, from 0 on ({self.names()})")
        return int(frames[0]), int(frames[-1]) + 1

    def names(self) -> str:
        """The frames of each scene as text: "0: frames 0 to 5, 1: frames 6 to 11"."""
        return ", ".join(f"{n}: {frames_text(np.flatnonzero(self.scene == n))}" for n in range(self.count))

    def can_be_seen(self, frames: np.ndarray) -> np.ndarray:
        """Where a point of frames `(N,)` can be seen: `(N, T)` bool. Not in blank frames and other scenes, with which
        nothing connects it; in its own frame always."""
        same = self.scene[frames][:, None] == self.scene
        own = frames[:, None] == np.arange(len(self.scene))
        return own | (same & (self.scene != BLANK))

    def first(self, num_frames: int) -> "Scenes":
        """The scenes of the first `num_frames` frames."""
        return Scenes(self.scene[:num_frames], tuple(t for t in self.duplicates if t < num_frames))

    def as_dict(self) -> dict:
        """The entry "scenes" of meta.json."""
        return {"scene": self.scene.tolist(), "cuts": self.cuts, "blank": self.blank,
                "duplicates": list(self.duplicates)}


def one_scene(num_frames: int) -> Scenes:
    """A video without cuts."""
    return Scenes(np.zeros(num_frames, np.int64))


def scenes_of_meta(meta: dict, num_frames: int, where: object = "meta.json") -> Scenes:
    """The scenes of the first `num_frames` frames, from the content of a store's meta.json. UserError if damaged."""
    entry = meta.get("scenes")
    if entry is None:
        return one_scene(num_frames)
    values = [entry.get(key) for key in ("scene", "duplicates")] if isinstance(entry, dict) else [None]
    if not all(isinstance(value, list) and all(type(x) is int and BLANK <= x < 1 << 31 for x in value)
               for value in values) or len(values[0]) < num_frames:
        raise UserError(f"{where} is damaged: delete its folder and run `python -m preprocessing` again")
    return Scenes(np.array(values[0], np.int64), tuple(values[1])).first(num_frames)


def read_scenes(sequence: VideoSequence) -> Scenes:
    """The scenes of a sequence from its store, or from scenes.json beside OmniMotion's folders; one scene if there is
    neither, or if they are of other frames."""
    for path in (sequence.root / STORE_META, sequence.root / CONVERTED_FILE):
        if path.is_file():
            meta = read_json(path, "delete it and run `python -m preprocessing` again")
            names = meta.get("names")
            if isinstance(names, list) and names[:len(sequence)] == list(sequence.names):
                return scenes_of_meta(meta, len(sequence), path)
    return one_scene(len(sequence))


def frames_text(frames: Iterable[int]) -> str:
    """Frame numbers as text, runs of more than two as a range: "frame 5", "frames 0 to 5, 8, 9"."""
    runs: list[list[int]] = []
    for t in frames:
        if runs and t == runs[-1][-1] + 1:
            runs[-1].append(int(t))
        else:
            runs.append([int(t)])
    parts = []
    for run in runs:
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else [str(t) for t in run]
    return ("frame " if sum(map(len, runs)) == 1 else "frames ") + ", ".join(parts)
