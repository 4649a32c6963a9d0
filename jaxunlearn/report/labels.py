"""Names beside points: where each can stand without covering another, as far as there is room."""

from collections.abc import Sequence
from itertools import product

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
    taken = [(x - REACH, y - REACH, x + REACH, y + REACH) for x, y in points]
    found: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(points)), key=lambda index: -points[index][1]):  # so lines to points cross less
        (x, y), (width, height) = points[index], sizes[index]
        across = [side for step in range(8) for side in (REACH + 20 * step, -REACH - width - 20 * step)]
        up = [(step - 0.5) * height for half in range(12) for step in {half, -half}]
        corners = sorted(product(across, up), key=lambda corner: _distance(corner[0], corner[1], width, height))
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in corners]
        box = next((box for box in boxes if _covered(box, taken, bounds) < 1e-6), None)
        box = box or min(boxes, key=lambda box: _covered(box, taken, bounds))
        taken.append(box)
        found[index] = box[:2]
    return [found[index] for index in range(len(points))]


def _distance(dx: float, dy: float, width: float, height: float) -> float:
    """From a point to the label's box whose corner is so far from it; of equal ones the right one first."""
    right, up = max(dx, -dx - width, 0.0), max(dy, -dy - height, 0.0)
    return (right**2 + up**2) ** 0.5 + (0.1 if dx < 0 else 0.0)


def _shared(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _covered(box: Box, taken: Sequence[Box], bounds: Box) -> float:
    """How much of others a box covers, and how much of it is out of bounds."""
    outside = (box[2] - box[0]) * (box[3] - box[1]) - _shared(box, bounds)
    return outside + sum(_shared(box, other) for other in taken)
