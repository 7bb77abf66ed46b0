"""docs/api.md: its commands run as they stand."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.service.conftest import png
from tests.system.conftest import Service, tiny_models  # noqa: F401 - the fixture

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_command_runs_as_it_stands(tmp_path, tiny_models):  # noqa: F811
    service = Service(tmp_path, tiny_models)
    try:
        url = str(service.start().base_url).rstrip("/")
        (tmp_path / "docs").mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (tmp_path / "docs" / "example.png").write_bytes(png(noise))
        (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
        script = "".join(BLOCKS).replace("http://127.0.0.1:8000", url)
        assert script.count("curl ") > 15
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env={**service.environment(), "CURL_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr
        assert '"code"' not in done.stdout
    finally:
        service.close()
