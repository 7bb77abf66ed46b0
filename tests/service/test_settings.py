"""The environment as settings: what is read, what is refused, what Kubernetes leaves there."""

import os
from pathlib import Path

import pytest

from service.settings import Settings, StartError, names


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith("TARE_"):
            monkeypatch.delenv(name)


def refusal(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(StartError) as caught:
        Settings.from_environment()
    monkeypatch.delenv(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_a_variable_the_service_listens_on_loopback_alone():
    settings = Settings.from_environment()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.admin_token is None


def test_a_variable_is_read_and_an_empty_one_is_unset(monkeypatch):
    monkeypatch.setenv("TARE_TAU", "1.5")
    monkeypatch.setenv("TARE_PREDICT_TOKEN", "")
    settings = Settings.from_environment()
    assert settings.tau == 1.5
    assert settings.predict_token is None


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("TARE_PROT", "TARE_PORT"), ("TARE_MODEL_DIR", "TARE_MODELS_DIR"), ("TARE_TOKENS", "TARE_TOKEN")],
)
def test_a_variable_that_nothing_reads_is_refused_with_the_nearest_real_one(monkeypatch, typo, meant):
    message = refusal(monkeypatch, typo, "1")
    assert message.startswith(f"{typo}: ")
    assert message.endswith(f"{meant}?")


def test_what_training_and_the_client_read_is_known(monkeypatch):
    for name in ("TARE_DATA_DIR", "TARE_URL", "TARE_TOKEN"):
        monkeypatch.setenv(name, "x")
    Settings.from_environment()


def test_what_kubernetes_injects_for_a_service_called_tare_is_ignored_and_logged(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("TARE_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("TARE_PORT_8000_TCP_ADDR", "10.0.0.1")
    monkeypatch.setenv("TARE_SERVICE_HOST", "10.0.0.1")
    assert Settings.from_environment().port == 8000
    for name in ("TARE_PORT ", "TARE_PORT_8000_TCP_ADDR", "TARE_SERVICE_HOST"):
        assert name in caplog.text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TARE_PORT", "70000"),
        ("TARE_PORT", "80_00"),
        ("TARE_PORT", "http"),
        ("TARE_TAU", "nan"),
        ("TARE_TAU", "inf"),
        ("TARE_TAU", "-1"),
        ("TARE_TAU", "101"),
        ("TARE_PROVIDER", "gpu"),
        ("TARE_RECORD", "perhaps"),
        ("TARE_MAX_BODY_BYTES", "0"),
        ("TARE_KEEP_DAYS", "0"),
        ("TARE_HEAD_S", "0"),
        ("TARE_BODY_S", "nan"),
        ("TARE_UNREAD_S", "-1"),
        ("TARE_ADMIN_TOKEN", "two words"),
        ("TARE_ADMIN_TOKEN", "zażółć"),
        ("TARE_DATABASE_URL", "postgresql://localhost/tare"),
        ("TARE_KEEP_IMAGES", "1"),
        ("TARE_STATE_DIR", "~nobody-of-this-name/state"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_the_variable(monkeypatch, name, value):
    message = refusal(monkeypatch, name, value)
    assert message.startswith(f"{name}: ")


def test_a_token_is_not_repeated_when_it_is_refused_or_printed(monkeypatch):
    assert "hush hush" not in refusal(monkeypatch, "TARE_ADMIN_TOKEN", "hush hush")
    monkeypatch.setenv("TARE_ADMIN_TOKEN", "hush")
    assert "hush" not in repr(Settings.from_environment())


def test_the_state_lies_under_the_state_home_unless_that_is_relative(monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "/var/somewhere")
    assert Settings.from_environment().state_dir == Path("/var/somewhere/tare")
    monkeypatch.setenv("XDG_STATE_HOME", "somewhere")
    monkeypatch.setenv("HOME", "/home/someone")
    assert Settings.from_environment().state_dir == Path("/home/someone/.local/state/tare")


def test_without_a_home_directory_the_state_directory_has_to_be_named(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(StartError, match=r"^TARE_STATE_DIR: "):
        Settings.from_environment()
    monkeypatch.setenv("TARE_STATE_DIR", "/state")
    assert Settings.from_environment().state_dir == Path("/state")


def test_settings_cannot_be_changed_after_they_are_read():
    settings = Settings.from_environment()
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_every_name_says_what_it_is_for():
    assert all(names().values())
