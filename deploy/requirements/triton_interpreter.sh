#!/usr/bin/env bash
# Run the tests of the Triton-language kernels in Triton's interpreter, without a GPU: triton_interpreter.sh FOLDER
#
# The compiler is installed into FOLDER (about 1 GB) and not into the environment: nothing but these tests wants it where
# there is no GPU. vLLM's build for processors finds it, finds no processor backend in it, and says so at every start.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:?usage: triton_interpreter.sh FOLDER}
python=.venv/bin/python

[ -d "$folder/triton" ] || "$python" -m pip install --quiet --no-deps --disable-pip-version-check --target "$folder" triton==3.9.0
TRITON_INTERPRET=1 PYTHONPATH="$folder" "$python" -m pytest -q tests/model/test_int8_cuda.py
