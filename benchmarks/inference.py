"""Time of dense tracking (positions, depths and occlusion scores of a frame's pixels in all frames): make bench

`per_frame` repeats the whole computation for each target frame, in float32 without fused functions: it maps the query
frame's samples to the canonical volume, evaluates the field, maps all samples to the target frame, and evaluates the
target frame's rays for the occlusion score. `shared` is `Tracker.track`. Both use the same randomly initialized model
of the default preset and the same pixels, and run alternately. The table has medians. Absolute times vary between runs;
compare the ratio.
"""

import logging
import statistics

import numpy as np
import torch
from torch import Tensor

from benchmarks.tables import extent
from benchmarks.timing import alternate
from common.cli import Parser
from common.files import write_json
from configs.options import parse
from evaluation.tables import markdown
from inference.tracker import Tracker
from models.factory import new_model, pick_device
from models.omnimotion import OmniMotion


@torch.no_grad()
def track_per_frame(model: OmniMotion, pixels: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """Positions `(N, T, 2)`, depths and occlusion scores `(N, T)` of pixels `(N, 2)` of frame t, unshared."""
    frame = torch.tensor([t], device=pixels.device)
    results = []
    for j in torch.arange(model.config.num_frames, device=pixels.device).split(1):
        p2, depth = model.correspond(pixels[None], frame, j, use_max_loc=True)
        results.append((p2[0], depth[0], model.occlusion_score(p2, depth, j)[0]))
    return tuple(torch.stack(parts, dim=1) for parts in zip(*results, strict=True))


def main() -> None:
    torch.set_flush_denormal(True)  # as train.py does
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats, after one that is not timed")
    parser.add_argument("--frames", type=int, default=12, help="frames of the video")
    parser.add_argument("--pixels", type=int, default=512, help="pixels of the query frame")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", default="out/bench/inference.json", help="file for the medians, seconds")
    args = parser.parse_args()
    device = pick_device(args.device)
    size = (256, 256)  # (H, W) pixels
    torch.manual_seed(0)
    plain, fast = (new_model(parse("eval", words), args.frames, size, device).eval() for words in (
        ["--precision", "fp32", "--mlp_backend", "torch"], []))
    fast.load_state_dict(plain.state_dict())
    plain.deform.fused = plain.field.net.fused = False
    pixels = torch.rand(args.pixels, 2, device=device) * (size[0] - 1)
    queries = np.column_stack([np.full(args.pixels, 3.0), pixels.flip(1).cpu().numpy()])
    work = {"per_frame": lambda: track_per_frame(plain, pixels, 3), "shared": lambda: Tracker(fast).track(queries)}
    times = alternate(work, args.repeats, 1, device)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    write_json(args.out, medians)
    share = args.pixels / (size[0] * size[1]) * args.frames / 82  # of a whole frame tracked through 82 frames
    print(f"{device.type}: {args.pixels} pixels to {args.frames} frames of 256x256, {args.repeats} repeats")
    print(markdown(
        ["way", "median, s", "fastest to slowest", "whole frame to 82 frames (extrapolated), min"],
        [[name, f"{median:.2f}", extent(times[name], ".2f"), f"{median / share / 60:.1f}"]
         for name, median in medians.items()]))
    positions = work["per_frame"]()[0].cpu().numpy()
    others = [j for j in range(args.frames) if j != 3]
    difference = np.linalg.norm(positions - work["shared"]().tracks, axis=-1)[:, others]  # (N, T - 1) pixels
    print(f"ratio {medians['per_frame'] / medians['shared']:.1f}; positions differ by {np.median(difference):.3f} px "
          f"(median), {np.percentile(difference, 99):.3f} px (99%)")


if __name__ == "__main__":
    main()
