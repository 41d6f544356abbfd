# The vision service: Triton Inference Server with our Python backend. Not root.
#   docker build -f deploy/images/vision.Dockerfile -t nvila-vision .
# For GPUs take NVIDIA's image, which brings the server, CUDA and Python 3.12 (deploy/compose/gpu.yml does):
#   --build-arg BASE_IMAGE=nvcr.io/nvidia/tritonserver:25.01-py3 --build-arg SERVER= --build-arg TORCH_INDEX=
# Otherwise the server is the one inside the wheel nvidia-pytriton, for processors.
ARG BASE_IMAGE=python:3.11.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
ARG SERVER=nvidia-pytriton==0.7.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY deploy/requirements/overrides.txt deploy/requirements/
COPY services services
# A GPU build needs what overrides.txt leaves out (torch's CUDA libraries), so there only NumPy stays overridden.
RUN uv venv --python "$(command -v python3)" /opt/nvila \
 && if [ -n "$TORCH_INDEX" ]; then cp deploy/requirements/overrides.txt /tmp/overrides.txt; \
    else grep '^numpy' deploy/requirements/overrides.txt >/tmp/overrides.txt; fi \
 && uv pip install --no-cache --python /opt/nvila/bin/python --compile-bytecode \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX" --index-strategy unsafe-best-match} \
      --constraint requirements.lock --override /tmp/overrides.txt ".[vision]" \
 && if [ -n "$SERVER" ]; then uv pip install --no-cache --no-deps --python /opt/nvila/bin/python "$SERVER"; fi

FROM ${BASE_IMAGE}
RUN useradd --uid 10001 --create-home nvila
COPY --from=build /opt/nvila /opt/nvila
ENV PATH=/opt/nvila/bin:$PATH PYTHONUNBUFFERED=1
USER nvila
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=5s --timeout=3s --start-period=300s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT []
CMD ["python", "-m", "nvila.vision.serve"]
