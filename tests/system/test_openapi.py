"""Whatever the OpenAPI document allows, and forbids, sent to a process: only what it says comes back."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # 15 s of work; the rest is other load

TESTER = Path(sys.executable).with_name("schemathesis")
EXAMPLES = 2  # for each operation, and as many sequences of several; the edge cases are 2,000 besides

# No schema can say that bytes are an image, a list is as long as a model has classes, or an ETag is current.
NOT_SAID = "positive_data_acceptance"

# What the tester does not expect by itself: 412 and 413 refuse, and who gives a millisecond gets a 504.
EXPECTED = """\
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 504]
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 409, 412, 413, 415, 422, 429]
"""


def test_no_request_in_any_order_is_answered_otherwise_than_the_document_says(service, tmp_path):
    service.start(TARE_ADMIN_TOKEN="adm", TARE_PREDICT_TOKEN="pre")
    (tmp_path / "schemathesis.toml").write_text(EXPECTED)
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
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr
    assert all(phase in done.stdout for phase in ("Coverage", "Fuzzing", "Stateful"))
    assert service.client.get("/healthz").status_code == 200
    assert not [line for line in service.log() if line["level"] == "ERROR"]
