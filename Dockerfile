# syntax=docker/dockerfile:1
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt build hatchling
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN python -m build --wheel --no-isolation --outdir /wheels

FROM ${PYTHON_IMAGE}
# With a compiler, training on a CPU takes fused kernels.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /opt/lorasmith/
# The CPU build; --build-arg TORCH_INDEX=https://pypi.org/simple takes the one with CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --constraint /opt/lorasmith/constraints.txt --no-deps --index-url ${TORCH_INDEX} torch
ARG EXTRAS=all
COPY --from=wheel /wheels /opt/lorasmith/wheels
RUN pip install --no-cache-dir --constraint /opt/lorasmith/constraints.txt "$(ls /opt/lorasmith/wheels/*.whl)[${EXTRAS}]"

# Volumes are mounted over both folders, and take over this owner.
RUN useradd --uid 10001 --no-create-home --home-dir /cache lorasmith \
    && install --directory --owner=lorasmith --group=lorasmith --mode=0700 /data /cache
ENV LORASMITH_HOME=/data \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/cache
USER 10001:10001
WORKDIR /data
EXPOSE 8420
# http.client, since urllib would ask the proxy of HTTP_PROXY for this address.
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8420, timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
CMD ["lorasmith", "serve", "--host", "0.0.0.0", "--port", "8420"]
