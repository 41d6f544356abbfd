# The gateway: HTTP and gRPC in, frames decoded, questions answered; and, by another command, the workers of recordings
# (python -m nvila.recordings.app). No torch, no compiler, not root.
#   docker build -f deploy/images/gateway.Dockerfile -t nvila-gateway .
# With s3:// for recordings (RECORDINGS_COLD_URL, source_stores): --build-arg STORES=s3
ARG PYTHON_IMAGE=python:3.11.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY deploy/requirements/overrides.txt deploy/requirements/s3.txt deploy/requirements/
COPY services services
RUN uv venv /opt/nvila \
 && uv pip install --no-cache --python /opt/nvila/bin/python --compile-bytecode \
      --constraint requirements.lock --override deploy/requirements/overrides.txt ".[gateway]"
ARG STORES=""
RUN [ -z "${STORES}" ] || uv pip install --no-cache --no-deps --python /opt/nvila/bin/python --compile-bytecode \
      -r "deploy/requirements/${STORES}.txt"

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --create-home nvila \
 && install -d -o nvila -g nvila /var/lib/nvila
COPY --from=build /opt/nvila /opt/nvila
ENV PATH=/opt/nvila/bin:$PATH PYTHONUNBUFFERED=1
USER nvila
EXPOSE 8080 8081
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health/ready', timeout=2)"]
STOPSIGNAL SIGTERM
CMD ["python", "-m", "nvila.gateway.app"]
