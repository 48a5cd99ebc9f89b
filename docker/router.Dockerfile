# syntax=docker/dockerfile:1
# Router: no torch, no models.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
RUN python -m venv /opt/specpool
ENV PATH=/opt/specpool/bin:$PATH
COPY pyproject.toml README.md LICENSE /source/
COPY services /source/services
RUN pip install --no-cache-dir "/source[router,kubernetes]"

FROM ${PYTHON_IMAGE}
RUN useradd --uid 65532 --user-group --no-create-home --shell /usr/sbin/nologin specpool
COPY --from=build /opt/specpool /opt/specpool
ENV PATH=/opt/specpool/bin:$PATH PYTHONUNBUFFERED=1
USER 65532:65532
EXPOSE 50051 9100
ENTRYPOINT ["specpool"]
CMD ["router"]
