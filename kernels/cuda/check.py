#!/usr/bin/env python3
"""Compiles the tensor-core kernels for NVIDIA GPUs, on a machine without one.

    python3 kernels/cuda/check.py [--work FOLDER] [--json FILE] [--only NAME]

It writes the kernels as CUDA C++ (cargo example `cuda_source`), compiles each with NVRTC to PTX and
with ptxas to machine code, and fails unless every kernel multiplies on tensor cores (mma.sync), loads
fragments with ldmatrix, copies with cp.async and keeps its sums in registers. NVRTC, ptxas and the
headers are NVIDIA's Python wheels in a virtual environment under FOLDER, or those of CUDA_PATH.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

WHEELS = ["nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-cccl-cu12"]
REPOSITORY = Path(__file__).resolve().parents[2]


def toolkit(work):
    """(NVRTC, ptxas, folders of headers)"""
    if "CUDA_PATH" in os.environ:
        root = Path(os.environ["CUDA_PATH"])
        include = root / "include"
        return root / "lib64/libnvrtc.so", root / "bin/ptxas", [include, include / "cccl"]
    folder = work / "venv"
    if not (folder / "bin/python").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin/pip", "install", "--quiet", *WHEELS], check=True)
    [root] = folder.glob("lib/python*/site-packages/nvidia")
    includes = [root / "cuda_runtime/include", root / "cuda_nvcc/include", root / "cuda_cccl/include"]
    return root / "cuda_nvrtc/lib/libnvrtc.so.12", root / "cuda_nvcc/bin/ptxas", includes


class Nvrtc:
    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))

    def call(self, name, *arguments):
        code = getattr(self.library, name)(*arguments)
        if code != 0 and name != "nvrtcCompileProgram":
            raise RuntimeError(f"{name} gave {code}")
        return code

    def text(self, program, what):
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.value.decode()

    def ptx(self, source, options):
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), None, 0, None, None)
        array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        if self.call("nvrtcCompileProgram", program, len(options), array) != 0:
            raise RuntimeError(self.text(program, "ProgramLog"))
        ptx = self.text(program, "PTX")
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return ptx


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--work", type=Path, default=REPOSITORY / "target/cuda-check")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--only", default="", help="kernels whose name has this")
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    library, ptxas, includes = toolkit(options.work)
    nvrtc = Nvrtc(library)
    sources = options.work / "sources"
    command = ["cargo", "run", "--quiet", "-p", "hypercast-kernels", "--features", "cuda"]
    command += ["--example", "cuda_source", "--", str(sources)]
    written = subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.PIPE, text=True)
    results, wrong = [], []
    for kernel in map(json.loads, written.stdout.splitlines()):
        if options.only not in kernel["file"]:
            continue
        # As CubeCL compiles: from 9.0 on for the very architecture.
        name = f"sm_{kernel['capability']}" + ("a" if kernel["capability"] >= 90 else "")
        flags = [f"--gpu-architecture={name}", *(f"--include-path={include}" for include in includes)]
        ptx = nvrtc.ptx((sources / kernel["file"]).read_text(), flags)
        path = (sources / kernel["file"]).with_suffix(".ptx")
        path.write_text(ptx)
        command = [ptxas, "-v", f"-arch={name}", str(path), "-o", str(path.with_suffix(".cubin"))]
        report = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True).stderr
        number = lambda pattern: int(re.search(pattern, report).group(1))
        kernel |= {
            "mma": len(re.findall(r"mma\.sync", ptx)),
            "ldmatrix": len(re.findall(r"ldmatrix", ptx)),
            "cp_async": len(re.findall(r"cp\.async\.c[ga]", ptx)),
            "registers": number(r"Used (\d+) registers"),
            "spilled_bytes": number(r"(\d+) bytes spill stores"),
            "stack_bytes": number(r"(\d+) bytes stack frame"),
        }
        results.append(kernel)
        print(json.dumps(kernel))
        if not (kernel["mma"] and kernel["ldmatrix"] and kernel["cp_async"]):
            wrong.append(f"{kernel['file']} lacks an instruction")
        # The sums by time bucket are indexed at run time, and so in local memory.
        if "biased" not in kernel["file"] and kernel["spilled_bytes"] > 64:
            wrong.append(f"{kernel['file']} spills {kernel['spilled_bytes']} bytes")
        if kernel["shared_bytes"] > kernel["planned_bytes"]:
            wrong.append(f"{kernel['file']} needs more shared memory than planned")
    if options.json:
        options.json.write_text(json.dumps({"compiler": library.name, "results": results}, indent=1))
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
