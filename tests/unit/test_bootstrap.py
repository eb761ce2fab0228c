# SPDX-License-Identifier: Apache-2.0
"""The lock is complete, plain and within pyproject.toml's ranges; newest releases have an environment of their own."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "requirements").glob("*.txt"))
PIN = re.compile(r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [a-zA-Z0-9_.<>=!*'() ]+)?")


def load(path: Path) -> ModuleType:
    """A file that is a command, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bootstrap = load(ROOT / "bootstrap.py")
ranges = load(ROOT / "requirements" / "ranges.py")


def pins(name: str) -> list[Requirement]:
    """The pins of one file of the lock."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def missing(wanted: list[Requirement], name: str) -> list[str]:
    """The requirements that no pin of a file serves, or some pin of it serves outside their range."""
    versions: dict[str, list[str]] = {}
    for pin in pins(name):
        versions.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier)[2:])
    found = {line: versions.get(canonicalize_name(line.name), []) for line in wanted}
    return [str(line) for line, all_of in found.items() if not all_of or not all(map(line.specifier.contains, all_of))]


def test_the_lock_has_the_files_that_are_installed():
    assert {file.stem for file in FILES} == {"build", "torch", *bootstrap.EXTRAS.values()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_lock_file_holds_plain_pins_only(file: Path):
    comment, *lines = file.read_text(encoding="utf-8").splitlines()
    assert comment.startswith("# Made by `python3 requirements/make.py`")
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    assert not re.search(r"://|--|sha256|@|/(?!make\.py)", "\n".join(lines))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_torch_and_its_cuda_packages_are_not_locked(file: Path):
    names = {canonicalize_name(pin.name) for pin in pins(file.stem)}
    assert [name for name in names if name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))] == []


@pytest.mark.parametrize("extra", sorted(set(bootstrap.EXTRAS.values())))
def test_every_requirement_is_locked_within_its_range(extra: str):
    wanted = [requirement for requirement in ranges.requirements(extra) if requirement.name != "torch"]
    assert missing([*wanted, Requirement(bootstrap.MODEL)], extra) == []
    assert missing(ranges.build(), "build") == []


def test_a_range_is_missed_when_it_moves():
    assert missing([Requirement("transformers<5.18")], "dev") == ["transformers<5.18"]
    assert missing([Requirement("not_locked")], "dev") == ["not_locked"]


def test_files_agree_on_every_version():
    versions: dict[tuple[str, str], set[str]] = {}
    for file in FILES:
        for pin in pins(file.stem):
            # A marker may be longer where the package is wanted on more systems; the Python is what divides versions.
            python = re.findall(r'python_full_version [<>=]+ "[^"]+"', str(pin.marker or ""))
            versions.setdefault((pin.name, " ".join(python)), set()).add(str(pin.specifier))
    assert [key for key, found in versions.items() if len(found) > 1] == []


@pytest.mark.parametrize("name", ["build", "torch", *sorted(set(bootstrap.EXTRAS.values()))])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_no_python_is_given_two_versions_of_one_package(name: str, python: str):
    here = {"python_version": python, "python_full_version": f"{python}.7"}
    chosen = [pin.name for pin in pins(name) if pin.marker is None or pin.marker.evaluate(here)]
    assert sorted(chosen) == sorted(set(chosen))


def test_both_ends_of_the_range_are_read_from_pyproject():
    allowed = ranges.allowed("transformers")
    assert {part.operator for part in allowed} == {">=", "<"}
    (oldest,) = ranges.answer("oldest", "transformers")
    assert allowed.contains(oldest.removeprefix("transformers=="))
    assert ranges.answer("allowed", "transformers") == [f"transformers{allowed}"]
    assert ranges.answer("python") == ["3.10"]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_pages_name_the_range(page: str):
    end = {part.operator: part.version for part in ranges.allowed("transformers")}
    major, minor = map(int, end["<"].split("."))
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.findall(r"transformers (5\S*) to (5[\d.]*\d)", text) == [(end[">="], f"{major}.{minor - 1}")]


def test_newest_drops_upper_bounds_and_never_names_torch():
    wanted = {requirement.name: requirement for requirement in map(Requirement, ranges.answer("unbounded", "dev"))}
    assert wanted["transformers"].specifier.contains("99.0")
    assert not wanted["transformers"].specifier.contains("4.57.0")
    assert "torch" not in wanted
    assert "hf_polyspec" not in wanted
    assert {"ruff", "pytest", "numba", "mkdocs-material"} <= wanted.keys()


def test_newest_uses_another_environment(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[str, Path]] = []
    monkeypatch.setattr(bootstrap, "make_environment", lambda environment: environment)
    for name in ("install_locked", "install_newest"):
        monkeypatch.setattr(bootstrap, name, lambda python, extra, name=name: calls.append((name, python)))
    monkeypatch.setattr(bootstrap, "install_browser", lambda: None)
    monkeypatch.setattr(bootstrap.subprocess, "call", lambda command, **_: calls.append(("run", command[3:])) or 0)
    for options in (["-q"], ["--newest", "-q"]):
        monkeypatch.setattr(sys, "argv", ["bootstrap.py", "test", *options])
        assert bootstrap.main() == 0
    assert calls == [
        ("install_locked", bootstrap.LOCKED),
        ("run", ["-q"]),
        ("install_newest", bootstrap.NEWEST),
        ("run", ["-q"]),
    ]
    assert bootstrap.LOCKED != bootstrap.NEWEST
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"{bootstrap.LOCKED.name}/", f"{bootstrap.NEWEST.name}/"} <= set(ignored)


def recorded(monkeypatch: pytest.MonkeyPatch, *, torch_is_there: bool) -> list[list[str]]:
    """The pip commands of a bootstrap, none of them run."""
    commands: list[list[str]] = []
    answers = {"-c": ["torch==9.9+its.own"], str(bootstrap.LOCK / "ranges.py"): ["transformers>=5.18"]}
    monkeypatch.setattr(bootstrap.subprocess, "call", lambda *_, **__: 0 if torch_is_there else 1)
    monkeypatch.setattr(bootstrap.subprocess, "check_call", commands.append)
    monkeypatch.setattr(bootstrap, "ask", lambda python, *arguments: answers[arguments[0]])
    return commands


@pytest.mark.parametrize("torch_is_there", [True, False])
def test_a_torch_that_is_there_is_neither_replaced_nor_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, torch_is_there: bool
):
    monkeypatch.setattr(bootstrap, "LOCKED", tmp_path)
    commands = recorded(monkeypatch, torch_is_there=torch_is_there)
    bootstrap.install_locked(tmp_path / "python", "demo")
    bootstrap.install_newest(tmp_path / "python", "demo")
    installing = [command for command in commands if bootstrap.TORCH in command]
    assert len(installing) == (0 if torch_is_there else 2)
    for command in commands:
        # Whoever looks for requirements is told which torch to keep.
        harmless = {"--no-deps", "torch==9.9+its.own", bootstrap.TORCH} & set(command) or command[-1] == "tomli"
        assert harmless, command


def test_what_was_installed_is_installed_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(bootstrap, "LOCKED", tmp_path)
    monkeypatch.setattr(bootstrap, "fingerprint", lambda: "as it is")
    commands = recorded(monkeypatch, torch_is_there=True)
    bootstrap.install_locked(tmp_path / "python", "demo")
    once = len(commands)
    bootstrap.install_locked(tmp_path / "python", "demo")
    assert len(commands) == once > 0
    monkeypatch.setattr(bootstrap, "fingerprint", lambda: "the lock was made anew")
    bootstrap.install_locked(tmp_path / "python", "demo")
    assert len(commands) == 2 * once


def test_every_lock_file_counts_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(bootstrap, "LOCK", tmp_path)
    seen = {bootstrap.fingerprint()}
    for name in ("build.txt", "dev.txt"):
        (tmp_path / name).write_text(f"{name}\n")
        seen.add(bootstrap.fingerprint())
    assert len(seen) == 3
