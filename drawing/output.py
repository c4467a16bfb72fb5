"""Write pictures to files: one PNG, or a series as MP4, GIF and PNG."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from loaders.images import write_png
from loaders.video import write_gif, write_video

FORMATS = ("mp4", "gif", "png")


def write_pictures(path: Path, pictures: Iterable[np.ndarray], formats: list[str], fps: float,
                   count: int) -> list[Path]:
    """Write `count` pictures `(H, W, 3)` uint8 RGB as PATH.mp4, PATH.gif or PATH/00000.png, one for each of `formats`.

    Returns the paths of the written files, and PATH for the folder of PNG files."""
    pictures = tqdm(pictures, path.name, count)
    if len(formats) > 1:
        pictures = list(pictures)
    written = []
    for name in formats:
        if name == "png":
            for t, picture in enumerate(pictures):
                write_png(path / f"{t:05d}.png", picture)
            written.append(path)
        else:
            file = path.with_suffix(f".{name}")
            write = write_video if name == "mp4" else write_gif
            write(file, pictures, fps)
            written.append(file)
    return written
