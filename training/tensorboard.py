"""Training logs: TensorBoard scalars, histograms and pictures, and the same pictures as PNG files."""

from pathlib import Path

import numpy as np
from torch import nn

from drawing.colors import depth_colors, error_colors, flow_colors, full_saturation, position_colors
from drawing.legend import depth_legend, error_legend, flow_legend, row, with_strip
from drawing.maps import beside, depth_range, error_scale, fit, picture_size
from drawing.tracks import match_picture, point_grid
from inference import dense
from inference.tracker import Tracker
from loaders.images import write_png


class Board:
    """Scalars and pictures of a run: TensorBoard files in `run_dir`/tensorboard unless switched off, PNG files in
    `run_dir`/vis. On resume at `step`, TensorBoard drops what an earlier run logged after that step."""

    def __init__(self, run_dir: Path, tensorboard: bool, step: int):
        self.folder = run_dir / "vis"
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log one value of each curve."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def weights(self, model: nn.Module, step: int) -> None:
        """Log the histogram of each weight matrix, and its root mean square as a curve."""
        if self.writer is None:
            return
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                value = parameter.detach().cpu().numpy()
                rms = float(np.sqrt((value.astype(np.float64) ** 2).mean()))
                self.writer.add_histogram(f"weights/{name}", value, step)
                self.writer.add_scalar(f"weight_rms/{name}", rms, step)

    def pictures(self, pictures: dict[str, np.ndarray], step: int) -> None:
        """Log pictures `(h, w, 3)` uint8 by name."""
        for name, picture in pictures.items():
            write_png(self.folder / f"{step:06d}_{name}.png", picture)
            if self.writer is not None:
                self.writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close the TensorBoard writer."""
        if self.writer is not None:
            self.writer.close()


def pictures_of(trainer) -> dict[str, np.ndarray]:
    """Pictures of the current model by name: matches and flow from the first to the middle frame, and for each of the
    two "frame_I" with the frame, its rendering, depth and error map."""
    tracker = Tracker(trainer.model, chunk_size=trainer.options.chunk_size)
    first, second = ids = [0, len(trainer.sequence) // 2]
    size = tracker.size
    shown_size = picture_size(size)
    frames = trainer.sampler.frames[ids].cpu().numpy()  # (2, H, W, 3) uint8
    points = point_grid(size)  # (N, 2)
    matches = match_picture(tuple(frames), points, tracker.correspond(points, first, second),
                            np.ones(len(points), bool), position_colors(points, size),
                            f"frame {first} | frame {second}")

    interval = dense.grid_interval(tracker)
    flow = dense.coarse_flow(tracker, first, second, interval)  # (h, w, 2) pixels
    longest = full_saturation(flow)
    flow_picture = with_strip(fit(flow_colors(flow, longest), shown_size), f"frame {first} to {second}",
                              flow_legend(longest))

    colors, depths = zip(*(dense.colors_and_depths(tracker, t, interval) for t in ids), strict=True)
    errors = trainer.error_map.mean()[ids].cpu().numpy()  # (2, h', w') pixels
    near, far = depth_range(np.stack(depths))
    largest = error_scale(errors)
    legend = row([depth_legend(near, far), error_legend(largest)], 24)
    views = {"matches": matches, "flow": flow_picture}
    for k, i in enumerate(ids):
        rendered = np.rint(colors[k].clip(0, 1) * 255).astype(np.uint8)
        maps = (frames[k], rendered, depth_colors(depths[k], near, far), error_colors(errors[k], largest))
        views[f"frame_{i}"] = with_strip(beside(fit(m, shown_size) for m in maps),
                                         f"frame {i} | rendered | depth | error", legend)
    return views
