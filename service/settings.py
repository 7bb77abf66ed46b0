"""The environment as frozen settings, read once; a variable that nothing reads stops the start."""

from __future__ import annotations

import difflib
import logging
import os
import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX: Final = "TARE_"

# Read by other parts of Tare, in the same environment: training and the tests, the client.
ELSEWHERE: Final = {
    "TARE_DATA_DIR": "where training and the tests find data sets",
    "TARE_URL": "where the client finds the service",
    "TARE_TOKEN": "the client's token",
}

# Part of the design, not of this release: said plainly, since silence would look like a typing error.
LATER: Final = {
    "TARE_DATABASE_URL": "this release keeps its state in SQLite under TARE_STATE_DIR; unset it",
    "TARE_KEEP_IMAGES": "this release keeps no images; unset it",
}

# What Kubernetes injects for a Service called tare: TARE_SERVICE_HOST, TARE_PORT_8000_TCP_ADDR, ...
_KUBERNETES: Final = re.compile(r"TARE_(SERVICE|PORT)_\w+")
_KUBERNETES_PORT: Final = re.compile(r"(tcp|udp|sctp)://\S+", re.IGNORECASE)
_NUMBER: Final = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")

_log = logging.getLogger("tare.settings")


class StartError(Exception):
    """What keeps the service from starting. The message is one line that says what to do; exit code 2."""


def _plain_number(value: object) -> object:
    """Python's reading of numbers takes '1_000' and 'nan'; a setting's does not."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        raise ValueError("should be a number in decimal notation")
    return value


_Seconds = Annotated[float, BeforeValidator(_plain_number), Field(ge=0.1, le=3600)]

_Count = Annotated[int, BeforeValidator(_plain_number), Field(ge=1, le=1 << 50)]

_Threads = Annotated[int, BeforeValidator(_plain_number), Field(ge=1, le=256)]


def _default_state_dir() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    # The base directory specification says that a relative path there is to be ignored.
    if base.startswith("/"):
        return Path(base) / "tare"
    try:
        return Path.home() / ".local" / "state" / "tare"
    except RuntimeError as failure:
        raise StartError("TARE_STATE_DIR: this user has no home directory, so set it") from failure


class Settings(BaseSettings):
    """What the service can be told. Each field is the variable TARE_<FIELD>; an empty one is unset."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid", hide_input_in_errors=True
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, BeforeValidator(_plain_number), Field(ge=0, le=65_535)] = Field(
        8000, description="Port to listen on; 0 takes a free one, which the log names."
    )
    models_dir: Path = Field(Path("models"), description="Every folder in here is loaded as a bundle.")
    model: str | None = Field(
        None, description="The default model's name; without it the first in alphabetical order."
    )
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = Field(
        "auto",
        description="What runs the networks. `auto` takes CUDA where it truly works, else the CPU; "
        "one asked for by name is had or the service is not ready.",
    )
    tau: Annotated[float, BeforeValidator(_plain_number), Field(ge=0, le=100)] | None = Field(
        None, description="tau of requests that name none; without it each bundle's own tau*."
    )
    state_dir: Path = Field(
        default_factory=_default_state_dir,
        description="Folder of the state; one service at a time may have it.",
    )
    keep_days: Annotated[int, BeforeValidator(_plain_number), Field(ge=1, le=36_500)] = Field(
        90, description="Predictions older than this are deleted."
    )
    state_max_bytes: _Count = Field(
        20 * 1024**3,
        description="Above this size predictions are deleted, unlabelled and oldest first.",
    )
    record: bool = Field(
        True, description="0 records no prediction: `prediction_id` is null, nothing can be monitored."
    )
    max_body_bytes: _Count = Field(32 * 1024**2, description="Largest request body.")
    max_pixels: _Count = Field(50_000_000, description="Largest image, read from its header before decoding.")
    queue_images: _Count = Field(
        1024, description="Images that may wait for one model; beyond them the answer is 429."
    )
    queue_bytes: _Count = Field(
        256 * 1024**2, description="Bytes of encoded images that may wait for one model; beyond them 429."
    )
    deadline_ms: Annotated[int, BeforeValidator(_plain_number), Field(ge=1, le=600_000)] = Field(
        30_000,
        description="Milliseconds from the whole body to the answer of a request that names none in "
        "`X-Request-Timeout-Ms`; after them the answer is 504.",
    )
    max_connections: _Count = Field(
        12_000, description="Connections at once; those beyond are answered with 503 and closed."
    )
    head_s: _Seconds = Field(
        30.0, description="Seconds in which a request's head has to arrive, or the rest of an answered body."
    )
    body_s: _Seconds = Field(120.0, description="Seconds in which a request's body has to arrive.")
    unread_s: _Seconds = Field(
        60.0, description="Seconds in which a client has to take in an answer that is sent to it."
    )
    drain_s: Annotated[float, BeforeValidator(_plain_number), Field(ge=0, le=3600)] = Field(
        25.0, description="Seconds that requests in flight have left when the service is told to stop."
    )
    workers: _Threads | None = Field(
        None, description="Threads that decode and run batches; without it as many as there are cores."
    )
    run_threads: _Threads = Field(1, description="Threads over which one run of a network spreads.")
    lone_threads: _Threads | None = Field(
        None,
        description="Threads for a lone request on an idle engine; without it as many as there are cores "
        "where that is measured to be faster, and 1 is never more than one.",
    )
    admin_token: SecretStr | None = Field(
        None, description="Token for whatever changes priors; opens everything else too."
    )
    predict_token: SecretStr | None = Field(
        None, description="Token for the rest, feedback included; where unset, the rest is open."
    )
    allow_anonymous: bool = Field(
        False, description="1 allows an address other than loopback without an admin token."
    )

    @field_validator("admin_token", "predict_token")
    @classmethod
    def _fits_a_header(cls, token: SecretStr | None) -> SecretStr | None:
        if token is not None and not re.fullmatch(r"[\x21-\x7e]{1,512}", token.get_secret_value()):
            raise ValueError("should be 1 to 512 visible ASCII characters without blanks")
        return token

    @field_validator("models_dir", "state_dir")
    @classmethod
    def _at_home(cls, path: Path) -> Path:
        try:
            return path.expanduser()
        except RuntimeError as failure:
            raise ValueError("names a home directory that cannot be found") from failure

    @classmethod
    def from_environment(cls) -> Self:
        """Read the environment. Raises StartError that names the variable at fault."""
        environment = dict(os.environ)
        given: dict[str, Any] = {}
        if _KUBERNETES_PORT.fullmatch(environment.get("TARE_PORT", "")):
            _log.info("TARE_PORT is what Kubernetes sets for a Service called tare; it is ignored")
            given["port"] = cls.model_fields["port"].default
        _refuse_unknown(environment)
        try:
            return cls(**given)
        except ValidationError as failure:
            first = failure.errors(include_url=False, include_input=False)[0]
            name = PREFIX + "_".join(str(part) for part in first["loc"][:1]).upper()
            message = str(first["msg"]).removeprefix("Value error, ")
            raise StartError(f"{name}: {message[:1].lower()}{message[1:]}") from failure


def names() -> dict[str, str]:
    """Every TARE_ variable that some part of Tare reads, with what it is for."""
    fields = {PREFIX + name.upper(): field.description or "" for name, field in Settings.model_fields.items()}
    return {**fields, **ELSEWHERE}


def collector_is_named() -> bool:
    """Whether OpenTelemetry's standard variables name a collector for traces, and none of them says no."""
    given = {name: value.strip() for name, value in os.environ.items() if name.startswith("OTEL_")}

    def of_traces(name: str) -> str:
        return given.get(f"OTEL_EXPORTER_OTLP_TRACES_{name}") or given.get(f"OTEL_EXPORTER_OTLP_{name}") or ""

    disabled = given.get("OTEL_SDK_DISABLED", "").lower() == "true"
    otherwise = given.get("OTEL_TRACES_EXPORTER", "").lower() not in {"", "otlp"}
    if disabled or otherwise or not of_traces("ENDPOINT"):
        return False
    if of_traces("PROTOCOL") not in {"", "http/protobuf"}:
        _log.warning("no traces: they go by http/protobuf, OTEL_EXPORTER_OTLP_PROTOCOL asks for another way")
        return False
    return True


def _refuse_unknown(environment: dict[str, str]) -> None:
    """pydantic-settings does not see a variable whose name is no field's. Raises StartError."""
    known = names()
    for name in sorted(environment):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in known:
            continue
        if upper in LATER:
            if environment[name]:
                raise StartError(f"{name}: {LATER[upper]}")
            continue
        if _KUBERNETES.fullmatch(name):
            _log.info("%s is what Kubernetes sets for a Service called tare; it is ignored", name)
            continue
        nearest = difflib.get_close_matches(upper, known, n=1, cutoff=0)
        raise StartError(f"{name}: no part of Tare reads this variable; did you mean {nearest[0]}?")
