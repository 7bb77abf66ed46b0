"""Where the service listens, and where it refuses to."""

import signal
import socket
import subprocess
import sys

import pytest

from service.__main__ import listen
from service.settings import Settings, StartError


def refused(match, **settings):
    with pytest.raises(StartError, match=match) as caught:
        listen(Settings(**settings))
    assert "\n" not in str(caught.value)


def test_it_listens_on_a_free_port_of_loopback():
    with listen(Settings(port=0)) as listener, socket.create_connection(listener.getsockname()):
        assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2"])
def test_loopback_has_more_names(host):
    listen(Settings(host=host, port=0)).close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_address_for_others_needs_a_token(host):
    refused("TARE_ADMIN_TOKEN: .* TARE_ALLOW_ANONYMOUS=1", host=host, port=0)


def test_a_token_or_permission_opens_it():
    listen(Settings(host="0.0.0.0", port=0, admin_token="adm")).close()
    listen(Settings(host="0.0.0.0", port=0, allow_anonymous=True)).close()


@pytest.mark.parametrize("host", ["nowhere.invalid", "300.1.1.1", "a" * 300, "with blank"])
def test_a_host_that_is_none_is_named(host):
    refused("TARE_HOST", host=host)


def test_an_address_of_another_machine_and_a_port_that_is_taken_are_said():
    refused("cannot listen on 192.0.2.1", host="192.0.2.1", port=0, admin_token="adm")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused("TARE_PORT: cannot listen", port=taken.getsockname()[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_is_heard_where_python_would_ignore_an_exception(number):
    # A finaliser stands for the callbacks that run inside imports; the waiting thread for the store's writer.
    program = f"""
import signal, threading
from service.__main__ import _Signals

class Dropped:
    def __del__(self):
        signal.raise_signal({int(number)})

_Signals()
threading.Thread(target=threading.Event().wait).start()
Dropped()
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False, capture_output=True)
    assert (done.returncode, done.stderr) == (128 + number, b"")
