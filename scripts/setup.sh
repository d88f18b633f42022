#!/usr/bin/env bash
# Create .venv in the project root and install the project with the pinned versions.
# Needs Python 3.11 or newer and bash. Quick when nothing changed, safe to interrupt and to run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STAMP=$VENV/step35-setup # first line: where it was set up, second line: what was installed
UNFINISHED=$VENV/step35-unfinished # an interrupted install leaves half a package that looks whole
# Some pinned packages have no wheel for newer Pythons.
SUPPORTED='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))'
NEWER='import sys; sys.exit(sys.version_info < (3, 13))'
HAS_VENV='import ensurepip, venv'
KEY='import hashlib, sys
inputs = b"".join(open(name, "rb").read() for name in sys.argv[1:])
print(sys.version.split()[0], hashlib.sha256(inputs).hexdigest())'

die() {
  echo "setup: $*" >&2
  exit 1
}

run_step() { # run_step LABEL COMMAND...
  local label=$1 start=$SECONDS
  shift
  echo "setup: $label ..."
  "$@" || die "$label failed; scripts/setup.sh may be run again"
  echo "setup: $label: done in $((SECONDS - start)) s"
}

stamp() {
  echo "$PWD"
  "$VENV/bin/python" -I -S -c "$KEY" pyproject.toml constraints.txt scripts/setup.sh
}

up_to_date() { [ -f "$STAMP" ] && [ "$(stamp 2>/dev/null)" = "$(cat "$STAMP")" ]; }

# Scripts in a virtual environment hold its path, so a moved one is made anew, as is one left half installed.
venv_usable() {
  "$VENV/bin/python" -I -S -c "$SUPPORTED" 2>/dev/null && [ ! -f "$UNFINISHED" ] || return 1
  [ ! -f "$STAMP" ] || [ "$(head -n 1 "$STAMP")" = "$PWD" ]
}

find_python() { # find_python CHECK: the first interpreter on PATH that passes it
  local name
  for name in python3 python3.12 python3.11 python3.13 python3.14 python; do
    if "$name" -c "$1" 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  return 1
}

make_venv() {
  local python newer=
  python=$(find_python "$SUPPORTED") || newer=$(find_python "$NEWER") ||
    die "Python 3.11 or newer is needed; found: $(python3 -V 2>&1 || true)"
  python=${python:-$newer}
  "$python" -c "$HAS_VENV" 2>/dev/null ||
    die "$python has no venv module (Debian, Ubuntu: apt install python3-venv)"
  "$python" -m venv --clear "$VENV" || return 1
  [ -z "$newer" ] || replace_with_supported
}

replace_with_supported() {
  echo "setup: $("$VENV/bin/python" -V) is too new for some pinned packages, uv fetches Python 3.12"
  install_uv && "$VENV/bin/uv" venv --quiet --seed --clear --python 3.12 "$VENV"
}

install_uv() {
  ! "$VENV/bin/uv" --version >/dev/null 2>&1 || return 0
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
}

install_project() {
  local quiet=--quiet
  [ ! -t 2 ] || quiet= # on a terminal uv draws its progress
  touch "$UNFINISHED"
  "$VENV/bin/uv" pip install ${quiet:+"$quiet"} --python "$VENV/bin/python" \
    -c constraints.txt -b constraints.txt -e '.[test]' && rm "$UNFINISHED"
}

# Writes the byte code that each of a server's three processes would otherwise compile, and shows that SGLang imports.
import_once() {
  env -u PYTHONDONTWRITEBYTECODE "$VENV/bin/python" -W ignore -c \
    'import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler'
}

if up_to_date; then
  exit 0
fi
fresh=false
if venv_usable; then
  echo "setup: using the virtual environment in $VENV"
else
  run_step "virtual environment in $VENV" make_venv
  fresh=true
fi
rm -f "$STAMP"
run_step "uv" install_uv
run_step "sglang-step35 and its pinned packages (about 5 GB on a fresh machine)" install_project
if $fresh; then
  run_step "first import of SGLang" import_once
fi
stamp >"$STAMP.new"
mv "$STAMP.new" "$STAMP"
echo "setup: ready after $SECONDS s"
