#!/bin/sh
# Generates the stubs in surogatev1/ from the contract. On PATH: protoc, protoc-gen-go and protoc-gen-go-grpc.
#   PROTO_ROOT   folder of the contract, by default this repository's proto/
#   GOOGLEAPIS   folder with google/rpc/status.proto
#   PROTOC       the compiler, by default protoc; "python -m grpc_tools.protoc" is one too
set -eu
cd "$(dirname "$0")"
package=example.org/vowels/surogatev1
for plugin in go go-grpc; do
    set -- "$@" "--${plugin}_out=." "--${plugin}_opt=module=example.org/vowels"
    for file in common reward; do
        set -- "$@" "--${plugin}_opt=Msurogate/v1/$file.proto=$package"
    done
done
${PROTOC:-protoc} "-I${PROTO_ROOT:-../../../proto}" "-I${GOOGLEAPIS:?folder with google/rpc/status.proto}" "$@" \
    surogate/v1/common.proto surogate/v1/reward.proto
