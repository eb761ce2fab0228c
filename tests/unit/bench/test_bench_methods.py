# SPDX-License-Identifier: Apache-2.0
"""Names of methods: read, spelled out, swept, refused."""

from __future__ import annotations

import pytest

from hf_polyspec.bench.methods import Method, chains, expand, parse, sweep

KNOWN = ("int8", "head", "suffix")
DRAFTERS = ["head", "suffix"]


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "plain-packed",
        "hf:prompt-lookup",
        "hf:assisted:int8",
        "hf:early-exit:3",
        "polyspec:int8,head@block=12,draft=6",
        "polyspec:none",
        "planned",
    ],
)
def test_names_are_read_and_written_alike(name: str) -> None:
    assert parse(name, KNOWN).name == name


def test_options_reach_generate_under_their_own_names() -> None:
    method = parse("polyspec:int8,head@block=12,tree=30,verification=token", KNOWN)
    assert method.chain_options == {
        "polyspec_block_size": 12,
        "polyspec_tree_tokens": 30,
        "polyspec_verification": "token",
    }
    steered = parse("polyspec:int8,head@control=online", KNOWN)
    assert steered.chain_options == {"polyspec_control": "online"}
    assert steered.name == "polyspec:int8,head@control=online"
    assert parse("polyspec:head@confidence=0.4", KNOWN).chain_options == {"assistant_confidence_threshold": 0.4}
    sharper = parse("polyspec:head@draft-temperature=0.8", KNOWN)
    assert sharper.chain_options == {"polyspec_draft_temperature": 0.8}
    assert parse(sharper.name, KNOWN) == sharper
    assert parse("polyspec:head@copies=no", KNOWN).chain_options == {"polyspec_draft_copies": False}
    with pytest.raises(ValueError, match="yes or no"):
        parse("polyspec:head@copies=maybe", KNOWN)
    assert method.label(1) == method.name
    assert method.label(4) == "polyspec:int8,head@block=12,tree=30,verification=token,batch=4"
    assert Method("plain").label(8) == "plain@batch=8"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vllm", "a method is one of plain"),
        ("plainer", "a method is one of plain"),
        ("polyspec", "needs an assistant"),
        ("polyspec:int4", "the assistant 'int4', which no --assistant gives"),
        ("hf:assisted:int8,head", "transformers takes one assistant"),
        ("hf:early-exit:half", "comes a number of layers"),
        ("plain:int8", "plain takes no assistants"),
        ("plain@block=3", "only chains take options"),
        ("polyspec:int8@blocks=3", "options of a chain are block"),
        ("polyspec:int8@block=many", "block takes a whole number"),
        ("polyspec:int8@control=always", "polyspec_control must be one of"),
        ("polyspec:head@confidence=much", "confidence takes a number"),
        ("polyspec:head@confidence=2", "assistant_confidence_threshold must be a number from 0 to 1"),
        ("polyspec:int8@block=0", "polyspec_block_size must be a whole number of at least 1"),
    ],
)
def test_what_is_no_method_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(name, KNOWN)


def test_all_chains_keep_the_order_and_have_drafters_last() -> None:
    names = [method.name for method in chains(KNOWN, DRAFTERS)]
    assert names == ["polyspec:int8", "polyspec:head", "polyspec:suffix", "polyspec:int8,head", "polyspec:int8,suffix"]
    deep = [method.name for method in chains(("int8", "exit", "head"), ["head"])]
    assert "polyspec:int8,exit,head" in deep


def test_without_methods_everything_is_run_and_plain_comes_first() -> None:
    found = [method.name for method in expand(None, KNOWN, DRAFTERS, plan=True)]
    assert found[:5] == ["plain", "plain-packed", "hf:prompt-lookup", "hf:assisted:int8", "hf:early-exit"]
    assert found[-1] == "planned"
    assert expand(["polyspec:head", "plain"], KNOWN, DRAFTERS, False)[0].name == "plain"
    assert "hf:assisted:head" not in [method.name for method in expand(["peers"], ("head",), ["head"], False)]
    with pytest.raises(ValueError, match="--plan FILE"):
        expand(["planned"], KNOWN, DRAFTERS, plan=False)


def test_a_chain_of_none_has_no_sizes() -> None:
    alone = parse("polyspec:none", KNOWN)
    assert alone == Method("polyspec")
    assert sweep([alone], {"draft": ["2", "4"], "block": ["4"], "tree": ["8"]}, DRAFTERS) == [alone]


def test_a_sweep_multiplies_only_what_the_option_acts_on() -> None:
    methods = expand(["polyspec:head", "polyspec:int8,head", "polyspec:int8,suffix"], KNOWN, DRAFTERS, False)
    names = [method.name for method in sweep(methods, {"block": ["4", "8"], "tree": ["0", "30"]}, DRAFTERS)]
    assert names.count("plain") == 1
    assert [name for name in names if name.startswith("polyspec:head")] == [
        "polyspec:head@tree=0",
        "polyspec:head@tree=30",
    ]
    assert "polyspec:int8,head@block=8,tree=30" in names
    assert [name for name in names if "suffix" in name] == [
        "polyspec:int8,suffix@block=4",
        "polyspec:int8,suffix@block=8",
    ]
    with pytest.raises(ValueError, match="options of a chain are"):
        sweep(methods, {"depths": ["4"]}, DRAFTERS)
