#!/usr/bin/env bash
# Make the lock files anew: one resolution for every Python from 3.11 and every architecture, hashes, no addresses. The same versions for each of them where they can be had (`fewest`): what was checked by one Python is what another
# gets. numpy's newest for 3.13 had declarations that mypy could not read, and nobody could see that under 3.11.
set -euo pipefail
cd "$(dirname "$0")/../.."
.venv/bin/python -m pip install -q uv
mkdir -p requirements
for kind in run dev; do
  extras=(--extra edge --extra hub --extra functions --extra zstd --extra build)
  [ "$kind" = dev ] && extras+=(--extra dev --extra bench --extra fast)
  .venv/bin/uv pip compile -q pyproject.toml "${extras[@]}" --universal --fork-strategy fewest --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
    --no-annotate --no-header -o "requirements/$kind.lock"
done
