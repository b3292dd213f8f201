# A node of the Ray cluster with NVIDIA GPUs. CUDA comes with the packages, the driver (580 or newer) with the node.
#   docker build -f docker/worker-gpu.Dockerfile -t sapo-ray-worker-gpu .
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE_IMAGE} AS build
# Packages of the distribution come at the versions of the day; everything else is locked.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY requirements/gpu.lock requirements/
COPY scripts/check_torch.py scripts/
# torch first and by itself: deepspeed builds against it. Without --no-deps pip would resolve again (requirements/README.md).
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --no-cache-dir --no-compile --no-deps "$(grep '^torch==' requirements/gpu.lock)"
RUN grep -v -E '^(#|torch==|deepspeed==)' requirements/gpu.lock > rest.txt \
    && /opt/venv/bin/python -m pip install --no-cache-dir --no-compile --no-deps --requirement rest.txt \
    && DS_BUILD_OPS=0 DS_ACCELERATOR=cpu /opt/venv/bin/python -m pip install --no-cache-dir --no-compile --no-deps \
        --no-build-isolation "$(grep '^deepspeed==' requirements/gpu.lock)" \
    && /opt/venv/bin/python scripts/check_torch.py gpu
COPY pyproject.toml README.md LICENSE ./
COPY sapo_ray sapo_ray
# Bytecode now: without it the first import of vLLM takes 25 s. Templates among the files do not compile.
RUN /opt/venv/bin/python -m pip install --no-cache-dir --no-compile --no-deps --no-build-isolation . \
    && { /opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib > /dev/null 2>&1 || true; }

FROM ${BASE_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="sapo-ray worker, GPU" \
      org.opencontainers.image.description="Ray node with vLLM and DeepSpeed on NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# g++: Triton and torch compile kernels at run time; wget: the probes that KubeRay adds.
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
# Whoever reaches a Ray without a token can run code in it. Which GPUs a container sees is Kubernetes' and Docker's to say.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/home/sapo \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    CUDA_HOME=/opt/venv/lib/python3.11/site-packages/nvidia/cu13 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SAPO_ACCELERATOR=gpu
USER 10001:10001
WORKDIR /home/sapo
# 6379 GCS, 8265 dashboard and Jobs API, 10001 Ray client
EXPOSE 6379 8265 10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=5 \
    CMD ["sh", "-c", "wget -q --tries=1 --timeout=3 -O- http://127.0.0.1:52365/api/local_raylet_healthz | grep -q success"]
CMD ["ray", "start", "--head", "--block"]
