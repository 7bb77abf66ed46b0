# The service as an image: `docker build --target cpu -t tare:cpu .`, or --target gpu for NVIDIA cards.
# No torch, no compiler, no tests in either. docs/operations.md says how to run it.

# Both targets start from one image: the CUDA libraries come as Python wheels, the driver from the host.
FROM python:3.11-slim AS base
# The slim image ships its standard library without byte-code; compiled here once, since the root may be
# read-only later. The user is a number so that an orchestrator can see that it is not root.
RUN python -m compileall -q -x 'test|idlelib|lib2to3|ensurepip|site-packages' /usr/local/lib/python3.11 \
    && useradd --uid 10001 --user-group --home-dir /tmp --no-create-home --shell /usr/sbin/nologin tare \
    && mkdir /app /state && chown 10001:10001 /state
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1 \
    TARE_HOST=0.0.0.0 \
    TARE_STATE_DIR=/state
WORKDIR /app
EXPOSE 8000
# Alive, not ready: a service that cannot answer says why on /readyz, and a restart would not help it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 CMD ["python", "healthcheck.py", "/healthz"]
CMD ["python", "-m", "service"]

# Dependencies by name, from pyproject.toml alone: they are installed again only when their list changes. The version
# goes along, where Python looks for it.
FROM base AS requirements
WORKDIR /requirements
COPY pyproject.toml .
RUN python -c "import pathlib, tomllib; \
project = tomllib.loads(pathlib.Path('pyproject.toml').read_text())['project']; \
[pathlib.Path(extra).write_text('\n'.join(project['dependencies'] + project['optional-dependencies'][extra])) \
 for extra in ('cpu', 'gpu')]; \
pathlib.Path('tare.dist-info').mkdir(); \
pathlib.Path('tare.dist-info/METADATA').write_text('Name: tare\nVersion: ' + project['version'] + '\n')"

# Our code, readable whatever umask the checkout was made under; byte-code that ignores file times, which
# copies between stages may change.
FROM base AS code
COPY longtail longtail
COPY bundle bundle
COPY service service
COPY models models
COPY deploy/healthcheck.py .
COPY --from=requirements /requirements/tare.dist-info tare.dist-info
RUN python -m compileall -q --invalidation-mode unchecked-hash longtail bundle service && chmod -R a+rX .

FROM base AS gpu
COPY --from=requirements /requirements/gpu /opt/requirements.txt
RUN --mount=type=cache,target=/pip python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python --cache-dir /pip install --root-user-action=ignore -r /opt/requirements.txt
COPY --from=code /app /app
# The GPU was asked for by name, so it is not replaced by the CPU unnoticed: without one, /readyz says why.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TARE_PROVIDER=cuda
VOLUME /state
USER 10001:10001

# Last, so that a build without --target makes it.
FROM base AS cpu
COPY --from=requirements /requirements/cpu /opt/requirements.txt
RUN --mount=type=cache,target=/pip python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python --cache-dir /pip install --root-user-action=ignore -r /opt/requirements.txt
COPY --from=code /app /app
VOLUME /state
USER 10001:10001
