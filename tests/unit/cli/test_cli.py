# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it refuses, and that it does so in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny_checkpoints import save_pair
from transformers import AutoConfig, BartConfig, BartForConditionalGeneration, RwkvConfig
from typer.testing import CliRunner, Result

import hf_polyspec
from hf_polyspec.cli import app, commands
from hf_polyspec.eagle import EagleHead, EagleHeadConfig


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    target, small = save_pair(tmp_path_factory.mktemp("cli"))
    return str(target), str(small)


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def refused(*arguments: str) -> str:
    """The one sentence on stderr of a command that ends with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("polyspec: ")
    return lines[0]


DEMO = ("--prompt", "abcabcabcabc", "--max-new-tokens", "24", "--block-size", "4", "--draft-tokens", "3")


def test_version_and_help() -> None:
    assert run("--version").output.strip() == f"polyspec {hf_polyspec.__version__}"
    text = run("--help").output
    assert run().output == text
    for name in ("demo", "generate", "inspect", *commands.COMMANDS):
        assert re.search(rf"^\s+{name}\s", text, re.MULTILINE)


def test_demo_answers_with_every_chain_and_compares(folders: tuple[str, str]) -> None:
    target, small = folders
    result = run("demo", "--model", target, "--assistant", small, "--assistant", "suffix", *DEMO)
    assert result.exit_code == 0, result.output
    assert "The 3 texts are identical, token for token (24 tokens each)." in result.output
    rows = [line.split() for line in result.output.splitlines() if re.search(r"\d\.\d\dx", line)]
    assert [row[-1] if row[0] == "plain" else row[0] for row in rows] == ["definition", "suffix", "small"]
    assert re.search(r"small \+ suffix .* target \d\.\d\d, small \d\.\d\d", result.output)
    # The text itself is there three times.
    texts = re.split(r"─{5,}", result.output)[2:5]
    answers = [re.sub(r"\n24 tokens in.*", "", text, flags=re.DOTALL).strip() for text in texts]
    assert len(answers[0]) > 5
    assert answers[0] == answers[1] == answers[2]


def test_demo_of_a_sampled_text_does_not_claim_identity(folders: tuple[str, str]) -> None:
    result = run("demo", "--model", folders[0], "--assistant", folders[1], "--temperature", "0.9", *DEMO)
    assert result.exit_code == 0, result.output
    assert "identical" not in result.output
    assert "differ by chance" in result.output


def test_demo_reports_a_difference_with_its_logits(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_polyspec.cli import demo

    truthful = demo.answer

    def wrong(*arguments: object, **named: object) -> demo.Answer:
        found = truthful(*arguments, **named)  # type: ignore[arg-type]
        if found.stats is not None:
            found.sequence[found.prompt_length + 7] ^= 1
        return found

    monkeypatch.setattr(demo, "answer", wrong)
    result = run("demo", "--model", folders[0], "--assistant", "suffix", *DEMO)
    assert result.exit_code == 0, result.output
    assert "identical" not in result.output
    assert re.search(
        r"suffix differs from plain generate\(\) from token 7 on: .* are \d\.\de[+-]\d+ apart\.",
        " ".join(result.output.split()),
    )


def test_demo_with_quantised_copies_of_any_model(folders: tuple[str, str]) -> None:
    result = run(
        "demo", "--model", folders[0], "--assistant", "int8", "--assistant", "int4", "--assistant", "suffix", *DEMO
    )
    assert result.exit_code == 0, result.output
    assert "The 4 texts are identical" in result.output


def test_demo_writes_the_coloured_page(folders: tuple[str, str], tmp_path: Path) -> None:
    page = tmp_path / "out.html"
    result = run("demo", "--model", folders[0], "--assistant", folders[1], *DEMO, "--html", str(page))
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "<h2>small</h2>" in text
    assert text.count('class="polyspec-text"') == 1


def test_none_is_the_model_alone(folders: tuple[str, str]) -> None:
    result = run("demo", "--model", folders[0], "--assistant", "none", *DEMO)
    assert result.exit_code == 0, result.output
    assert "The 2 texts are identical" in result.output
    assert re.search(r"the model alone .* target 1\.00", result.output)
    answered = run("generate", "abcabc", "--model", folders[0], "--assistant", "none", "--max-new-tokens", "8")
    assert "0 target" in answered.stderr
    assert "1 " not in "".join(line[:2] for line in answered.stderr.splitlines())
    said = refused("generate", "abcabc", "--model", folders[0], "--assistant", "none", "--assistant", "suffix")
    assert "name no other beside it" in said


def test_generate_prints_the_text_alone_on_stdout(folders: tuple[str, str]) -> None:
    options = ("--model", folders[0], "--max-new-tokens", "16")
    result = run("generate", "abcabc", *options, "--assistant", folders[1])
    assert result.exit_code == 0, result.output
    assert "0 target" in result.stderr
    assert "1 small" in result.stderr
    assert "mean" not in result.stdout
    piped = run("generate", "-", *options, "--assistant", "suffix", stdin="abcabc")
    assert piped.stdout == result.stdout
    assert len(result.stdout.strip()) > 3


def test_generate_is_repeatable_by_its_seed(folders: tuple[str, str]) -> None:
    options = ("generate", "abc", "--model", folders[0], "--assistant", "suffix", "--temperature", "1.5")
    texts = [run(*options, "--max-new-tokens", "24", "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_inspect_of_a_model(folders: tuple[str, str]) -> None:
    text = run("inspect", folders[0]).output
    for part in (
        "LlamaForCausalLM",
        r"layers +2",
        "259 rows",
        "'</s>' = 2",
        r"chat template +yes",
        r"quantisation +none",
        r"packed on this CPU +[\d.]+ MB beside the weights' [\d.]+ MB, ",
    ):
        assert re.search(part, text), part
    assert re.search(r"as target +yes", text)
    assert re.search(r"as drafter +yes, for every target with the same tokenizer", text)
    assert re.search(r"as middle +yes, for ", run("inspect", folders[1], "--target", folders[0]).output)


def test_inspect_names_what_does_not_fit(folders: tuple[str, str], tmp_path: Path, tiny: object) -> None:
    tiny("llama", vocab_size=48).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    other = " ".join(run("inspect", str(tmp_path / "other"), "--target", folders[0]).output.split())
    assert re.search(r"as middle no: .* tokenizer ", other)
    RwkvConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "rwkv")
    rwkv = " ".join(run("inspect", str(tmp_path / "rwkv")).output.split())
    assert re.search(r"as target no: .*recurrent state", rwkv)
    bart = BartConfig(vocab_size=48, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)  # fmt: skip
    BartForConditionalGeneration(bart).save_pretrained(tmp_path / "bart")
    assert re.search(r"as target no", " ".join(run("inspect", str(tmp_path / "bart")).output.split()))


def test_inspect_of_a_quantised_checkpoint(folders: tuple[str, str], tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(folders[0])
    config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    config.save_pretrained(tmp_path)
    assert "gptq, 4 bits, groups of 128" in run("inspect", str(tmp_path)).output


def test_inspect_of_an_eagle_head(folders: tuple[str, str], tmp_path: Path) -> None:
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2}
    EagleHead(EagleHeadConfig(**sizes)).save_pretrained(tmp_path / "head")
    text = " ".join(run("inspect", str(tmp_path / "head"), "--target", folders[0]).output.split())
    assert "EAGLE-3 head" in text
    assert "as target no: a head only drafts" in text
    assert "as drafter yes, its sizes fit" in text
    EagleHead(EagleHeadConfig(**{**sizes, "vocab_size": 99})).save_pretrained(tmp_path / "odd")
    odd = " ".join(run("inspect", str(tmp_path / "odd"), "--target", folders[0]).output.split())
    assert "as drafter no: it was made for a vocabulary of 99" in odd


def test_an_option_that_does_not_exist() -> None:
    assert "--nope" in refused("demo", "--nope")
    assert "nope" in refused("nope")
    assert "prompt" in refused("generate").lower()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "./nowhere"), "There is no folder ./nowhere."),
        (("--dtype", "int3"), "dtype must be one of"),
        (("--device", "warp9"), "'warp9' cannot be used"),
        (("--max-new-tokens", "0"), "--max-new-tokens must be at least 1"),
        (("--temperature", "-1"), "--temperature must be 0 or more"),
        (("--temperature", "nan"), "--temperature must be 0 or more"),
        (("--prompt", "  "), "The prompt is empty."),
        (("--block-size", "0"), "polyspec_block_size must be a whole number"),
        (("--draft-tokens", "0"), "num_assistant_tokens must be a whole number"),
        (("--assistant", "suffix", "--assistant", "int8"), "suffix only drafts"),
        (("--html", "no/such/folder/x.html"), "The folder of no/such/folder/x.html does not exist."),
        (("--max-new-tokens", "many"), "--max-new-tokens"),
    ],
)
def test_refused_before_any_model_is_loaded(
    arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, folders: tuple[str, str]
) -> None:
    given = arguments if "--model" in arguments else ("--model", folders[0], *arguments)
    if "--model" not in arguments:
        monkeypatch.setattr("hf_polyspec.models.by_name.load_model", lambda *a: pytest.fail("a model was loaded"))
    assert said in refused("demo", *given)


def test_a_different_tokenizer_is_one_sentence(folders: tuple[str, str], tmp_path: Path, tiny: object) -> None:
    tiny("llama", vocab_size=48).save_pretrained(tmp_path)  # type: ignore[operator]
    assert "has another tokenizer" in refused("demo", "--model", folders[0], "--assistant", str(tmp_path))


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    assert f"The config of {tmp_path} could not be loaded: " in refused("demo", "--model", str(tmp_path))
    assert f"The config of {tmp_path} could not be loaded: " in refused("inspect", str(tmp_path))


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(name: str, target: str | None) -> None:
        raise AttributeError("not the user's fault")

    monkeypatch.setattr("hf_polyspec.models.inspection.inspect_name", bug)
    assert isinstance(run("inspect", "x").exception, AttributeError)


def test_a_missing_extra_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'evaluate'", name="evaluate.module")

    monkeypatch.setattr(commands.importlib, "import_module", missing)
    said = refused("score", "outputs.jsonl")
    assert said == (
        "polyspec: polyspec score needs the package evaluate, which comes with the extra 'metrics': "
        'pip install "hf_polyspec[metrics]".'
    )


def test_commands_of_other_rooms_show_their_own_help_and_errors(tmp_path: Path) -> None:
    text = run("score", "--help").output
    assert "Usage: polyspec score" in text
    assert "--baseline" in text
    assert "does not exist" in refused("score", str(tmp_path / "none.jsonl"))


def test_generate_with_the_options_of_a_head(folders: tuple[str, str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from hf_polyspec.eagle import init_for

    init_for(AutoModelForCausalLM.from_pretrained(folders[0])).save_pretrained(tmp_path / "head")
    chain = ("--model", folders[0], "--assistant", str(tmp_path / "head"), "--assistant", "suffix")
    shape = ("--tree-tokens", "6", "--tree-depth", "3", "--tree-top-k", "2", "--draft-vocabulary", "auto")
    ends = ("--confidence", "0.1", "--schedule", "heuristic", "--max-new-tokens", "16")
    result = run("generate", "abcabcabcabc", *chain, *shape, *ends)
    assert result.exit_code == 0, result.output
    plain = run("generate", "abcabcabcabc", "--model", folders[0], "--assistant", "suffix", "--max-new-tokens", "16")
    assert result.stdout == plain.stdout
    assert re.search(r"1 head\s", result.stderr)
    assert re.search(r"2 suffix\s", result.stderr)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--tree-tokens", "-1", "polyspec_tree_tokens"),
        ("--tree-depth", "0", "polyspec_tree_depth"),
        ("--draft-vocabulary", "small", "polyspec_draft_vocabulary"),
        ("--draft-temperature", "0", "polyspec_draft_temperature"),
        ("--confidence", "2", "assistant_confidence_threshold"),
        ("--schedule", "sometimes", "num_assistant_tokens_schedule"),
    ],
)
def test_options_of_a_head_are_checked_before_anything_is_loaded(option: str, value: str, said: str) -> None:
    assert said in refused("generate", "hello", "--model", "/nowhere", option, value)
