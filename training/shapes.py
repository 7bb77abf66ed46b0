"""shapes-lt: a long-tailed set of drawn images made in code, so that training needs no download.

Twenty-four classes: eight outlines, each filled in three ways. Every image has its own colours, size, place,
turn, stretch, noise and a distracting shape behind. Look-alikes (a hexagon and a disc, stripes and a grid)
lie at different ends of the tail, so that the label prior decides what the pixels leave open.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from training.data import Dataset, Examples, profile_counts

SIZE = 32
LARGEST = 500
TEST_PER_CLASS = 100

Grid = NDArray[np.float64]


def draw_shapes(profile: str, imbalance_ratio: float) -> Dataset:
    """Return the data set; it is the same in every run, and a smaller tail lies inside a larger one."""
    counts = profile_counts(profile, LARGEST, imbalance_ratio, len(CLASS_LABELS))
    return Dataset(
        name="shapes-lt",
        class_labels=CLASS_LABELS,
        train=_draw(counts, stream=0),
        test=_draw([TEST_PER_CLASS] * len(CLASS_LABELS), stream=1),
    )


def draw(index: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return one image of class `index`, (32, 32, 3)."""
    outline, fill = _CLASSES[index]
    shape_colour, ground_colour = _two_colours(rng)
    canvas = np.broadcast_to(ground_colour, (SIZE, SIZE, 3)) + _slope(rng)
    distractor = _coverage(
        rng, _OUTLINES[rng.choice(list(_OUTLINES))], "solid", size=(0.2, 0.35), wander=0.75
    )
    canvas = _blend(canvas, rng.uniform(0, 1, 3), 0.6 * distractor)
    canvas = _blend(
        canvas, shape_colour, _coverage(rng, _OUTLINES[outline], fill, size=(0.45, 0.8), wander=0.25)
    )
    canvas = canvas + rng.normal(0, rng.uniform(0.06, 0.2), canvas.shape)
    return (np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def _draw(counts: list[int], stream: int) -> Examples:
    images = np.empty((sum(counts), SIZE, SIZE, 3), dtype=np.uint8)
    place = 0
    for index, count in enumerate(counts):
        rng = np.random.default_rng([stream, index])
        for _ in range(count):
            images[place] = draw(index, rng)
            place += 1
    return Examples(images, np.repeat(np.arange(len(counts)), counts))


def _two_colours(rng: np.random.Generator) -> tuple[Grid, Grid]:
    """Return two colours that can be told apart in at least one channel."""
    while True:
        first, second = rng.uniform(0, 1, (2, 3))
        if np.abs(first - second).max() > 0.35:
            return first, second


def _slope(rng: np.random.Generator) -> Grid:
    """Return light that changes across the image, (32, 32, 1)."""
    angle = rng.uniform(0, 2 * np.pi)
    light: Grid = rng.uniform(0, 0.3) * (np.cos(angle) * _X + np.sin(angle) * _Y)
    return light[..., None]


def _coverage(
    rng: np.random.Generator,
    radius: Callable[[Grid], Grid],
    fill: str,
    *,
    size: tuple[float, float],
    wander: float,
) -> Grid:
    """Return how much of each pixel a randomly placed shape covers, (32, 32) in 0..1."""
    scale, turn = rng.uniform(*size), rng.uniform(0, 2 * np.pi)
    stretch = rng.uniform(0.8, 1.25)
    x, y = _X - rng.uniform(-wander, wander), _Y - rng.uniform(-wander, wander)
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    x, y = x * stretch / scale, y / stretch / scale
    distance = np.hypot(x, y)
    edge = radius(np.arctan2(y, x))
    soft = 1.5 * 2 / SIZE / scale  # anti-aliasing over about one and a half pixels
    inside: Grid = np.clip((edge - distance) / soft + 0.5, 0, 1)
    if fill == "hollow":
        inside *= np.clip((distance - 0.55 * edge) / soft + 0.5, 0, 1)
    elif fill == "striped":
        period = rng.uniform(0.45, 0.7)
        inside *= np.clip(np.sin(2 * np.pi * x / period + rng.uniform(0, 6)) / soft / 4 + 0.5, 0, 1)
    return inside


def _blend(canvas: Grid, colour: Grid, share: Grid) -> Grid:
    blended: Grid = canvas * (1 - share[..., None]) + colour * share[..., None]
    return blended


def _polygon(corners: int) -> Callable[[Grid], Grid]:
    def radius(angle: Grid) -> Grid:
        within = np.mod(angle, 2 * np.pi / corners) - np.pi / corners
        edge: Grid = np.cos(np.pi / corners) / np.cos(within)
        return edge

    return radius


def _star(points: int, depth: float) -> Callable[[Grid], Grid]:
    def radius(angle: Grid) -> Grid:
        toothed: Grid = 1 - depth * np.abs(np.mod(angle * points / np.pi, 2) - 1)
        return toothed

    return radius


def _flower(petals: int, depth: float) -> Callable[[Grid], Grid]:
    return lambda angle: 1 - depth * (1 - np.cos(petals * angle)) / 2


_Y, _X = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]

_OUTLINES: dict[str, Callable[[Grid], Grid]] = {
    "disc": np.ones_like,
    "triangle": _polygon(3),
    "square": _polygon(4),
    "hexagon": _polygon(6),
    "star": _star(5, 0.55),
    "cross": _star(4, 0.7),
    "clover": _flower(3, 0.5),
    "flower": _flower(5, 0.4),
}

# Frequent first. Each outline and each fill has classes at both ends.
_CLASSES: tuple[tuple[str, str], ...] = tuple(
    (outline, fill)
    for turn in range(3)
    for place, outline in enumerate(_OUTLINES)
    for fill in (("solid", "hollow", "striped")[(place + turn) % 3],)
)

CLASS_LABELS: tuple[str, ...] = tuple(f"{fill} {outline}" for outline, fill in _CLASSES)
