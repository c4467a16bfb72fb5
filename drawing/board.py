"""What a training run shows of itself: TensorBoard scalars and pictures, and the same pictures as files."""

from pathlib import Path

import cv2
import numpy as np

from drawing.colours import depth_colours, error_colours, flow_colours, position_colours
from drawing.tracks import match_picture, point_grid
from loaders.files import atomic_path

FOLDER = "pictures"


class Board:
    """Scalars and pictures of a run: TensorBoard files in `run_dir`/tensorboard unless switched off, PNG files in
    `run_dir`/pictures. What an earlier run showed after `step` is dropped from the curves."""

    def __init__(self, run_dir: Path, tensorboard: bool = True, step: int = 0):
        self.dir, self.writer = run_dir, None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """One point of each curve."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def pictures(self, step: int, ids: list[int], frames: np.ndarray, flow: np.ndarray, depths: np.ndarray,
                 colours: np.ndarray, errors: np.ndarray) -> None:
        """Matches of two frames, the flow between them, and of each: frame, rendered colours, depth, error map.

        ids: the two frames' numbers; frames `(2, H, W, 3)` uint8; flow `(H, W, 2)` pixels from the first to the
        second; depths `(2, H, W)`; colours `(2, H, W, 3)` in [0, 1]; errors `(2, h, w)` pixels."""
        size = frames.shape[1:3]
        points = point_grid(size, max(size) // 12)
        x, y = points.astype(int).T
        near, far = np.percentile(depths, (1, 99))
        largest = float(errors.max())
        views = {"matches": match_picture(tuple(frames), points, points + flow[y, x], np.ones(len(points), bool),
                                          position_colours(points, size)),
                 "flow": flow_colours(flow)}
        for k, i in enumerate(ids):
            error = cv2.resize(error_colours(errors[k], largest), size[::-1], interpolation=cv2.INTER_NEAREST)
            rendered = np.rint(colours[k].clip(0, 1) * 255).astype(np.uint8)
            views[f"frame_{i}"] = np.concatenate(
                [frames[k], rendered, depth_colours(depths[k], near, far), error], axis=1)
        for name, view in views.items():
            write_png(self.dir / FOLDER / f"{step:06d}_{name}.png", view)
            if self.writer is not None:
                self.writer.add_image(name, view, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        if self.writer is not None:
            self.writer.close()


def write_png(path: Path, image: np.ndarray) -> None:
    """Write `(H, W, 3)` uint8 RGB, whole or not at all."""
    with atomic_path(path) as temporary:
        cv2.imwrite(str(temporary), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
