#!/usr/bin/env bash
# Regenerates services/core/specpool/v1 from proto/. Needs grpcio-tools and mypy-protobuf.
#   proto/generate.sh [OUTPUT_DIRECTORY]      default: services/core
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-services/core}
python=${PYTHON:-python}
"$python" -m grpc_tools.protoc -Iproto --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" \
    --mypy_grpc_out="$out" proto/specpool/v1/*.proto
