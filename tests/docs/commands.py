"""Runs the commands of a page as they stand, against a service on another port."""

import subprocess


def run(blocks, service, folder):
    """Run the bash blocks in `folder`; return what they printed. Fails where a command or an answer does."""
    url = str(service.client.base_url).rstrip("/")
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "".join(blocks).replace("http://127.0.0.1:8000", url)],
        cwd=folder,
        env={**service.environment(), "CURL_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr
    assert '"code"' not in done.stdout
    return done.stdout
