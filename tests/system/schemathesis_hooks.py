"""What the tester of the OpenAPI document cannot make by itself: images. Loaded by its own process."""

import numpy as np
import schemathesis
from hypothesis import strategies as st

from tests import tiny

_RNG = np.random.default_rng(0)
_IMAGES = [
    tiny.png(_RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for height, width in ((tiny.SIZE, tiny.SIZE), (1, 1), (40, 9))
]

schemathesis.openapi.media_type("image/*", st.sampled_from([*_IMAGES, _IMAGES[0][:60], b""]))
