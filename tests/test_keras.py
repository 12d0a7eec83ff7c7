"""hw.keras on every backend. Keras reads KERAS_BACKEND as it is imported, so each has a process that makes all checks (`keras_checks`)."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "keras_linear.py"
BACKENDS = ("tensorflow", "jax", "torch")
CHECKS = [
    node.name
    for node in ast.parse((HERE / "keras_checks.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and any(getattr(mark, "id", "") == "check" for mark in node.decorator_list)
]
LIMIT_S = 180.0


def environment(backend: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HEADWATER_")}
    one_thread = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}  # three processes share the cores
    soon = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # compiled: what runs is small
    return {
        **kept,
        **one_thread,
        **soon,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(HERE),
    }


@cache
def said_by_checks() -> dict[tuple[str, str], str]:
    """Return what went wrong, by backend and check. The backends run at once."""
    command = [sys.executable, str(HERE / "keras_checks.py")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = {b: subprocess.Popen(command, env=environment(b), **pipes) for b in BACKENDS}  # type: ignore[call-overload]
    found: dict[tuple[str, str], str] = {}
    try:
        for backend, child in children.items():
            out, err = child.communicate(timeout=LIMIT_S)
            found |= {(backend, check): f"it did not come to this check\n{err[-3000:]}" for check in CHECKS}
            lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"check"')]
            found |= {(backend, line["check"]): line["said"] for line in lines}
    finally:
        for child in children.values():
            child.kill()
            child.communicate()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_check(backend: str, check: str) -> None:
    said = said_by_checks()[backend, check]
    assert not said, said


@pytest.mark.slow
def test_example_learns_the_line_with_two_workers() -> None:
    command = [sys.executable, "-m", "headwater", "run", "-n", "2", str(EXAMPLE)]
    done = subprocess.run(command, env=environment("jax"), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("y = 2.00x + 1.00") == 2
    assert "'worker': 1, 'workers': 2" in done.stdout


@pytest.mark.parametrize("missing", ["keras", "tensorflow"])
def test_what_is_not_installed_is_named_with_the_way_to_get_it(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import headwater as hw; hw.keras"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment("tensorflow"), capture_output=True, text=True, check=False
    )
    assert "SettingError" in done.stderr
    assert "pip install 'headwater[keras]' and one of tensorflow-cpu, jax or torch" in done.stderr
