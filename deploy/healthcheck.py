"""Asks the service in the same container whether it is well: exit 0 for a 200. The slim image has no curl."""

import http.client  # takes no proxy from the environment, unlike urllib
import os
import sys

path = sys.argv[1] if len(sys.argv) > 1 else "/healthz"
connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get("TARE_PORT") or 8000), timeout=2)
try:
    connection.request("GET", path)
    answer = connection.getresponse()
    said = answer.read().decode(errors="replace")
except OSError as failure:
    sys.exit(f"{path}: {failure}")
if answer.status != 200:
    sys.exit(f"{path}: {answer.status} {said}")
