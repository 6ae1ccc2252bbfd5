"""Grouped GEMM in torch: `grouped_mm`, a cuBLAS loop and a Triton kernel, each in a CUDA graph.

`python -m benchmarks.grouped_gemm_torch OUT.json`. The copy and matmul ceilings are not measured
here: the caller turns microseconds into shares of its own.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false

import json
import statistics
import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from benchmarks.grouped_gemm import DISTRIBUTIONS, SHAPES, Shape, sample_rows


@triton.jit
def _grouped(x, w, starts, y, n: tl.constexpr, k: tl.constexpr, bm: tl.constexpr, bn: tl.constexpr, bk: tl.constexpr):  # fmt: skip  # noqa: E501
    """One program for each row tile, column tile and group; tiles past a group's end leave."""
    group = tl.program_id(2).to(tl.int64)
    end = tl.load(starts + group + 1)
    row = tl.load(starts + group) + tl.program_id(0) * bm
    if row < end:
        rows = (row + tl.arange(0, bm)).to(tl.int64)[:, None]
        cols = (tl.program_id(1) * bn + tl.arange(0, bn)).to(tl.int64)[None, :]
        inner = tl.arange(0, bk)
        sums = tl.zeros((bm, bn), dtype=tl.float32)
        for block in range(k // bk):
            depth = block * bk + inner
            a = tl.load(x + rows * k + depth[None, :], mask=rows < end, other=0.0)
            b = tl.load(w + (group * k + depth[:, None]) * n + cols)
            sums = tl.dot(a, b, sums)
        tl.store(y + rows * n + cols, sums.to(y.dtype.element_ty), mask=rows < end)


def contenders(shape: Shape, sizes: np.ndarray, x, w, out) -> Iterator[tuple[str, Callable]]:
    """Name and call of each torch contender on these operands."""
    ends = torch.tensor(np.cumsum(sizes), device="cuda", dtype=torch.int32)
    starts = F.pad(ends, (1, 0))
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    yield "torch grouped_mm", lambda: grouped_mm(x, w, offs=ends)

    def loop():
        for group in np.flatnonzero(sizes):
            rows = slice(bounds[group], bounds[group + 1])
            torch.mm(x[rows], w[group], out=out[rows])
        return out

    yield "cuBLAS loop", loop
    mean = shape.rows / shape.groups
    tiles = [((16, 128, 128), 4, 4), ((64, 128, 64), 4, 4), ((128, 256, 64), 8, 3)]
    (bm, bn, bk), warps, stages = tiles[(mean >= 24) + (mean >= 96)]
    # Row tiles are bounded by the largest group here, which a caller does not know.
    grid = (triton.cdiv(int(sizes.max()), bm), shape.n // bn, shape.groups)

    def grouped():
        _grouped[grid](
            x, w, starts, out, shape.n, shape.k, bm, bn, bk, num_warps=warps, num_stages=stages
        )
        return out

    yield f"Triton {bm}x{bn}x{bk}", grouped


def graph_microseconds(call: Callable) -> float:
    """Median time of a call replayed from a CUDA graph."""
    call()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    times = []
    for _ in range(6):
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 100)
    return statistics.median(times[1:])


def main(path: str) -> None:
    torch.manual_seed(0)
    rows = []
    for shape in SHAPES:
        w = torch.randn(shape.groups, shape.k, shape.n, device="cuda", dtype=torch.bfloat16)
        w *= shape.k**-0.5
        x = torch.randn(shape.rows, shape.k, device="cuda", dtype=torch.bfloat16)
        out = torch.empty(shape.rows, shape.n, device="cuda", dtype=torch.bfloat16)
        for distribution in DISTRIBUTIONS:
            sizes = shape.group_sizes(distribution)
            picked, groups = sample_rows(sizes)
            want = torch.stack(
                [x[r].float() @ w[g].float() for r, g in zip(picked, groups, strict=True)]
            )
            for name, call in contenders(shape, sizes, x, w, out):
                row: dict = {"shape": shape.name, "distribution": distribution, "contender": name}
                try:
                    out.fill_(float("nan"))
                    got = call()[torch.as_tensor(picked)].float()
                    row["error"] = float((got - want).norm() / want.norm())
                    row["us"] = graph_microseconds(call)
                except Exception as error:  # A contender that fails is a row, not the end.
                    row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                rows.append(row)
        del w, x, out
        torch.cuda.empty_cache()
        with open(path, "w") as file:
            json.dump(
                {"torch": torch.__version__, "triton": triton.__version__, "rows": rows}, file
            )


if __name__ == "__main__":
    main(sys.argv[1])
