"""How every test runs: 8 CPU devices, exact matmuls, cached programs, shapes and types checked."""

import os
from typing import Any

# XLA sizes its thread pool from NPROC. A collective over 8 virtual devices needs 8 threads at once,
# and on a machine with fewer cores it would wait for them for ever.
os.environ["NPROC"] = "32"

import hypothesis
import jax
import platformdirs
import pytest
from jaxtyping import install_import_hook
from xdist.scheduler import LoadFileScheduling

# Code that handles arrays is imported with every call's types and shapes checked from here on.
install_import_hook(
    ["llmjax.layers", "llmjax.models", "llmjax.parallel", "pallas_kernels"], "beartype.beartype"
)

START_PROGRAMS = ("test_cli.py", "test_multiprocess.py", "test_notebooks.py", "test_wheel.py")

hypothesis.settings.register_profile(
    "reproducible", derandomize=True, deadline=None, database=None, print_blob=True
)
hypothesis.settings.load_profile("reproducible")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-snapshots",
        action="store_true",
        help="write tests/meshes/snapshots and docs/feature-matrix.md anew, for a person to review",
    )


def pytest_configure(config: pytest.Config) -> None:
    # The suite means the same on every machine: a GPU is used only by `pytest -m gpu`.
    if config.option.markexpr != "gpu":
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    cache = platformdirs.user_cache_path("llmjax") / "test-programs"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    # Each worker has its own 8 devices and keeps what it compiles; a GPU is not shared.
    return 1 if config.option.markexpr == "gpu" else min(os.cpu_count() or 1, 4)


class OneAtATime(LoadFileScheduling):
    """Gives each file to one worker, and all files that start programs to the same one.

    A notebook must end in time, which it cannot beside a test of several processes.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "programs" if file.rsplit("/")[-1] in START_PROGRAMS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> OneAtATime | None:
    return OneAtATime(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Combinations of models and plans take minutes (.ci/run has them) or hours: only where asked.
    for marker in ("covering", "matrix"):
        if marker not in config.option.markexpr:
            left_out = [item for item in items if item.get_closest_marker(marker)]
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=left_out)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() != "gpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run `pytest -m gpu` on one"))
