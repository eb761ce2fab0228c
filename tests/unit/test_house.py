# SPDX-License-Identifier: Apache-2.0
"""The floors of the house: a room imports only from rooms below it, and no modules import each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from house import House, read_house

import hf_polyspec

PACKAGE = Path(hf_polyspec.__file__).parent
ROOMS = (
    "errors",
    "defaults",
    "version",
    "storage",
    "telemetry",
    "exactness",
    "host",
    "integers",
    "cpu.compiled",
    "cpu",
    "quantization",
    "eagle",
    "eagle.formats",
    "levels",
    "models",
    "planning.theory",
    "control",
    "auto",
    "generation",
    "engine",
    "integrations",
    "eagle.training",
    "planning",
    "metrics",
    "bench",
    "bench.measurements",
    "cli",
)
"""The lowest first."""
LONGEST = 400
AT_THE_ROOT = {"__init__.py", "__main__.py", "defaults.py", "errors.py", "py.typed", "version.py"}


@pytest.fixture(scope="module")
def house() -> House:
    return read_house(PACKAGE)


def test_every_file_lies_in_a_room(house: House) -> None:
    assert len(house.modules) > 200  # the package was found
    assert not house.without_room(ROOMS)
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == AT_THE_ROOT


def test_no_room_imports_from_above(house: House) -> None:
    assert not house.upward(ROOMS)


def test_no_modules_import_each_other(house: House) -> None:
    assert not house.circles()


def test_the_host_alone_knows_the_insides_of_transformers(house: House) -> None:
    assert not house.strange("host")


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {str(path.relative_to(PACKAGE)): count for path, count in lengths.items() if count > LONGEST}


def built(folder: Path, files: dict[str, str]) -> House:
    """A package `inn` of these files, with a door and the rooms `cellar`, `host`, `hall` and `hall.attic`."""
    rooms = ("", "cellar/", "host/", "hall/", "hall/attic/")
    for name, text in {**{f"{room}__init__.py": "" for room in rooms}, **files}.items():
        path = folder / "inn" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_house(folder / "inn")


SMALL = ("cellar", "host", "hall", "hall.attic")

UPWARD = {
    "at the top": "from ..hall.bar import beer\n",
    "the module itself": "from ..hall import bar\n",
    "by its whole name": "from inn.hall.bar import beer\n",
    "as a module": "import inn.hall.bar\n",
    "when needed": "def brew():\n    from ..hall.bar import beer\n",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..hall.bar import beer\n",
}


@pytest.mark.parametrize("text", UPWARD.values(), ids=UPWARD.keys())
def test_an_import_from_above_is_found_wherever_it_stands(tmp_path: Path, text: str) -> None:
    house = built(tmp_path, {"cellar/cask.py": "\n" + text, "hall/bar.py": "beer = 1\n"})
    (sentence,) = house.upward(SMALL)
    line = 1 + len(text.splitlines())
    assert sentence.startswith(f"inn/cellar/cask.py:{line} imports inn.hall.bar")
    assert sentence.endswith(": cellar lies below hall, and a room imports only from rooms below it")


def test_imports_from_below_and_beside_are_allowed(tmp_path: Path) -> None:
    files = {
        "cellar/cask.py": "import json\nfrom typing import Any\n",
        "hall/bar.py": "from ..cellar import cask\nfrom . import table\nfrom .table import cloth\n",
        "hall/table.py": "cloth = 1\n",
        "hall/attic/bed.py": "from ..bar import cask\n",
    }
    house = built(tmp_path, files)
    assert not house.upward(SMALL)
    assert not house.circles()


def test_only_the_door_of_a_room_hands_on_names_of_rooms_inside(tmp_path: Path) -> None:
    files = {
        "hall/__init__.py": "from .attic.bed import pillow\n",
        "hall/bar.py": "from .attic.bed import pillow\n",
        "hall/attic/bed.py": "pillow = 1\n",
    }
    (sentence,) = built(tmp_path, files).upward(SMALL)
    assert sentence.startswith("inn/hall/bar.py:1 ")


def test_rooms_do_not_use_the_door_of_the_package(tmp_path: Path) -> None:
    files = {"__init__.py": "from .hall.bar import beer\n", "hall/bar.py": "beer = 1\nfrom .. import beer as same\n"}
    (sentence,) = built(tmp_path, files).upward(SMALL)
    assert sentence.startswith("inn/hall/bar.py:2 ")


def test_a_file_outside_all_rooms_is_found(tmp_path: Path) -> None:
    house = built(tmp_path, {"shed.py": "", "cellar/cask.py": "", "__main__.py": ""})
    assert house.without_room(SMALL) == ["inn/shed.py"]


def test_circles_are_found_with_all_their_members(tmp_path: Path) -> None:
    files = {
        "hall/one.py": "from .two import b\n",
        "hall/two.py": "def late():\n    from .three import c\n",
        "hall/three.py": "from inn.hall import one\n",
        "hall/four.py": "from .one import a\n",
    }
    assert built(tmp_path, files).circles() == [["inn.hall.one", "inn.hall.three", "inn.hall.two"]]


def test_a_room_that_uses_its_own_door_is_a_circle(tmp_path: Path) -> None:
    files = {"hall/__init__.py": "from .bar import beer\n", "hall/bar.py": "from . import beer as same\nbeer = 1\n"}
    assert built(tmp_path, files).circles() == [["inn.hall", "inn.hall.bar"]]


STRANGE = (
    "from transformers.cache_utils import DynamicCache",
    "from transformers import DynamicCache",
    "from transformers.utils.hub import cached_file",
    "from transformers import cache_utils",
    "import transformers",
    "import transformers.generation.utils as utils",
    "from transformers.generation import LogitsProcessor",
    "def late():\n    from transformers import masking_utils",
)


@pytest.mark.parametrize("text", STRANGE)
def test_only_the_host_knows_more_of_transformers_than_its_stable_names(tmp_path: Path, text: str) -> None:
    house = built(tmp_path, {"hall/bar.py": text, "host/desk.py": text})
    (sentence,) = house.strange("host")
    assert sentence.startswith(f"inn/hall/bar.py:{len(text.splitlines())} imports transformers")


def test_stable_names_of_transformers_are_for_all(tmp_path: Path) -> None:
    text = "from transformers import AutoTokenizer, LogitsProcessorList as Processors\nimport transformers_helper\n"
    assert not built(tmp_path, {"hall/bar.py": text}).strange("host")
