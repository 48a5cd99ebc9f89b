#!/usr/bin/env bash
# Protocol checks: lint, no breaking change against the main branch, generated code as committed.
# Needs buf, grpcio-tools and mypy-protobuf on PATH.
set -euo pipefail
cd "$(dirname "$0")/../.."

buf lint
echo "buf lint: ok"

base=""
for candidate in origin/main main; do
    if git cat-file -e "$candidate:proto" 2>/dev/null; then
        base=$(git rev-parse "$candidate")
        break
    fi
done
if [[ -n $base ]]; then
    against=$(mktemp -d)
    trap 'rm -rf "$against"' EXIT
    git archive "$base" proto buf.yaml | tar -x -C "$against"
    buf breaking --against "$against"
    echo "buf breaking against $base: ok"
else
    echo "buf breaking: SKIPPED, no main branch with protocol files here"
fi

generated=$(mktemp -d)
trap 'rm -rf "$generated" "${against:-}"' EXIT
PYTHON=${PYTHON:-python} proto/generate.sh "$generated"
diff -r --exclude=__pycache__ --exclude=__init__.py "$generated/specpool/v1" services/core/specpool/v1 || {
    echo "generated code differs from proto/: run \`make generate\`" >&2
    exit 1
}
echo "generated code: ok"
