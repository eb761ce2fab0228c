# SPDX-License-Identifier: Apache-2.0
"""The faults on a real model: its answers interrupted, its quantisation killed, its files torn, its threads many."""

from __future__ import annotations

import copy
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_polyspec
from hf_polyspec.cpu.packing import pack
from hf_polyspec.host.release import GENERATION_CACHE
from hf_polyspec.models.by_name import load_model, load_tokenizer
from hf_polyspec.quantization import load_quantized, quantize_model

from .interrupts import at_place, in_room
from .torn import cuts

WORDS = "The lighthouse keeper wrote in his book that the sea was calm, and then he wrote that the sea was"


class _Stopped(KeyboardInterrupt):
    """Ctrl-C, told apart from the user's own."""


def digests(folder: Path) -> dict[str, str]:
    """What a folder holds, file by file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Real:
    """A round on one model.

    Args:
        name: of the model, as `polyspec quantize --model` takes it.
        seed: of all that is drawn; place: an empty folder.
    """

    def __init__(self, name: str, seed: int, place: Path) -> None:
        self.name, self.place, self.chance = name, place, random.Random(seed)
        self.model, tokenizer = load_model(name, "float32"), load_tokenizer(name)
        self.middle = quantize_model(copy.deepcopy(self.model), 8)
        pack(self.model)
        self.ids = tokenizer(WORDS, return_tensors="pt").input_ids

    def round(self) -> Counter[str]:
        """Everything once; raises where something is not as promised."""
        return Counter(
            {
                "interrupted answers": self.interrupted(40),
                "answers of threads": self.threads(4, 6),
                "kills of quantize": self.killed(8),
                "full disks": self.full(4),
                "torn checkpoints": self.torn(6),
            }
        )

    def answer(self, ids: torch.Tensor, **options: Any) -> list[int]:
        """One greedy text, plain or through a chain, as new ids."""
        found = hf_polyspec.generate(
            self.model,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=24,
            **options,
        )
        return found[0, ids.shape[1] :].tolist()

    def interrupted(self, times: int) -> int:
        """Ctrl-C at lines drawn by chance, the caller's cache in hand: it is as it was, or complete."""
        read = self.ids.shape[1] // 2
        before = DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(self.ids[:, :read], use_cache=True, **{GENERATION_CACHE: before})
        chain = [self.middle, hf_polyspec.SuffixDrafter()]
        right = self.answer(self.ids, assistant_models=chain)
        places, found = 4000, 0
        while found < times:
            cache = copy.deepcopy(before)
            text: list[int] = []

            def call(cache: DynamicCache = cache, text: list[int] = text) -> None:
                text += self.answer(self.ids, assistant_models=chain, **{GENERATION_CACHE: cache})

            def stop() -> None:
                raise _Stopped

            place = self.chance.randrange(places)
            try:
                at_place(call, place, stop, lambda code: in_room("generation")(code) or in_room("host")(code))
                places = min(places, place)
            except _Stopped:
                found += 1
            lengths = {layer.keys.shape[2] for layer in cache.layers} | {
                layer.values.shape[2] for layer in cache.layers
            }
            assert lengths in ({read}, {self.ids.shape[1] + len(right) - 1}), lengths
            if lengths == {read}:
                for own, old in zip(cache.layers, before.layers, strict=True):
                    assert torch.equal(own.keys, old.keys)
                    assert torch.equal(own.values, old.values)
            assert not text or text == right
        assert self.answer(self.ids, assistant_models=chain) == right
        return found

    def threads(self, count: int, each: int) -> int:
        """Threads that answer with one packed model, one middle and one drafter: each text is what it is alone."""
        drafter = hf_polyspec.SuffixDrafter()
        length = self.ids.shape[1]
        prompts = [self.ids[:, self.chance.randrange(length - 4) :] for _ in range(count * each)]
        alone = [self.answer(ids) for ids in prompts]
        found: dict[int, list[int]] = {}
        failures: list[BaseException] = []

        def run(first: int) -> None:
            try:
                for number in range(first, len(prompts), count):
                    found[number] = self.answer(prompts[number], assistant_models=[self.middle, drafter])
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(first,)) for first in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        assert [found[number] for number in range(len(prompts))] == alone
        return len(prompts)

    def quantize(self, out: Path, *, kill_after: float | None = None, room: int | None = None) -> tuple[int, str]:
        """The command in a process of its own; its exit code and what it said."""
        words = [
            sys.executable,
            "-m",
            "hf_polyspec",
            "quantize",
            "--model",
            self.name,
            "--out",
            str(out),
            "--no-report",
        ]

        def limited() -> None:
            if room is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            list(map(str, words)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=limited,
            env=environment,
        )
        try:
            told, _ = process.communicate(timeout=kill_after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            told, _ = process.communicate()
        return process.returncode, told

    def killed(self, times: int) -> int:
        """SIGKILL at any time, and the command again until it ends: the same bytes as if nothing had happened."""
        whole = self.place / "whole"
        started = time.monotonic()
        code, told = self.quantize(whole)
        assert code == 0, told
        taken, right, out, kills = time.monotonic() - started, digests(whole), self.place / "killed", 0
        while kills < times:
            code, told = self.quantize(out, kill_after=self.chance.uniform(0.3, 1.05) * taken)
            assert code in (0, -signal.SIGKILL), told
            kills += code != 0
            if (out / "config.json").exists():  # its work was done, killed or not
                assert digests(out) == right
                shutil.rmtree(out)
        code, told = self.quantize(out)
        assert code == 0, told
        assert digests(out) == right
        return kills

    def full(self, times: int) -> int:
        """Disks that end somewhere in the checkpoint: an OSError, and the next run makes it whole."""
        right = digests(self.place / "whole")
        largest = max(path.stat().st_size for path in (self.place / "whole").iterdir())
        for number in range(times):
            out = self.place / f"full-{number}"
            code, told = self.quantize(out, room=self.chance.randrange(1000, largest))
            assert code > 0, (code, told)
            assert "File too large" in told, told
            assert not (out / "config.json").exists()
            code, told = self.quantize(out)
            assert code == 0, told
            assert digests(out) == right
            shutil.rmtree(out)
        return times

    def torn(self, some: int) -> int:
        """Each file of the checkpoint, cut off: a sentence with its name."""
        count = 0
        for file in (self.place / "whole").glob("*"):
            if file.suffix not in (".json", ".safetensors") or file.name.startswith(("tokenizer", "generation")):
                continue
            content = file.read_bytes()
            places = cuts(content, self.chance, some)
            for cut in self.chance.sample(places, min(some, len(places))):
                file.write_bytes(content[:cut])
                with pytest.raises((ValueError, OSError), match=re.escape(file.name)):
                    load_quantized(self.place / "whole")
                count += 1
            file.write_bytes(content)
        load_quantized(self.place / "whole")
        return count
