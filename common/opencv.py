"""Reproducible results of OpenCV."""

from collections.abc import Iterator
from contextlib import contextmanager

import cv2


@contextmanager
def without_ipp() -> Iterator[None]:
    """Turn off Intel's IPP in OpenCV for reproducible flow. OpenCV's switch applies to the calling thread only.

    IPP's rounding depends on the processor and on the alignment of arrays in memory. DIS can amplify a difference in
    the last bit to a pixel."""
    before = cv2.ipp.useIPP()
    cv2.ipp.setUseIPP(False)
    try:
        yield
    finally:
        cv2.ipp.setUseIPP(before)
