"""Whatever the OpenAPI document allows, and forbids, sent to a process: only what it says comes back."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.process import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # 15 s of work; the rest is other load

TESTER = Path(sys.executable).with_name("schemathesis")
EXAMPLES = 2  # for each operation; the edge cases are 2,000 besides
SEQUENCES = 30  # of several requests, the later ones with what the earlier ones answered
OPERATIONS = 28  # or more: whoever adds some need not count them

# No schema can say that bytes are an image, a list is as long as a model has classes, or an ETag is current.
NOT_SAID = "positive_data_acceptance"

# What the tester does not expect by itself: 412 and 413 refuse, and who gives a millisecond gets a 504.
EXPECTED = """\
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 504]
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 409, 412, 413, 415, 422, 429]
[phases.stateful]
generation.max-examples = {sequences}
[[operations]]
include-path-regex = "^(/v2)?/models/"
parameters = {{ name = "tiny", version = "{version}" }}
[[operations]]
include-path-regex = "^/priors/"
parameters = {{ name = ["default", "other"] }}
"""


def test_no_request_in_any_order_is_answered_otherwise_than_the_document_says(service, tmp_path):
    service.start(TARE_ADMIN_TOKEN="adm", TARE_PREDICT_TOKEN="pre")
    shown = service.client.get("/models/tiny", headers={"Authorization": "Bearer pre"}).json()
    settings = EXPECTED.format(sequences=SEQUENCES, version=shown["version"])
    (tmp_path / "schemathesis.toml").write_text(settings)
    done = subprocess.run(
        [
            TESTER,
            "run",
            f"http://127.0.0.1:{service.port}/openapi.json",
            "--header=Authorization: Bearer adm",
            f"--exclude-checks={NOT_SAID}",
            f"--max-examples={EXAMPLES}",
            "--seed=1",
            "--continue-on-failure",
            "--no-color",
            "--report-json-path=report.json",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.system.schemathesis_hooks"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    for phase in ("coverage", "fuzzing", "stateful"):
        assert report["phases"][phase]["status"] == "success"
    assert report["operations"]["tested"] == report["operations"]["total"] >= OPERATIONS
    assert report["test_cases"]["with_failures"] == report["test_cases"]["errored"] == 0
    links = re.search(r"API Links: +([0-9]+) covered", done.stdout)
    assert links is not None
    assert int(links[1]) >= 4
    assert service.client.get("/healthz").status_code == 200
    assert not [line for line in service.log() if line["level"] in {"error", "critical"}]
