#!/usr/bin/env bash
# Builds the images: images/build.sh [TARGET…] (default: all four), with the first of docker, podman and buildah that works.
#   ENGINE         one of them, rather than the first that works
#   VARIANT        cpu (default) or gpu
#   REPOSITORY     before the names, for example registry.example.org/team (default: none)
#   TAG            after them (default: the version in pyproject.toml; gpu images get -gpu)
#   PYTHON_IMAGE   another base, by digest
#   WHEELS         folder of wheels within the repository, to build without a package index
#   PIP_CONFIG     pip's configuration, for an index of your own
#   ENGINE_FLAGS   more flags for the builder
# SOURCE_DATE_EPOCH is the time of the last commit unless it is set: the same commit and base give the same layers.
set -euo pipefail
cd "$(dirname "$0")/.."

works() { # ENGINE
  command -v "$1" >/dev/null || return 1
  [ "$1" != docker ] || docker info >/dev/null 2>&1
}

engine=${ENGINE:-}
if [ -z "$engine" ]; then
  for candidate in docker podman buildah; do
    if works "$candidate"; then engine=$candidate; break; fi
  done
fi
if [ -z "$engine" ]; then
  echo "no builder of images that works: install Docker, podman or buildah (Debian: apt install buildah)" >&2
  exit 1
fi

variant=${VARIANT:-cpu}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
tag=${TAG:-$version$([ "$variant" = cpu ] || echo "-$variant")}
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 0)}

arguments=(--file images/Dockerfile --build-arg "VARIANT=$variant" --build-arg "VERSION=$version"
  --build-arg "REVISION=$revision")
[ -z "${PYTHON_IMAGE:-}" ] || arguments+=(--build-arg "PYTHON_IMAGE=$PYTHON_IMAGE")
[ -z "${WHEELS:-}" ] || arguments+=(--build-arg "WHEELS=$WHEELS")
[ -z "${PIP_CONFIG:-}" ] || arguments+=(--secret "id=pip,src=$PIP_CONFIG")

case "$engine" in
  docker) command=(docker buildx build --load) ;;
  podman) command=(podman build --layers --timestamp "$SOURCE_DATE_EPOCH") ;;
  buildah) command=(buildah bud --layers --timestamp "$SOURCE_DATE_EPOCH") ;;
  *) echo "ENGINE=$engine: must be docker, podman or buildah" >&2; exit 1 ;;
esac

[ $# -gt 0 ] || set -- orchestrator reward trainer inference
for target in "$@"; do
  image=${REPOSITORY:+$REPOSITORY/}surogate-$target:$tag
  echo "building $image with $engine"
  # shellcheck disable=SC2086 # flags, as words
  "${command[@]}" ${ENGINE_FLAGS:-} "${arguments[@]}" --target "$target" --tag "$image" .
done
