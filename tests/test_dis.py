"""DIS optical flow (third_party/dis.py)."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest

from third_party.dis import DisFlow


def images(size: tuple[int, int], seed: int) -> list[np.ndarray]:
    """A textured image `(H, W, 3)` and the same two pixels to the right."""
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), np.uint8)
    image = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    return [image, np.roll(image, 2, axis=1)]


@pytest.mark.parametrize("adjacent", [False, True])
def test_flow_does_not_depend_on_what_was_computed_before(adjacent):
    """Also not on the size of earlier images, or on the thread."""
    used = DisFlow(adjacent)
    pairs = [[used.gray(image) for image in images(size, seed)]
             for seed, size in enumerate([(64, 96), (48, 50), (64, 96), (96, 64)])]
    expected = [DisFlow(adjacent)(*pair) for pair in pairs]
    with ThreadPoolExecutor(2) as pool:
        for found in ([used(*pair) for pair in pairs], list(pool.map(lambda pair: used(*pair), pairs * 4))):
            for k, flow in enumerate(found):
                assert np.array_equal(flow, expected[k % len(pairs)])


@pytest.mark.parametrize("adjacent", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (600, 300), (20, 24)])
def test_flow_has_the_size_that_it_says(adjacent, size):
    dis = DisFlow(adjacent)
    a, b = (dis.gray(image) for image in images(size, 0))
    assert a.shape == dis.flow_size(size) and dis(a, b).shape == (*a.shape, 2)
    assert dis.working_bytes(size) >= dis(a, b).nbytes + a.nbytes + b.nbytes
