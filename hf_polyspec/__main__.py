# SPDX-License-Identifier: Apache-2.0
"""`python -m hf_polyspec` is the `polyspec` command."""

from .cli import app

if __name__ == "__main__":
    app()
