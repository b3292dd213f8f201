# The control plane: `sapo-ray serve` beside a Ray cluster of its own. No engine, no CUDA.
#   docker build -f docker/control.Dockerfile -t sapo-ray-control .
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE_IMAGE} AS build
WORKDIR /src
COPY requirements/control.lock requirements/cpu.lock requirements/
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir --no-compile --no-deps --requirement requirements/control.lock
# The wheel is built elsewhere, so that setuptools does not get into the image.
COPY pyproject.toml README.md LICENSE ./
COPY sapo_ray sapo_ray
RUN python3 -m venv /opt/build \
    && /opt/build/bin/python -m pip install --no-cache-dir --no-deps "$(grep '^setuptools==' requirements/cpu.lock)" \
    && /opt/build/bin/python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/venv/bin/python -m pip install --no-cache-dir --no-compile --no-deps --no-index /wheels/*.whl \
    && /opt/venv/bin/python -m pip check \
    && /opt/venv/bin/python -m pip uninstall --yes pip setuptools \
    && /opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sapo-ray control plane" \
      org.opencontainers.image.description="Takes training jobs over HTTP and runs them on a Ray cluster" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The same user in all images: run directories on shared storage belong to it.
RUN groupadd --gid 10001 sapo \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin sapo \
    && install -d -o sapo -g sapo -m 0750 /var/lib/sapo-ray
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/sapo \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SAPO_HOST=0.0.0.0 \
    SAPO_PORT=8800 \
    SAPO_DATA_DIR=/var/lib/sapo-ray
USER 10001:10001
WORKDIR /home/sapo
EXPOSE 8800
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/healthz' % os.environ['SAPO_PORT'], timeout=3)"]
ENTRYPOINT ["sapo-ray"]
CMD ["serve"]
