"""`python -m benchmarks.compile_kernels`: what ptxas makes of every Hopper kernel, without a GPU.

Prints registers at a thread's start, spills and shared memory. It needs a C compiler, the CUDA
toolkit, and JAX's plugin for CUDA in jaxlib's version:

    uv run --with jax-cuda13-plugin --with jax-cuda13-pjrt python -m benchmarks.compile_kernels
"""

import argparse
import contextlib
import ctypes
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax

from benchmarks.shipped_kernels import shipped_kernels

DRIVER = """
#include <stdio.h>
int cuInit(unsigned flags) { return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : 0; /* compute capability 9.0 */
  return 0;
}
int cuGetErrorString(int error, const char **text) { *text = "no driver"; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = (void *)1; return 0; }
int cuFuncSetAttribute(void *f, int attribute, int value) {
  if (attribute == 8) dprintf(1, "%d bytes dynamic smem\\n", value);
  return 0;
}
"""
"""As much of the driver as a compilation asks for. It says how much shared memory is wanted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="compile the kernels whose names have them all")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        plugin = _load_plugin(Path(scratch))
    print("| kernel | registers | spill stores, bytes | spill loads | shared memory | remarks |")
    print("|---|---|---|---|---|---|")
    failed = []
    for name, run, arguments in shipped_kernels():
        if not all(word in name for word in options.words):
            continue
        lowered = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",))
        program: Any = lowered.compiler_ir()
        for module in _mosaic_modules(program.operation):
            report = _compile(plugin, module)
            print(f"| {name} | {_row(report) if report else 'does not compile'} |", flush=True)
            failed += [name] * (report is None)
    sys.exit(f"ptxas refuses {', '.join(failed)}" if failed else None)


def _load_plugin(scratch: Path) -> ctypes.CDLL:
    """JAX's plugin, which compiles kernels, over a driver that only knows what a Hopper is."""
    try:
        from jax_plugins import xla_cuda13  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        packages = [f"jax-cuda13-{part}=={jax.__version__}" for part in ("plugin", "pjrt")]
        raise SystemExit(f"Install {' and '.join(packages)}, which compile kernels.") from error
    library = scratch / "libcuda.so.1"
    source = scratch / "driver.c"
    source.write_text(DRIVER)
    link = ["-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    subprocess.run(["cc", *link, "-o", library, source], check=True)
    # Whoever opens libcuda.so.1 later gets the library of this name that is open.
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    plugin = ctypes.CDLL(str(xla_cuda13._get_library_path()))
    plugin.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
    plugin.MosaicGpuCompile.restype = ctypes.c_void_p
    return plugin


def _mosaic_modules(operation: Any) -> Iterator[bytes]:
    """The Mosaic kernels that a program calls."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                attributes = inner.operation.attributes
                if "mosaic_gpu" in str(attributes.get("call_target_name", "")):
                    yield attributes["mhlo.backend_config"]["module"].value_bytes
                yield from _mosaic_modules(inner.operation)


def _compile(plugin: ctypes.CDLL, module: bytes) -> str | None:
    """Compiles a kernel to machine code and returns the report, or None if it is refused."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    with _captured_output() as report:
        compiled = plugin.MosaicGpuCompile(module, len(module))
        report.seek(0)
        text = report.read()
    return text if compiled else None


@contextlib.contextmanager
def _captured_output() -> Iterator[TextIO]:
    """What the process prints, C++ included."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w+") as report:
        os.dup2(report.fileno(), 1)
        try:
            yield report
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _row(report: str) -> str:
    patterns = (
        r"Used (\d+) registers",
        r"frame, (\d+) bytes spill stores",
        r"frame, \d+ bytes spill stores, (\d+) bytes spill loads",
        r"(\d+) bytes dynamic smem",
    )
    numbers = [str(sum(map(int, re.findall(pattern, report)))) for pattern in patterns]
    remark = "products one after the other" if "are serialized" in report else ""
    return " | ".join([*numbers, remark])


if __name__ == "__main__":
    main()
