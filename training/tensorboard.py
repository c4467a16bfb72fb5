"""Training logs: TensorBoard scalars, histograms and pictures, and the same pictures as PNG files."""

from pathlib import Path

import numpy as np

from drawing.colors import depth_colors, error_colors, flow_colors, full_saturation, position_colors
from drawing.legend import color_bar, flow_legend, row, with_strip
from drawing.maps import beside, depth_range, error_scale, fit, picture_size
from drawing.output import write_png
from drawing.tracks import match_picture

FOLDER = "vis"


class Board:
    """Scalars and pictures of a run: TensorBoard files in `run_dir`/tensorboard unless switched off, PNG files in
    `run_dir`/vis. On resume at `step`, TensorBoard drops what an earlier run logged after that step."""

    def __init__(self, run_dir: Path, tensorboard: bool = True, step: int = 0):
        self.dir = run_dir
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log one value of each curve."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def weights(self, values: dict[str, np.ndarray], step: int) -> None:
        """Log the histogram of each weight matrix, and its root mean square as a curve."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_histogram(f"weights/{name}", value, step)
                rms = float(np.sqrt((value.astype(np.float64) ** 2).mean()))
                self.writer.add_scalar(f"weight_rms/{name}", rms, step)

    def pictures(self, step: int, ids: list[int], frames: np.ndarray, points: np.ndarray, matches: np.ndarray,
                 flow: np.ndarray, depths: np.ndarray, colors: np.ndarray, errors: np.ndarray) -> None:
        """Log the matches and the flow between two frames, and for each frame its rendering, depth and error map.

        ids: indices of the two frames; frames `(2, H, W, 3)` uint8; points `(N, 2)` of the first frame and
        their matches in the second; on a grid of the frame: flow `(h, w, 2)` pixels from the first to the second,
        depths `(2, h, w)`, colors `(2, h, w, 3)` in [0, 1]; errors `(2, h', w')` pixels."""
        size = frames.shape[1:3]
        near, far = depth_range(depths)
        largest = error_scale(errors)
        longest = full_saturation(flow)
        legend = row([color_bar(lambda s: depth_colors(s, 0, 1), f"{near:.2f}", f"{far:.2f}", "near"),
                      color_bar(lambda s: error_colors(s, 1), "0", f"{largest:.2f} px", "flow error")], 24)
        views = {
            "matches": match_picture(tuple(frames), points, matches, np.ones(len(points), bool),
                                     position_colors(points, size), f"frame {ids[0]} | frame {ids[1]}"),
            "flow": with_strip(fit(flow_colors(flow, longest), picture_size(size)), f"frame {ids[0]} to {ids[1]}",
                               flow_legend(longest))}
        for k, i in enumerate(ids):
            rendered = np.rint(colors[k].clip(0, 1) * 255).astype(np.uint8)
            maps = (frames[k], rendered, depth_colors(depths[k], near, far), error_colors(errors[k], largest))
            views[f"frame_{i}"] = with_strip(beside(fit(m, picture_size(size)) for m in maps),
                                             f"frame {i} | rendered | depth | error", legend)
        for name, view in views.items():
            write_png(self.dir / FOLDER / f"{step:06d}_{name}.png", view)
            if self.writer is not None:
                self.writer.add_image(name, view, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the TensorBoard writer."""
        if self.writer is not None:
            self.writer.close()
