#!/usr/bin/env bash
# Installs, from Debian's packages, what the linters and tests need and is no Python package, where it is missing.
set -euo pipefail

missing=()
# buf, which checks the protocol, and kubectl, which renders the manifests, are npm packages.
command -v npx >/dev/null || missing+=(nodejs npm)
# The session store that servers share is tested on a real Redis, rules and dashboard on a real Prometheus, the status
# page in a real Chromium.
command -v redis-server >/dev/null || missing+=(redis-server)
command -v promtool >/dev/null || missing+=(prometheus)
command -v chromium >/dev/null || missing+=(chromium)
# The code blocks of deploy/README.md run in a test, and one calls curl.
command -v curl >/dev/null || missing+=(curl)
[ ${#missing[@]} -gt 0 ] || exit 0

echo "installing ${missing[*]}"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
  as_root=(sudo)
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq "${missing[@]}" >/dev/null
