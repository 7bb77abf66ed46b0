"""README.md: its first screen does what it says, with the bundles that ship."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.docs import commands
from tests.process import Service

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_example_is_decided_as_the_readme_says(tmp_path):
    requests = [block for block in BLOCKS if block.startswith("curl ")]
    assert len(requests) == 1
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    service = Service(tmp_path, ROOT / "models")
    try:
        service.start()
        printed = commands.run(requests, service, tmp_path)
    finally:
        service.close()
    decoder, answers, place = json.JSONDecoder(), [], 0
    while place < len(printed):
        answer, place = decoder.raw_decode(printed, place)
        answers.append(answer)
    unadjusted, adjusted, priors, monitor = answers
    assert unadjusted["predictions"][0]["label"] == re.search(r"as trained: (\w+)", PAGE)[1]
    assert adjusted["predictions"][0]["label"] == re.search(r"fair chance: (\w+)", PAGE)[1]
    assert priors["version"] == 2
    assert monitor["predictions"] == 2


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", PAGE, re.MULTILINE))
    assert {"serve", "test"} <= named <= targets
