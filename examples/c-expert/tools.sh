#!/usr/bin/env bash
# Installs what builds this expert into a folder: the generator of bindings for the contract, and a
# clang for Wasm (Zig's). Put FOLDER/bin into PATH afterwards.
# usage: tools.sh FOLDER
set -euo pipefail
folder=${1:?usage: tools.sh FOLDER}
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet ziglang
cargo install --debug --quiet --root "$folder" --no-default-features --features c \
  wit-bindgen-cli@0.61.1
