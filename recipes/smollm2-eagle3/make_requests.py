# SPDX-License-Identifier: Apache-2.0
"""Requests with long answers for training a head: writing, roles to play, reasoning, explanations, code, extraction.

The forms of requests.yaml, or of another such file, are filled from its lists, every filling drawn anew: a few make
thousands of requests.

    python make_requests.py --each 200 --seed 3 --out requests.jsonl
    python make_requests.py --forms requests-longer.yaml --each 200 --seed 3 --out more.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from string import Formatter

import yaml

NUMBERS = [str(number) for number in range(3, 98)]


def fill(dice: random.Random, form: str, words: dict[str, list[str]]) -> str:
    """One filling of a form: `{city2}` is another city than `{city}`, and so on."""
    slots = dict.fromkeys(slot for _, slot, _, _ in Formatter().parse(form) if slot)
    values: dict[str, str] = {}
    for slot in slots:
        kind = slot.rstrip("0123456789")
        left = [word for word in words[kind] if word not in values.values()]
        values[slot] = dice.choice(left)
    text = form.format(**values)
    return text[0].upper() + text[1:]


def requests(dice: random.Random, count: int, path: Path) -> list[str]:
    """So many requests of every kind of a file of forms, less those that came twice."""
    source = yaml.safe_load(path.read_text(encoding="utf-8"))
    words = {**source["words"], "number": NUMBERS}
    kinds = source["forms"].values()
    return list(dict.fromkeys(fill(dice, dice.choice(forms), words) for forms in kinds for _ in range(count)))


def main() -> None:
    """Writes the requests, one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own = Path(__file__).with_name("requests.yaml")
    parser.add_argument("--forms", type=Path, default=own, help="lists of words, and the forms that they fill")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=200, help="requests of each kind")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    if not wanted.forms.is_file():
        parser.error(f"--forms: there is no file {wanted.forms}.")
    dice = random.Random(wanted.seed)
    made = requests(dice, wanted.each, wanted.forms)
    dice.shuffle(made)
    wanted.out.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in made), encoding="utf-8")
    print(f"{len(made)} requests in {wanted.out}")


if __name__ == "__main__":
    main()
