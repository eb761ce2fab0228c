# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml allows, one requirement a line, so that no range is written a second time anywhere.

    python requirements/ranges.py build              # what an editable install builds with
    python requirements/ranges.py python             # the lowest Python
    python requirements/ranges.py allowed NAME       # the range of one package
    python requirements/ranges.py oldest NAME        # that range's low end, as a pin
    python requirements/ranges.py newest NAME        # the newest release in it for this Python, as a pin; asks pip
    python requirements/ranges.py unbounded EXTRA    # all requirements of an extra, upper bounds dropped

Needs `packaging`, and `tomli` before Python 3.11: run it with an environment of bootstrap.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def pyproject() -> dict[str, Any]:
    """The file, read anew on every call: it is small."""
    return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))


def build() -> list[Requirement]:
    """What the build backend needs."""
    return [Requirement(line) for line in pyproject()["build-system"]["requires"]]


def lowest_python() -> str:
    """The low end of `requires-python`."""
    return low_end(SpecifierSet(pyproject()["project"]["requires-python"]))


def requirements(extra: str | None = None) -> list[Requirement]:
    """The project's own requirements, with those of an extra and of all extras that it names."""
    project = pyproject()["project"]
    found = {line: Requirement(line) for line in project["dependencies"]}
    extras, seen = [extra] if extra else [], set()
    while extras:
        name = extras.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in project["optional-dependencies"][name]:
            wanted = Requirement(line)
            if canonicalize_name(wanted.name) == canonicalize_name(project["name"]):
                extras += sorted(wanted.extras)
            else:
                found[line] = wanted
    return list(found.values())


def allowed(name: str) -> SpecifierSet:
    """The range of one of the project's own requirements."""
    return next(wanted.specifier for wanted in requirements() if wanted.name == name)


def low_end(specifier: SpecifierSet) -> str:
    """The version that a range starts with; a range must say so with `>=`."""
    (version,) = [part.version for part in specifier if part.operator == ">="]
    return version


def newest_release(name: str) -> str:
    """The newest release of a package that its range allows and that installs on this Python."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    report = json.loads(subprocess.check_output([*pip, "--report", "-", f"{name}{allowed(name)}"]))
    (release,) = (entry["metadata"]["version"] for entry in report["install"])
    return str(release)


def unbounded(wanted: Requirement) -> Requirement:
    """The same requirement without an upper bound: the one way to see whether the next release works."""
    copy = Requirement(str(wanted))
    copy.specifier = SpecifierSet(",".join(str(part) for part in wanted.specifier if part.operator not in ("<", "<=")))
    return copy


def answer(question: str, *names: str) -> list[str]:
    """The lines that the command prints."""
    if question == "build":
        return [str(wanted) for wanted in build()]
    if question == "python":
        return [lowest_python()]
    (name,) = names
    if question == "allowed":
        return [f"{name}{allowed(name)}"]
    if question == "oldest":
        return [f"{name}=={low_end(allowed(name))}"]
    if question == "newest":
        return [f"{name}=={newest_release(name)}"]
    if question == "unbounded":
        # torch is never asked for by name: the one that is there is kept.
        return [str(unbounded(wanted)) for wanted in requirements(name) if wanted.name != "torch"]
    raise SystemExit(__doc__)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    print("\n".join(answer(*sys.argv[1:])))
