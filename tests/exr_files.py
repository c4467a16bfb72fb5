"""A writer of OpenEXR files for the tests, after the format's description (openexr.com, "OpenEXR File Layout")."""

import struct
from pathlib import Path

import numpy as np


def write_exr(path: Path, channels: dict[str, np.ndarray], corner: tuple[int, int] = (0, 0),
              display: tuple[int, int] | None = None) -> None:
    """Write channels `(H, W)` float32 or float16 as uncompressed scan lines.

    corner:  (x, y) of the data window's first pixel in the display window
    display: (H, W) of the display window, whose first pixel is (0, 0); None: of the channels"""
    height, width = next(iter(channels.values())).shape
    rows, columns = display or (height, width)
    names = sorted(channels)
    kinds = {np.dtype(np.float16): 1, np.dtype(np.float32): 2}
    listed = b"".join(name.encode() + b"\0" + struct.pack("<iB3xii", kinds[channels[name].dtype], 0, 1, 1)
                      for name in names) + b"\0"
    x, y = corner
    attributes = [
        ("channels", "chlist", listed),
        ("compression", "compression", b"\0"),
        ("dataWindow", "box2i", struct.pack("<4i", x, y, x + width - 1, y + height - 1)),
        ("displayWindow", "box2i", struct.pack("<4i", 0, 0, columns - 1, rows - 1)),
        ("lineOrder", "lineOrder", b"\0"),
        ("pixelAspectRatio", "float", struct.pack("<f", 1)),
        ("screenWindowCenter", "v2f", struct.pack("<2f", 0, 0)),
        ("screenWindowWidth", "float", struct.pack("<f", 1)),
    ]
    out = b"v/1\x01" + struct.pack("<I", 2)
    for name, kind, value in attributes:
        out += name.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<I", len(value)) + value
    out += b"\0"
    lines = []
    for row in range(height):
        data = b"".join(channels[name][row].tobytes() for name in names)
        lines.append(struct.pack("<iI", y + row, len(data)) + data)
    first = len(out) + 8 * height
    offsets = [first + sum(map(len, lines[:row])) for row in range(height)]
    path.write_bytes(out + struct.pack(f"<{height}Q", *offsets) + b"".join(lines))
