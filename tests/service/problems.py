"""What every test of a refusal asks of the answer."""


def problem(answer, status, code=None):
    """Return the problem that this answer is, of this status and code. Fails where it is none."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["detail"].endswith((".", "?"))
    if code is not None:
        assert body["code"] == code
    return body
