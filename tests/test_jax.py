"""What `in_jax` says of hw.jax, in a process of its own: JAX has threads, beside which other tests must not fork."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from headwater import errors


@pytest.mark.slow
def test_jax() -> None:
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder / "in_jax.py")]
    done = subprocess.run(
        command,
        cwd=folder.parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_without_jax_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    monkeypatch.delitem(sys.modules, "headwater.jax", raising=False)
    with pytest.raises(
        errors.SettingError, match=r"Expected JAX for headwater.jax, got none: pip install 'headwater\[jax\]'"
    ):
        importlib.import_module("headwater.jax")
