# SPDX-License-Identifier: Apache-2.0
"""What published EAGLE-3 checkpoints leave out, or list in a way that only the target settles."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_polyspec.eagle import EagleHead, EagleHeadConfig, feature_layers
from hf_polyspec.eagle.formats.layers import unsettled_layers

KEY = "eagle_aux_hidden_state_layer_ids"


@torch.no_grad()
def scores_like(head: EagleHead, kit: SimpleNamespace, target: SimpleNamespace, w: dict[str, torch.Tensor]) -> None:
    """The head's logits over a short text are those of the formulas with these tensors."""
    head.bind(target.embedding, target.lm_head)
    features, facts = target.features(3 * kit.H), kit.facts(embedding=target.embedding.weight)
    places = list(range(len(target.tokens)))
    _, wanted = kit.eagle3_forward(w, target.tokens, kit.eagle3_fuse(w, features, facts), places, facts)
    found = head(torch.tensor([target.tokens]), features[None]).logits[0]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)


def lacking(kit: SimpleNamespace, *names: str, **how: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, w = kit.eagle3(**how)
    return config, {name: tensor for name, tensor in w.items() if name not in names}


# -- no lm_head ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["the target's", None, "left out"])
def test_the_targets_lm_head_scores_for_a_head_without(
    kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path, size: Any
) -> None:
    config, w = lacking(kit, "lm_head.weight", draft=False)
    config["draft_vocab_size"] = kit.V if size == "the target's" else size
    if size == "left out":
        del config["draft_vocab_size"]
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    assert not head.config.own_lm_head
    assert not hasattr(head, "lm_head")
    whole = w | {"lm_head.weight": target.lm_head.weight}
    scores_like(head, kit, target, whole)


def test_tied_to_an_embedding_of_its_own(kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path) -> None:
    config, w = lacking(kit, "lm_head.weight", draft=False, embedding=True)
    config["tie_word_embeddings"] = True
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    whole = w | {"lm_head.weight": w["embed_tokens.weight"]}
    scores_like(head, kit, target, whole)
    # untied, the embedding says nothing about the lm_head
    config["tie_word_embeddings"] = False
    head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    whole = w | {"lm_head.weight": target.lm_head.weight}
    scores_like(head, kit, target, whole)


@pytest.mark.parametrize("case", ["fewer ids", "fewer ids, no map", "another width"])
def test_where_the_targets_cannot_stand_in_the_lm_head_is_missed(
    kit: SimpleNamespace, tmp_path: Path, case: str
) -> None:
    config, w = lacking(kit, "lm_head.weight", draft=case != "another width")
    if case == "fewer ids, no map":
        del w["d2t"], w["t2d"]
    if case == "another width":
        config["target_hidden_size"], w["fc.weight"] = 2 * kit.H, torch.zeros(kit.H, 6 * kit.H)
    with pytest.raises(ValueError, match=r"missing keys: .*lm_head\.weight"):
        EagleHead.from_pretrained(kit.write(tmp_path, config, w))


# -- one layer more than fc reads ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["top", "eagle_config", "speculators"])
@pytest.mark.parametrize("told", [True, False])
def test_the_teachers_layer_is_not_read(
    kit: SimpleNamespace, target: SimpleNamespace, tmp_path: Path, place: str, told: bool
) -> None:
    config, w = kit.eagle3()
    if told:
        config["target_hidden_size"] = kit.H
    listed = {KEY: [2, 16, 29, 32]}
    config |= {"eagle_config": listed} if place == "eagle_config" else listed
    if place == "speculators":
        layer = {name: config[name] for name in config if name != "draft_vocab_size"}
        config |= {"speculators_model_type": "eagle3", "transformer_layer_config": layer, "norm_before_residual": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head = EagleHead.from_pretrained(kit.write(tmp_path, config, w))
    assert any("one more than fc.weight reads" in str(warning.message) for warning in caught)
    # nested, four numbers that are no default are taken for outputs of layers
    first = [3, 17, 30] if place == "eagle_config" else [2, 16, 29]
    assert head.config.feature_layer_ids == first
    assert (head.config.num_features, head.config.target_hidden_size) == (3, kit.H)
    scores_like(head, kit, target, w)


@pytest.mark.parametrize("layers", [[2, 16], [2, 3, 5, 7, 9], [29, 16, 2, 1]])
def test_other_numbers_of_layers_are_refused(kit: SimpleNamespace, tmp_path: Path, layers: list[int]) -> None:
    config, w = kit.eagle3()
    config |= {"target_hidden_size": kit.H, KEY: layers}
    with (
        pytest.warns(UserWarning, match="no default list"),
        pytest.raises(ValueError, match=r"fc\.weight reads features 72 wide"),
    ):
        EagleHead.from_pretrained(kit.write(tmp_path, config, w))


def test_as_many_narrow_states_as_are_listed(kit: SimpleNamespace, tmp_path: Path) -> None:
    """36 values of four layers: states of 9, since 36 is no multiple of the head's own width of 24."""
    config, w = kit.eagle3()
    w["fc.weight"] = torch.zeros(kit.H, 36)
    with pytest.warns(UserWarning, match="no default list"):
        head = EagleHead.from_pretrained(kit.write(tmp_path, config | {KEY: [1, 2, 3, 4]}, w))
    assert (head.config.num_features, head.config.target_hidden_size) == (4, 9)


# -- a convention that the target's depth settles ------------------------------------------------------------


def nested(kit: SimpleNamespace, folder: Path, layers: list[int], **how: Any) -> EagleHead:
    config, w = kit.eagle3()
    head: EagleHead = EagleHead.from_pretrained(kit.write(folder, config | {"eagle_config": {KEY: layers}}, w), **how)
    return head


@pytest.mark.filterwarnings("ignore:.*is no default list:UserWarning")
def test_outputs_of_layers_that_are_not_there_are_states(kit: SimpleNamespace, tmp_path: Path) -> None:
    head = nested(kit, tmp_path, [4, 6, 8])
    assert head.config.unsettled_layer_ids == [4, 6, 8]
    assert feature_layers(head.config, 12) == [5, 7, 9]  # the guess can be right
    with pytest.raises(ValueError, match=r"hidden states \[4, 6, 8\].* no un-normed hidden state 8: .*final norm"):
        feature_layers(head.config, 8)
    head.save_pretrained(tmp_path / "own")
    assert EagleHeadConfig.from_pretrained(tmp_path / "own").unsettled_layer_ids == [4, 6, 8]


@pytest.mark.filterwarnings("ignore:.*is no default list:UserWarning")
def test_a_refusal_tells_what_the_file_lists(kit: SimpleNamespace, tmp_path: Path) -> None:
    head = nested(kit, tmp_path, [3, 5, 7])
    with pytest.raises(ValueError, match=r"\[4, 6, 8\] \(its file lists \[3, 5, 7\]\).* hidden state 8: "):
        feature_layers(head.config, 8)
    with pytest.raises(ValueError, match=r"\[3, 5, 7\];.* hidden state 7\."):
        feature_layers(head.config, 6)


@pytest.mark.filterwarnings("ignore:.*is no default list:UserWarning")
def test_what_is_known_is_not_settled_anew(kit: SimpleNamespace, tmp_path: Path) -> None:
    assert nested(kit, tmp_path, [1, 15, 28]).config.unsettled_layer_ids is None
    told = nested(kit, tmp_path, [4, 6, 8], feature_layer_ids=[1, 2, 3])
    assert (told.config.feature_layer_ids, told.config.unsettled_layer_ids) == ([1, 2, 3], None)
    assert unsettled_layers({KEY: [4, 6, 8]}, speculators=True) is None
    assert unsettled_layers({"eagle_config": {KEY: [4, 6, 8]}, KEY: [5, 7, 9]}, speculators=False) is None
    assert unsettled_layers({}, speculators=False) is None
