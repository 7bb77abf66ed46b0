"""Which machine the tests run on: some promises can be tried only with a GPU, some only without."""

from pathlib import Path

import pytest

HAS_GPU = Path("/dev/nvidia0").exists()

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
needs_no_gpu = pytest.mark.skipif(HAS_GPU, reason="needs a machine without an NVIDIA GPU")
