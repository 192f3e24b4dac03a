# octavo in a container; docs/container.md explains it.
#
#   docker build -t octavo .                           for CPUs
#   docker build -t octavo:cuda --target cuda .        for NVIDIA GPUs of compute capability 8.0 and 9.0
#   docker run --rm -p 8000:8000 -v octavo:/models octavo

ARG PYTHON=3.12

# ---- builds the wheel; nothing of this stage is in the image but the wheel ----

FROM python:${PYTHON}-slim-bookworm AS build-cpu
# The distribution keeps its packages; their newest are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source -Ccmake.define.OCTAVO_CUDA=OFF

FROM nvidia/cuda:12.6.3-devel-ubuntu24.04 AS build-cuda
# The distribution keeps its packages; their newest are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN python3 -m venv /venv \
    && /venv/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source \
       -Ccmake.define.OCTAVO_CUDA=ON

# ---- for NVIDIA GPUs: the driver is the host's, so the image has the runtime alone ----

FROM nvidia/cuda:12.6.3-base-ubuntu24.04 AS cuda
# The distribution keeps its packages; their newest are wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 octavo \
    && mkdir /models && chown octavo /models
RUN --mount=type=bind,from=build-cuda,source=/wheels,target=/wheels \
    python3 -m venv /opt/octavo \
    && /opt/octavo/bin/pip install --no-cache-dir /wheels/*.whl
ENV PATH=/opt/octavo/bin:$PATH OCTAVO_HOME=/models
USER 10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["octavo"]
CMD ["serve", "--host", "0.0.0.0", "--device", "cuda"]

# ---- for CPUs; the last stage is the one that `docker build .` makes ----

FROM python:${PYTHON}-slim-bookworm AS cpu
RUN useradd --create-home --uid 10001 octavo \
    && mkdir /models && chown octavo /models
RUN --mount=type=bind,from=build-cpu,source=/wheels,target=/wheels \
    python3 -m venv /opt/octavo \
    && /opt/octavo/bin/pip install --no-cache-dir /wheels/*.whl
ENV PATH=/opt/octavo/bin:$PATH OCTAVO_HOME=/models
USER 10001
VOLUME /models
EXPOSE 8000
HEALTHCHECK --start-period=5m CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["octavo"]
CMD ["serve", "--host", "0.0.0.0"]
