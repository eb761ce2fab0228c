# SPDX-License-Identifier: Apache-2.0
"""The `evaluate` modules load from their folders, from single files, without network or the package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_polyspec.metrics import MODULES, module_path

CALLS = {
    "acceptance_length": ("default", {"predictions": [[3, 1], [4, 2]]}, "mean_acceptance_length", 2.5),
    "speedup": (
        "default",
        {"predictions": [30.0, 20.0], "references": [10.0, 10.0]},
        "mean_of_ratios",
        2.5,
    ),
    "losslessness": (
        "default",
        {"predictions": [[5, 6, 7]], "references": [[5, 6, 8]]},
        "first_difference",
        [2],
    ),
}

LOAD_ALONE = """
import json, socket, sys

def refuse(*args, **kwargs):
    raise OSError("network used")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
import evaluate

calls, folder = json.loads(sys.argv[1]), sys.argv[2]
for name, (config, inputs, field, expected) in calls.items():
    metric = evaluate.load(f"{folder}/{name}", config, keep_in_memory=True)
    found = metric.compute(**inputs)
    assert found[field] == expected, (name, found)
    json.dumps(found, allow_nan=False)
    assert metric.info.license == "Apache-2.0" and metric.description and metric.inputs_description
assert not any(name.split(".")[0] == "hf_polyspec" for name in sys.modules)
print("all loaded")
"""


def test_single_files_load_without_network_or_package(tmp_path: Path) -> None:
    for name in MODULES:
        (tmp_path / name).mkdir()
        shutil.copy(Path(module_path(name)) / f"{name}.py", tmp_path / name)
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(
        [sys.executable, "-I", "-c", LOAD_ALONE, json.dumps(CALLS), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "all loaded" in run.stdout


@pytest.mark.parametrize("name", MODULES)
def test_folder_is_a_complete_space(name: str) -> None:
    folder = Path(module_path(name))
    assert {"README.md", "app.py", "requirements.txt", f"{name}.py"} <= {path.name for path in folder.iterdir()}
    header = (folder / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert "sdk: gradio" in header
    assert "app_file: app.py" in header
    assert "- evaluate" in header


@pytest.mark.parametrize("name", MODULES)
def test_module_uses_only_what_its_requirements_name(name: str) -> None:
    folder = Path(module_path(name))
    wanted = {line.split(">")[0].strip() for line in (folder / "requirements.txt").read_text().splitlines()}
    lines = (folder / f"{name}.py").read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    outside = imported - set(sys.stdlib_module_names)
    assert outside == wanted


def test_unknown_module_is_refused() -> None:
    with pytest.raises(ValueError, match="there are acceptance_length, losslessness, speedup"):
        module_path("rouge")
