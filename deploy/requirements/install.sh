#!/usr/bin/env bash
# Make a virtual environment with everything one development machine needs: install.sh FOLDER
#
# Every version is in requirements.lock; --no-deps, because some packages declare needs that clash or that only a GPU
# host has (deploy/requirements/overrides.txt says which, and why).
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${1:?usage: install.sh FOLDER}
log=$venv/install.log

say() { printf '\033[1mset-up\033[0m  %s\n' "$*"; }
fail() { printf '\033[1;31mset-up\033[0m  %s\n' "$@" >&2; exit 1; }
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
is_usable() { case $(version_of "$1") in 3.11 | 3.12) ;; *) return 1 ;; esac; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3 python}; do
    if is_usable "$candidate"; then echo "$candidate"; return; fi
  done
  fail "nvila needs Python 3.11 or 3.12 (NumPy 1.26, which Triton's Python backend needs, has no later build);" \
    "found: ${PYTHON:-python3} $(version_of "${PYTHON:-python3}" || echo 'none that starts')." \
    "Install one, or name it: make install PYTHON=/path/to/python3.11"
}

# Run pip quietly, and say how far it is: on a terminal in one moving line, otherwise every fifty packages.
install_locked() {
  local total seen=0 said=0 pip_pid
  total=$(grep -c '==' requirements.lock)
  : >"$log"  # the loop below may read it before pip has begun
  "$venv/bin/python" -m pip install --no-deps --no-input --disable-pip-version-check --progress-bar off \
    -r requirements.lock >"$log" 2>&1 &
  pip_pid=$!
  trap 'kill $pip_pid 2>/dev/null' EXIT
  while kill -0 $pip_pid 2>/dev/null; do
    seen=$(grep -cE '^(Collecting|Requirement already satisfied)' "$log" || true)
    if [ -t 1 ]; then
      printf '\r\033[1mset-up\033[0m  %3d of %d packages fetched%s' "$seen" "$total" \
        "$(grep -q '^Installing' "$log" && echo '; writing them' || true)"
    elif [ "$seen" -ge $((said + 50)) ]; then
      say "$seen of $total packages fetched"; said=$seen
    fi
    sleep 0.5
  done
  trap - EXIT
  [ ! -t 1 ] || printf '\r\033[K'
  wait $pip_pid || { grep -E '^ERROR' "$log" >&2 || tail -5 "$log" >&2; fail "pip could not install requirements.lock; all it said is in $log"; }
}

torch_works() { "$venv/bin/python" -c 'import torch' >>"$log" 2>&1; }

# Whether somebody chose where packages come from; then no other place is tried.
has_own_index() {
  [ -n "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}" ] || "$venv/bin/python" -m pip config list 2>/dev/null | grep -q 'index-url'
}

# PyPI's torch is the CUDA build, which cannot start without the libraries that --no-deps leaves out.
settle_torch() {
  local cpu=https://download.pytorch.org/whl/cpu
  torch_works && return
  "$venv/bin/python" -m pip uninstall -q -y torch >>"$log" 2>&1
  if ! has_own_index; then
    say "this torch is the CUDA build without its libraries; taking the CPU build from $cpu"
    "$venv/bin/python" -m pip install -q --no-deps --no-input --disable-pip-version-check --extra-index-url "$cpu" \
      "$(grep '^torch==' requirements.lock)" >>"$log" 2>&1 && torch_works && return
  fi
  fail "torch was installed but does not start: the index offers the CUDA build, without its libraries." \
    "Run: make install PIP_EXTRA_INDEX_URL=$cpu"
}

began=$SECONDS
if [ ! -x "$venv/bin/python" ]; then
  python=$(find_python)
  say "making $venv with Python $(version_of "$python")"
  "$python" -m venv "$venv" || fail "python -m venv failed (on Debian and Ubuntu: apt install python3-venv)"
fi
is_usable "$venv/bin/python" || fail "$venv has Python $(version_of "$venv/bin/python"), which is not 3.11 or 3.12; run: make clean"
say "installing $(grep -c '==' requirements.lock) pinned packages (3.5 GB; a few minutes the first time)"
install_locked
settle_torch
"$venv/bin/python" -m pip install -q --no-deps --no-build-isolation --no-input --disable-pip-version-check -e . >>"$log" 2>&1 ||
  { tail -5 "$log" >&2; fail "nvila itself could not be installed; all pip said is in $log"; }
say "ready after $((SECONDS - began)) s"
