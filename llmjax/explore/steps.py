"""What the compiled steps of a model on a plan send, found without weights and without a cache."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llmjax.config import ConfigError, EngineConfig, ModelConfig
from llmjax.engine.compile import compile_steps, enable_compile_cache
from llmjax.engine.runner import Runner
from llmjax.explore.collectives import Collective, read_collectives
from llmjax.weights.model import declared_params, nest
from meshes import ParallelPlan, PlanError, Rules, make_mesh

SAME_SIZE = {"bfloat16": "float16"}
"""XLA:CPU widens bfloat16 to float32, and with it the messages; float16 it sends as it is."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """A compiled step, the largest of its kind; its sizes are those of one batch rank."""

    name: str
    """decode or prefill."""
    rows: int
    """Requests."""
    tokens: int
    """Tokens computed."""
    platform: str
    """Backend that it was compiled for."""
    collectives: tuple[Collective, ...]
    """Everything that devices send to each other."""


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The steps of an engine, of which the largest are compiled."""

    steps: tuple[Step, ...]
    """The largest decode step and the largest prefill step."""
    token_counts: tuple[int, ...]
    """Tokens of a batch rank in each step that an engine would have, rising."""


def read_steps(config: ModelConfig, plan: ParallelPlan, engine: EngineConfig) -> Programs:
    """Compiles the largest decode step and the largest prefill step, and lists what they send.

    Nothing is allocated. Where too few devices are here, a process with virtual CPU devices does
    it. `engine.dtype` must be given.

    Raises:
        ConfigError, PlanError: the model cannot run like this.
    """
    if jax.process_count() == 1 and jax.device_count() >= plan.num_devices:
        return _compile_and_read(config, plan, engine)
    return _read_apart(config, plan, engine)


def answer_job(job: str) -> str:
    """Does the work of the other process: a job of `_read_apart` in, its answer out."""
    values = json.loads(job)
    plan = rebuild(ParallelPlan, values["plan"])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", plan.num_devices)
    engine = rebuild(EngineConfig, values["engine"])
    enable_compile_cache(engine.compile_cache)
    try:
        programs = _compile_and_read(rebuild(ModelConfig, values["config"]), plan, engine)
    except (ConfigError, PlanError) as error:
        return json.dumps({"error": type(error).__name__, "sentence": str(error)})
    return json.dumps({"programs": asdict(programs)})


def rebuild(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A dataclass from what JSON made of `asdict`: tuples are lists there, dataclasses mappings."""
    hints = get_type_hints(kind)
    return kind(**{key: _restore(hints[key], value) for key, value in values.items()})


def _compile_and_read(config: ModelConfig, plan: ParallelPlan, engine: EngineConfig) -> Programs:
    rules, mesh = Rules(plan), make_mesh(plan)
    platform = mesh.devices.flat[0].platform
    if platform == "cpu":
        dtype = str(engine.dtype)
        engine = replace(engine, dtype=SAME_SIZE.get(dtype, dtype))
    weights = {
        path: jax.ShapeDtypeStruct(
            param.shape, param.dtype, sharding=NamedSharding(mesh, param.out_sharding)
        )
        for path, param in declared_params(config, rules, jnp.dtype(engine.dtype)).items()
    }
    runner = Runner(config, rules, mesh, nest(weights), engine)
    buckets = {
        "decode": max(bucket for bucket in runner.buckets if not bucket.prefill_tokens),
        "prefill": max(runner.buckets),
    }
    compiled = compile_steps(
        {bucket: runner.lower(bucket) for bucket in buckets.values()},
        compiler_options=runner.compiler_options,
        side_by_side=not runner.on_cpu,
    )
    steps = tuple(
        Step(
            name=name,
            rows=bucket.rows,
            tokens=bucket.tokens,
            platform=platform,
            collectives=read_collectives(compiled[bucket].as_text(), plan.sizes),
        )
        for name, bucket in buckets.items()
    )
    counts = sorted({bucket.tokens for bucket in runner.buckets})
    return Programs(steps=steps, token_counts=tuple(counts))


def _read_apart(config: ModelConfig, plan: ParallelPlan, engine: EngineConfig) -> Programs:
    if engine.logits_processors:
        raise ConfigError(
            f"The plan ({plan}) needs {plan.num_devices} devices, which another process provides, "
            "and functions cannot be sent there: leave logits_processors out."
        )
    job = {"config": asdict(config), "plan": asdict(plan), "engine": asdict(engine)}
    done = subprocess.run(
        [sys.executable, "-m", "llmjax.explore.worker"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        # What is imported here is imported there, however it was found.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if done.returncode:
        raise RuntimeError(
            f"The process that compiles for {plan} ended with {done.returncode}: "
            f"{_find_reason(done.stderr)}"
        )
    answer = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise {"ConfigError": ConfigError, "PlanError": PlanError}[answer["error"]](
            answer["sentence"]
        )
    return rebuild(Programs, answer["programs"])


def _find_reason(errors: str) -> str:
    """XLA's last words before it aborts, else the end of what Python says."""
    fatal = re.findall(r"^F\d{4} .*", errors, re.MULTILINE)
    return fatal[0] if fatal else errors[-2000:]


def _restore(hint: Any, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restore(hint, item) for item in value)
    kind = _held_dataclass(hint)
    return rebuild(kind, value) if kind and isinstance(value, dict) else value


def _held_dataclass(hint: Any) -> type[Any] | None:
    """The dataclass in a type such as `LatentConfig | None` or `tuple[LayerConfig, ...]`."""
    if is_dataclass(hint) and isinstance(hint, type):
        return hint
    found = (_held_dataclass(part) for part in get_args(hint))
    return next((kind for kind in found if kind), None)
