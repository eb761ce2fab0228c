# SPDX-License-Identifier: Apache-2.0
"""The metric's page when this folder is a Space on the Hub."""

from __future__ import annotations

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

if __name__ == "__main__":
    launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("losslessness.py"))))
