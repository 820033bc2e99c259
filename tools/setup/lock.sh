#!/usr/bin/env bash
# Make the lock files anew: one resolution for every Python from 3.11 and every architecture, hashes, no addresses.
set -euo pipefail
cd "$(dirname "$0")/../.."
.venv/bin/python -m pip install -q uv
mkdir -p requirements
for kind in run dev; do
  extras=(--extra edge --extra hub --extra functions --extra zstd --extra build)
  [ "$kind" = dev ] && extras+=(--extra dev --extra bench --extra fast)
  .venv/bin/uv pip compile -q pyproject.toml "${extras[@]}" --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
    --no-annotate --no-header -o "requirements/$kind.lock"
done
