# syntax=docker/dockerfile:1
# Target engine. GPU image: the default; the CUDA libraries come with torch, the driver from the node.
# CPU image: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=""
RUN python -m venv /opt/specpool
ENV PATH=/opt/specpool/bin:$PATH
# torch first: it is large and changes seldom, so that a change of our code reuses its layer.
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url ${TORCH_INDEX}} "torch>=2.11"
COPY pyproject.toml README.md LICENSE /source/
COPY services /source/services
RUN pip install --no-cache-dir "/source[target,kubernetes]"

FROM ${PYTHON_IMAGE}
# A C++ compiler for `compile: true`.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 65532 --user-group --home-dir /var/cache/specpool --create-home --shell /usr/sbin/nologin specpool
COPY --from=build /opt/specpool /opt/specpool
ENV PATH=/opt/specpool/bin:$PATH PYTHONUNBUFFERED=1 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
USER 65532:65532
WORKDIR /var/cache/specpool
EXPOSE 50051 9100
ENTRYPOINT ["specpool"]
CMD ["target"]
