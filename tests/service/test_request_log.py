"""The log of requests where it cannot be written."""

import io
import json

from service.adapters import request_log
from service.adapters.request_log import RequestLog
from service.api.envelope import Exchange


class FullDisk(io.StringIO):
    """A stream that refuses to write while it is full."""

    full = True

    def write(self, text):
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_log_without_room_costs_lines_which_are_counted_once_there_is_room_again(monkeypatch):
    monkeypatch.setattr(request_log, "EVERY_S", 3600)  # the test says when
    disk = FullDisk()
    with RequestLog(disk) as log:
        for number in range(5):
            log.add(Exchange(str(number), "POST", "/predict", 200, 0.1, None))
        log._write()
        log.add(Exchange("5", "POST", "/predict", 200, 0.1, None))
        log._write()
        disk.full = False
        log.add(Exchange("6", "POST", "/predict", 200, 0.1, None))
    lines = [json.loads(line) for line in disk.getvalue().splitlines()]
    assert [line.get("request_id") for line in lines] == ["6", None]
    assert lines[1]["lines"] == 6
