"""Make the pictures of the demo in docs/images from the frames that `viz.py` draws:

    make demo
    python viz.py --config configs/demo.txt --data_dir seqs/demo --what all --formats png
    python -m benchmarks.pictures
"""

from pathlib import Path

from PIL import Image

from common.cli import Parser, run
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DRAWN = ROOT / "out/demo_demo"
IMAGES = ROOT / "docs/images"
FRAMES = {"tracks": "tracks_00000/00012", "trails": "trails_00000/00016", "occlusion": "occlusion_00000/00008",
          "depth": "depth/00008", "flow": "flow/00008", "color": "color/00008", "errors": "errors/00008",
          "canonical": "canonical/00008", "pairs": "pairs_00000_00012"}
MAX_WIDTH = 900  # pixels
GIF_WIDTH = 320
GIF_COLORS = 96
GIF_MILLISECONDS = 110  # a frame


def resized(path: Path, width: int) -> Image.Image:
    """The picture, reduced to a width of at most `width` pixels."""
    image = Image.open(path).convert("RGB")
    height = round(image.height * width / image.width)
    return image if image.width <= width else image.resize((width, height), Image.Resampling.LANCZOS)


def main() -> None:
    Parser(description=__doc__.splitlines()[0]).parse_args()
    if missing := [frame for frame in FRAMES.values() if not (DRAWN / f"{frame}.png").is_file()]:
        raise UserError(f"no file {DRAWN / missing[0]}.png: run the commands at the top of benchmarks/pictures.py")
    for name, frame in FRAMES.items():
        resized(DRAWN / f"{frame}.png", MAX_WIDTH).save(IMAGES / f"{name}.jpg", quality=88)
    frames = [resized(path, GIF_WIDTH) for path in sorted((DRAWN / "tracks_00000").glob("*.png"))]
    palette = frames[len(frames) // 3].quantize(GIF_COLORS)  # one for all frames, so that still parts stay the same
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    first.save(IMAGES / "tracks.gif", save_all=True, append_images=others, duration=GIF_MILLISECONDS, loop=0)


if __name__ == "__main__":
    run(main)
