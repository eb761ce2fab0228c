# SPDX-License-Identifier: Apache-2.0
"""Reads the imports of a package from its source: which room each file lies in, and what it asks of other rooms."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STABLE = frozenset(
    {
        "AutoConfig",
        "AutoModelForCausalLM",
        "AutoTokenizer",
        "GenerationConfig",
        "LogitsProcessor",
        "LogitsProcessorList",
        "PreTrainedConfig",
        "PreTrainedModel",
        "PreTrainedTokenizerBase",
        "StoppingCriteriaList",
        "TextStreamer",
    }
)
"""What of transformers any room may ask for: public names that have stayed what they are for years."""


@dataclass(frozen=True)
class Import:
    """One imported name, wherever in a file it stands: at the top, in a function, under TYPE_CHECKING.

    Attributes:
        file: relative to the folder the package lies in; line: of the statement.
        module: the module that imports.
        target: the module imported, or the name if it is no module of the package.
        name: what is taken from it, empty for `import target`.
    """

    file: str
    line: int
    module: str
    target: str
    name: str

    @property
    def place(self) -> str:
        """File, line, and what is imported."""
        taken = f"{self.target}.{self.name}" if self.name else self.target
        return f"{self.file}:{self.line} imports {taken}"


@dataclass(frozen=True)
class House:
    """A package's modules and their imports.

    Attributes:
        package: its name.
        modules: file of each module, relative to the folder the package lies in.
        imports: all of them, of other packages as well.
    """

    package: str
    modules: dict[str, str]
    imports: list[Import]

    def room(self, module: str, rooms: Sequence[str]) -> str | None:
        """The innermost of the rooms that a module lies in; None for one that lies in none."""
        inside = module.removeprefix(self.package).removeprefix(".")
        found = [room for room in rooms if inside == room or inside.startswith(f"{room}.")]
        return max(found, key=len, default=None)

    def without_room(self, rooms: Sequence[str]) -> list[str]:
        """Files that lie in none of the rooms, but for the package's own door."""
        doors = {self.package, f"{self.package}.__main__"}
        return [file for name, file in self.modules.items() if name not in doors and self.room(name, rooms) is None]

    def upward(self, rooms: Sequence[str]) -> list[str]:
        """A sentence for every import of a room from one above it, or from the door of the package.

        Args:
            rooms: the lowest first. The `__init__` of a room may import from rooms inside it, to hand their names on.
        """
        found = []
        for one in self.imports:
            here = self.room(one.module, rooms)
            if here is None or one.target not in self.modules:
                continue
            there = self.room(one.target, rooms)
            own = f"{self.package}.{here}"
            if there is None:
                found.append(f"{one.place}: a room does not import from the door of the package")
            elif rooms.index(there) > rooms.index(here) and not (one.module == own and there.startswith(f"{here}.")):
                found.append(f"{one.place}: {here} lies below {there}, and a room imports only from rooms below it")
        return found

    def circles(self) -> list[list[str]]:
        """Modules that import each other, directly or through others; those of one circle together."""
        asked: dict[str, set[str]] = {module: set() for module in self.modules}
        for one in self.imports:
            if one.target in asked and one.target != one.module:
                asked[one.module].add(one.target)
        reached = {module: _reached(module, asked) for module in asked}
        circles = {
            tuple(sorted({module, *(other for other in reached[module] if module in reached[other])}))
            for module in asked
            if module in reached[module]
        }
        return [list(circle) for circle in sorted(circles)]

    def strange(self, host: str) -> list[str]:
        """A sentence for every import of more from transformers than `STABLE`, outside the room that may know it.

        Args:
            host: the room that may.
        """
        found = []
        for one in self.imports:
            of_transformers = one.target.split(".")[0] == "transformers"
            if not of_transformers or self.room(one.module, [host]) is not None:
                continue
            if one.target != "transformers" or one.name not in STABLE:
                found.append(
                    f"{one.place}: only {host} knows transformers; others write `from transformers import NAME` "
                    f"with one of {', '.join(sorted(STABLE))}"
                )
        return found


def read_house(folder: Path) -> House:
    """Reads all files of a package.

    Args:
        folder: its own.
    """
    files = sorted(folder.rglob("*.py"))
    modules = {_module(path, folder.parent): str(path.relative_to(folder.parent)) for path in files}
    imports = [
        one
        for path, module in zip(files, modules, strict=True)
        for one in _imports(path.read_text(encoding="utf-8"), module, modules)
    ]
    return House(folder.name, modules, imports)


def _module(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(text: str, module: str, modules: dict[str, str]) -> Iterator[Import]:
    file = modules[module]
    package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text, file)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, module, alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, package)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                target, name = (inner, "") if inner in modules else (source, alias.name)
                yield Import(file, node.lineno, module, target, name)


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _reached(start: str, asked: dict[str, set[str]]) -> set[str]:
    """Modules that a module imports, directly or through others."""
    found: set[str] = set()
    waiting = list(asked[start])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += asked[module]
    return found
