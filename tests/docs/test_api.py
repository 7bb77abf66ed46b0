"""docs/api.md: its commands run as they stand."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.docs import commands
from tests.process import Service
from tests.tiny import png

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

# A model that offers every method that the page asks for.
NORMS = {
    "nu": "norm",
    "norms": [1.0, 0.9, 0.8, 0.7],
    "biases": [0.0] * 4,
    "bias": "drop",
    "tau": 0.5,
    "tau_rule": "balanced-error",
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_command_runs_as_it_stands(tmp_path):
    assert "".join(BLOCKS).count("curl ") > 15
    tiny.make(tmp_path / "models" / "tiny", weight_normalisation=NORMS)
    service = Service(tmp_path, tmp_path / "models")
    try:
        service.start()
        (tmp_path / "docs").mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (tmp_path / "docs" / "example.png").write_bytes(png(noise))
        commands.run(BLOCKS, service, tmp_path)
        (snippet,) = SNIPPETS
        here = snippet.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")
        done = subprocess.run(
            [sys.executable, "-c", here], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert any(label in done.stdout for label in tiny.LABELS)
    finally:
        service.close()
