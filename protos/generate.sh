#!/usr/bin/env bash
# Writes the Python beside each .proto with the one compiler whose output every supported protobuf and grpcio runs.
set -euo pipefail
cd "$(dirname "$0")"

venv="$(mktemp -d)"
trap 'rm -rf "$venv"' EXIT
"${PYTHON:-python3}" -m venv "$venv"
# pkg_resources, which this compiler imports, left setuptools in 81.
"$venv/bin/pip" install --quiet "grpcio-tools==1.62.3" "setuptools<81"
"$venv/bin/python" -m grpc_tools.protoc --proto_path=. \
  --python_out=. --pyi_out=. --grpc_python_out=. forwardpass/v1/*.proto
# Only services have stubs; for the other files this compiler writes an empty module.
for stubs in forwardpass/v1/*_pb2_grpc.py; do
  grep --quiet '^class ' "$stubs" || rm "$stubs"
done
