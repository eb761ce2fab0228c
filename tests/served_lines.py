# SPDX-License-Identifier: Apache-2.0
"""The `vllm serve` lines of the pages, as they stand there: a line that is changed is the line that is tested."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from page_lines import commands


@dataclass(frozen=True)
class Served:
    """One line.

    Attributes:
        page: where it stands; words: behind `vllm serve`, the model's name first.
    """

    page: Path
    words: list[str]

    def read(self, option: str) -> Any:
        """The JSON behind an option, empty where the line has none."""
        found = [json.loads(word) for name, word in zip(self.words, self.words[1:], strict=False) if name == option]
        assert len(found) < 2, f"{option} twice: {self}"
        return found[0] if found else {}

    @property
    def speculative(self) -> dict[str, Any]:
        return dict(self.read("--speculative-config"))

    @property
    def chain(self) -> dict[str, Any]:
        """What `ChainProposer` is told."""
        return dict(self.read("--additional-config").get("polyspec", {}))

    @property
    def export(self) -> list[str] | None:
        """The words behind `polyspec export` on the same page that write the folder which the line names."""
        if self.speculative["method"] == "custom_class":
            return None
        [found] = [
            words[1:]
            for page, words in commands("polyspec")
            if page == self.page and words[0] == "export" and words[2] == self.speculative["model"]
        ]
        return found

    def __str__(self) -> str:
        return f"{self.page.name}-{self.speculative['model'].rpartition('.')[2]}"


SERVED: list[Served] = []
"""Those that stand on two pages once."""
for _page, _words in commands("vllm"):
    if _words[0] == "serve" and _words[1:] not in [line.words for line in SERVED]:
        SERVED.append(Served(_page, _words[1:]))
