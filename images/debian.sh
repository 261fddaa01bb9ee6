#!/bin/sh
# Installs Debian packages that are not there yet, and leaves no lists, logs or caches. A base image that has them all
# already needs no network. `gpu` stands for what compiles kernels at run time (Triton's launchers); `cpu` for nothing.
set -eu
wanted=""
for package in "$@"; do
  case "$package" in
    cpu) ;;
    gpu) wanted="$wanted gcc libc6-dev" ;;
    *) wanted="$wanted $package" ;;
  esac
done
missing=""
for package in $wanted; do
  dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
apt-get update -qq
# shellcheck disable=SC2086 # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/cache/ldconfig/* \
  /var/log/apt /var/log/dpkg.log /var/log/alternatives.log
