"""`python -m benchmarks.kernels --op grouped_gemm`: a kernel beside its contenders, in one run.

GPU time is often scarcer than any other: `--lower-to DIR` lowers every JAX program on a machine
without a GPU, `--lowered DIR` then only compiles and times them.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from benchmarks import timing
from pallas_kernels import picks

RESULTS = Path(__file__).parent / "results"
OPERATIONS = (
    "grouped_gemm",
    "grouped_gemm_float8",
    "grouped_gemm_layer",
    "mla",
    "paged_attention",
    "prefill",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--op", required=True, choices=OPERATIONS)
    parser.add_argument("--tune", action="store_true", help="try every configuration of ours")
    parser.add_argument("--lower-to", type=Path, metavar="DIR")
    parser.add_argument("--lowered", type=Path, metavar="DIR")
    parser.add_argument("--num-sms", type=int, help="of the GPU; needed to lower without one")
    parser.add_argument("--seconds", type=float, default=600, help="skip what starts later")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    op = importlib.import_module(f"benchmarks.{options.op}")
    if options.lower_to:
        if options.num_sms is None:
            parser.error("--lower-to needs --num-sms, of the GPU that will run it: 132 for an H200")
        options.lower_to.mkdir(parents=True, exist_ok=True)
        op.lower(options.lower_to, tune=options.tune, num_sms=options.num_sms)
        return
    # JAX would take nearly all of the GPU's memory when it starts; torch runs beside it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if not picks.is_hopper(jax.devices()[0]):
        parser.error(
            f"the kernels need a Hopper GPU, and this is {jax.devices()[0].device_kind}; "
            "--lower-to prepares their programs without one"
        )
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        torch_path = Path(scratch, "torch.json")
        torch_run = _start_torch(options.op, torch_path)
        folder = options.lowered
        if folder is None:
            folder = Path(scratch)
            op.lower(folder, tune=options.tune, num_sms=jax.devices()[0].core_count)
        compiled = op.compile_all(folder)
        print(f"{len(compiled)} programs after {time.monotonic() - begin:.0f} s", flush=True)
        if torch_run:
            _wait(torch_run, options.seconds)
        torch_results = json.loads(torch_path.read_text()) if torch_path.exists() else {}
    print(f"measuring after {time.monotonic() - begin:.0f} s", flush=True)
    limits = timing.ceilings()
    rows = []
    shapes = {shape.name: shape for shape in op.SHAPES}
    for row in torch_results.pop("rows", []):
        if "us" in row:
            shape = shapes[row["shape"]]
            row |= op.rates(shape, shape.group_sizes(row["distribution"]), row["us"], limits)
        rows.append(row)
    versions = {"jax": jax.__version__, **torch_results}
    for row in op.measure(compiled, limits, seconds=options.seconds - (time.monotonic() - begin)):
        print(*row.values(), flush=True)
        rows.append(row)
        # A run that is stopped keeps what it measured.
        write(options.op, rows, versions, limits, options.out)


def _start_torch(op: str, path: Path) -> subprocess.Popen | None:
    """Times the torch contenders in a process of their own, while JAX's programs compile."""
    module = f"benchmarks.{op}_torch"
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec(module)):
        return None
    return subprocess.Popen([sys.executable, "-m", module, str(path)])


def _wait(torch_run: subprocess.Popen, seconds: float) -> None:
    """Waits for the torch contenders; without them the others are measured all the same."""
    try:
        torch_run.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        torch_run.kill()
        torch_run.wait()
        print(f"torch's contenders took more than {seconds:.0f} s and are left out", flush=True)


def write(op: str, rows: list[dict], versions: dict, limits: dict, folder: Path) -> None:
    """Writes the rows as JSON, and as a Markdown table with the fastest first in each shape."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = jax.devices()[0].device_kind
    stem = f"{op}-{gpu.replace(' ', '-')}-{time.strftime('%Y-%m-%d')}"
    head = {"gpu": gpu, "date": time.strftime("%Y-%m-%d"), "versions": versions, "limits": limits}
    (folder / f"{stem}.json").write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(markdown(op, head, rows))


def markdown(op: str, head: dict, rows: list[dict]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [
        f"# {op} on {head['gpu']}, {head['date']}",
        "",
        f"{versions}. Copy {head['limits']['copy_gbps']:.0f} GB/s, bfloat16 "
        f"{head['limits']['tflops']:.0f} TFLOP/s, measured in this run.",
        "",
        "| shape | sizes | contender | us | GB/s | TFLOP/s | % of roofline | relative error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = list(dict.fromkeys((row["shape"], row["distribution"]) for row in rows))
    for case in order:
        mine = [r for r in rows if (r["shape"], r["distribution"]) == case]
        for row in sorted(mine, key=lambda r: r.get("us", float("inf"))):
            cells = [row.get(key, "failed") for key in ("us", "gbps", "tflops", "roofline_pct")]
            error = f"{row['error']:.1e}" if "error" in row else row["failed"]
            cells = [*case, row["contender"], *cells, error]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
