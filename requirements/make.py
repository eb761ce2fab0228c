#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Makes the lock anew: the exact versions that bootstrap.py installs, for every Python that pyproject.toml allows.

    python3 requirements/make.py

Takes today's newest releases that pyproject.toml allows. uv, in an environment that is thrown away afterwards, works
out versions that go together on every Python and system; what stands in the files is plain pins with markers:

    build.txt   what builds the project itself and the one requirement that has no wheel
    demo.txt    the extra `demo` and the demo's model
    dev.txt     the extra `dev` and the demo's model
    torch.txt   what comes with torch where bootstrap.py has to install one; only a constraint

torch itself is in none of them: the one that is already there is used. Nor are the CUDA packages that its builds bring,
which follow from the build.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT))

from bootstrap import EXTRAS, MODEL, TORCH, python_of  # noqa: E402

# What builders ask for only while they run, and would then find missing: hatchling for an editable install, and
# setuptools, with wheel for an old pip, for rouge_score, which comes without a wheel and does not say what builds it.
BUILD = ("editables", "setuptools", "wheel")
TORCHS_OWN = ("torch==", "triton==", "cuda-", "nvidia-")


def main() -> None:
    """Ask for all of it at once, so that the files agree, then for each file's part under that answer."""
    with tempfile.TemporaryDirectory() as scratch:
        uv = Resolver(Path(scratch))
        build, extras = [*uv.ranges("build"), *BUILD], sorted(set(EXTRAS.values()))
        everything = uv.file("everything.txt", uv.compile([*build, TORCH], extras))
        limits = ["--constraint", str(everything)]
        without_torch = [*limits, "--excludes", str(uv.file("excluded.txt", ["torch"]))]
        write("build", uv.compile(build, [], *limits))
        write("torch", (pin for pin in uv.compile([TORCH], [], *limits) if not pin.startswith(TORCHS_OWN)))
        # The model's requirements are those of another program: bootstrap.py installs without any.
        model = uv.compile([MODEL], [], "--no-deps")
        for extra in extras:
            write(extra, [*uv.compile([], [extra], *without_torch), *model])


class Resolver:
    """uv in an environment of its own, asked for all Pythons and systems at once."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        venv.create(scratch / "environment", with_pip=True)
        self.python = python_of(scratch / "environment")
        install = [str(self.python), "-m", "pip", "install", "--quiet"]
        subprocess.check_call([*install, "uv", "packaging", "tomli"])
        self.lowest_python = self.ranges("python")[0]

    def ranges(self, *question: str) -> list[str]:
        """What pyproject.toml says; see ranges.py."""
        return self.lines([str(self.python), str(FOLDER / "ranges.py"), *question])

    def compile(self, requirements: Iterable[str], extras: Iterable[str], *options: str) -> list[str]:
        """The pins for requirements and extras of the project."""
        sources = [str(self.file("wanted.txt", requirements))]
        if extras:
            sources += [str(ROOT / "pyproject.toml"), *(f"--extra={extra}" for extra in extras)]
        python = ["--universal", "--python-version", self.lowest_python]
        # Neither a folder nor an address of this machine belongs into the files.
        plain = ["--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"]
        return self.lines([str(self.python), "-m", "uv", "pip", "compile", *python, *plain, *options, *sources])

    def lines(self, command: list[str]) -> list[str]:
        """What a command prints."""
        # An environment that happens to be active is none of uv's business.
        settings = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
        return subprocess.check_output(command, text=True, cwd=self.scratch, env=settings).splitlines()

    def file(self, name: str, lines: Iterable[str]) -> Path:
        """A file for uv to read."""
        path = self.scratch / name
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path


def write(name: str, pins: Iterable[str]) -> None:
    """One file of the lock."""
    lines = [
        "# Made by `python3 requirements/make.py` from pyproject.toml: change that and run it again.",
        *sorted(pins),
    ]
    (FOLDER / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
