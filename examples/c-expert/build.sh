#!/usr/bin/env bash
# Builds this expert: generates bindings from the contract, compiles a core module with clang, and
# wraps it into a component.
# usage: build.sh [OUT.wasm]
# WIT_BINDGEN, WASM_CC and HYPERCAST_TOOL set the tools to use; see README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/c_expert.wasm}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
read -r -a cc <<< "${WASM_CC:-python3 -m ziglang cc}"
read -r -a tool <<< "${HYPERCAST_TOOL:-cargo hypercast}"

"${WIT_BINDGEN:-wit-bindgen}" c "$here/../../sdk/wit/2.0.0" --world expert --out-dir "$made" > /dev/null
# A reactor is a library without `main`. The code uses only memory and string functions of libc, so
# the module does not import WASI.
"${cc[@]}" --target=wasm32-wasi -mexec-model=reactor -Os -Wall -Wextra -Werror -I "$made" \
  "$here/c_expert.c" "$made/expert.c" "$made/expert_component_type.o" -o "$made/c_expert.wasm"
"${tool[@]}" componentize "$made/c_expert.wasm" --out "$out"
