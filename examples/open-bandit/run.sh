#!/usr/bin/env bash
# Compares `hypercast-lab evaluate policy` with Open Bandit's package, which is fetched with its
# samples into a folder; needs the network, and python3 with venv.
# usage: examples/open-bandit/run.sh FOLDER
set -euo pipefail
folder=${1:?usage: run.sh FOLDER}
cargo build --workspace --bins
python3 -m venv "$folder/python"
# The package is old: with its own dependencies, pip finds no set of versions.
if ! "$folder/python/bin/pip" install --quiet --no-deps obp==0.4.1 ||
  ! "$folder/python/bin/pip" install --quiet numpy pandas pyarrow scikit-learn scipy PyYAML tqdm \
    mypy-extensions; then
  echo "NOTHING WAS COMPARED: the package obp 0.4.1 or what it needs cannot be had" >&2
  exit 1
fi
"$folder/python/bin/python" "$(dirname "$0")/compare.py" \
  --programs "${CARGO_TARGET_DIR:-target}/debug" --into "$folder"
