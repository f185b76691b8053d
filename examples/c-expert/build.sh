#!/usr/bin/env bash
# Builds this expert: bindings from the contract, a core module by any clang for Wasm, and a component of it.
# usage: build.sh [OUT.wasm]     The tools are named by WIT_BINDGEN, WASM_CC and HYPERCAST_TOOL; see README.md.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/c_expert.wasm}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
read -r -a cc <<< "${WASM_CC:-python3 -m ziglang cc}"
read -r -a tool <<< "${HYPERCAST_TOOL:-cargo hypercast}"

"${WIT_BINDGEN:-wit-bindgen}" c "$here/../../sdk/wit" --world expert --out-dir "$made" > /dev/null
# A reactor: a library without `main`. Of libc only memory and strings are used, so nothing of WASI is imported.
"${cc[@]}" --target=wasm32-wasi -mexec-model=reactor -Os -Wall -Wextra -Werror -I "$made" \
  "$here/c_expert.c" "$made/expert.c" "$made/expert_component_type.o" -o "$made/c_expert.wasm"
"${tool[@]}" componentize "$made/c_expert.wasm" --out "$out"
