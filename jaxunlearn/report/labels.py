"""Names beside points: where each can stand without covering another, as far as there is room."""

from collections.abc import Sequence
from itertools import product

import numpy as np

Box = tuple[float, float, float, float]  # left, bottom, right, top
REACH = 6.0  # from a point to its label; half of what a point itself takes


def places(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], bounds: Box
) -> list[tuple[float, float]]:
    """Lower left corners of labels, each as near to its point as those before it, all points and `bounds` allow.

    Where there is no room at all a label stands where it covers least. Any unit, the same for all.

    Args:
      points: places of the points.
      sizes: width and height of each point's label.
      bounds: within these labels stand.
    """
    taken: list[Box] = [(x - REACH, y - REACH, x + REACH, y + REACH) for x, y in points]
    found: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(points)), key=lambda index: -points[index][1]):  # so lines to points cross less
        (x, y), (width, height) = points[index], sizes[index]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in _near(width, height)]
        outside = width * height - _shared(boxes, [bounds])
        covered = np.round(outside + _shared(boxes, taken), 6)
        taken.append(boxes[int(np.argmin(covered))])  # the first of those that cover least
        found[index] = taken[-1][:2]
    return [found[index] for index in range(len(points))]


def _near(width: float, height: float) -> list[tuple[float, float]]:
    """From a point, the corners of boxes where its label may stand, the nearest first, of those the right one."""
    across = [side for step in range(8) for side in (REACH + 20 * step, -REACH - width - 20 * step)]
    up = [(step - 0.5) * height for step in range(-11, 12)]

    def distance(corner: tuple[float, float]) -> tuple[float, bool]:
        right, above = (max(d, -d - size, 0.0) for d, size in zip(corner, (width, height), strict=True))
        return right**2 + above**2, corner[0] < 0

    return sorted(product(across, up), key=distance)


def _shared(boxes: Sequence[Box], others: Sequence[Box]) -> np.ndarray:
    """Of each box, the area that others cover."""
    a, b = np.array(boxes)[:, None], np.array(others)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    return np.maximum(sides, 0).prod(-1).sum(1)
