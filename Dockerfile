# octavo in a container; docs/container.md explains it.
#
#   docker build -t octavo .                                  for CPUs
#   docker build -t octavo:cuda --build-arg DEVICE=cuda .     for NVIDIA GPUs, compute capability 8.0 or newer
#   docker run --rm -p 8000:8000 -v octavo:/models octavo
#
# The distributions keep the packages; their newest are wanted. The stages of DEVICE have no tags.
# hadolint global ignore=DL3006,DL3008

ARG DEVICE=cpu
ARG PYTHON=3.12

# ---- what differs between the devices: the compiler, and what the image starts from ----

FROM python:${PYTHON}-slim-bookworm AS compiler-cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV OCTAVO_CUDA=OFF

FROM nvidia/cuda:12.6.3-devel-ubuntu24.04 AS compiler-cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV OCTAVO_CUDA=ON

FROM python:${PYTHON}-slim-bookworm AS run-cpu
RUN python3 -m venv /opt/octavo
ENTRYPOINT ["octavo"]
CMD ["serve", "--host", "0.0.0.0"]

# The driver is the host's. octavo opens cuBLASLt, and for several GPUs NCCL, where pip has put them.
FROM nvidia/cuda:12.6.3-base-ubuntu24.04 AS run-cuda
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/octavo \
    && /opt/octavo/bin/pip install --no-cache-dir "nvidia-cublas-cu12<13" "nvidia-nccl-cu12>=2.20"
ENTRYPOINT ["octavo"]
CMD ["serve", "--host", "0.0.0.0", "--device", "cuda"]

# ---- builds the wheel; nothing of this stage is in the image but the wheel ----

FROM compiler-${DEVICE} AS build
COPY . /source
RUN python3 -m venv /venv \
    && /venv/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source \
       --config-settings=cmake.define.OCTAVO_CUDA="${OCTAVO_CUDA}"

# ---- the image ----

FROM run-${DEVICE}
RUN useradd --create-home --uid 10001 octavo \
    && mkdir /models && chown octavo /models
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    /opt/octavo/bin/pip install --no-cache-dir /wheels/*.whl
ENV PATH=/opt/octavo/bin:$PATH OCTAVO_HOME=/models HF_HOME=/models/huggingface
USER 10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
