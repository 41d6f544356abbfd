#!/usr/bin/env bash
# Resolve all.in, with overrides.txt, into requirements.lock. Needs uv (https://docs.astral.sh/uv).
#
# Local build tags (torch==2.13.0+cpu) are cut off: which build a version has is the index's choice.
set -euo pipefail
cd "$(dirname "$0")/../.."
command -v uv >/dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 2; }
resolved=$(uv pip compile --quiet --python-version 3.11 --override deploy/requirements/overrides.txt \
  --no-header --no-annotate --no-emit-index-url --no-emit-find-links deploy/requirements/all.in)
{
  echo "# Every package of one development machine, pinned. Made by \`make lock\`; installed with --no-deps."
  sed -E 's/\+[A-Za-z0-9.]+$//; s/ ;.*$//' <<<"$resolved" | LC_ALL=C sort
} >requirements.lock
echo "requirements.lock: $(grep -c '==' requirements.lock) packages"
