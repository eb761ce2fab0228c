# SPDX-License-Identifier: Apache-2.0
"""Activation-aware scales: inputs that are large get finer steps, and the layer before them takes the factor back.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (arXiv 2306.00978),
section 3.2, written from the paper's equations. Which layer can take a factor back is found by watching a pass, and
every kind of fold is tried on the float model before it is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_polyspec.cpu.packing import PackedForward
from hf_polyspec.integers.linear import float_weight
from hf_polyspec.integers.weights import round_to_nearest
from hf_polyspec.quantization.modules import is_linear, output_head, replace_module, sharing_copy

STEPS = 20
"""Exponents tried, from 0 (no scaling) to 1."""

# A projection whose output, channel by channel, is the next one's input: (before, after) under one parent.
_PAIRS = (("up_proj", "down_proj"), ("v_proj", "o_proj"), ("v_proj", "out_proj"), ("fc1", "fc2"))
_PROBE = (1, 2, 3, 4, 5, 6)


AFTER_FOLDING = {"awq": "search", "awq+gptq": "gptq"}
"""How the folded matrices are rounded, by method."""


@dataclass(frozen=True)
class Folded:
    """A float model with its scales folded.

    Attributes:
        model: It computes what the original does.
        moments: Second moments of every layer's input in it.
    """

    model: nn.Module
    moments: dict[str, Tensor]


@dataclass(frozen=True)
class Fold:
    """A module whose output can be divided by a factor a channel, and the layers that read it.

    Attributes:
        before: Name of a norm or linear layer with C output channels.
        after: Names of linear layers, whose K inputs are those channels, repeated where heads share keys and values.
        repeats: How often each block of `block` channels is repeated, K = C * repeats.
        block: Channels that stay together, the width of a head; 0 where nothing is repeated.
    """

    before: str
    after: tuple[str, ...]
    repeats: int = 1
    block: int = 0

    @property
    def kind(self) -> str:
        """What folds of all layers have in common: the last parts of the names."""
        leaves = [name.rsplit(".", 1)[-1] for name in (self.before, *self.after)]
        return " ".join(leaves)

    def spread(self, factors: Tensor) -> Tensor:
        """Factors `[C]` as the layers after see them, `[K]`."""
        if self.repeats == 1:
            return factors
        return factors.view(-1, 1, self.block).expand(-1, self.repeats, -1).reshape(-1)

    def gather(self, importance: Tensor) -> Tensor:
        """One value a channel `[C]` from one an input `[K]`: the mean over its repetitions."""
        if self.repeats == 1:
            return importance
        return importance.view(-1, self.repeats, self.block).mean(1).reshape(-1)


@torch.no_grad()
def fold_scales(
    model: nn.Module,
    moments: Mapping[str, Tensor],
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Folded:
    """A float model that computes the same and rounds better: channels with large activations carry larger weights.

    For each group of layers that read one input the factors are `s = m ** a`, with `m` the root mean square of each
    channel, and `a` the one of 20 exponents with the least error of the rounded layers' outputs,
    `sum trace((Q(W s) / s - W) H (Q(W s) / s - W).T)` (equation 4 of the paper, with the full second moments H).

    Args:
        model: A float causal LM; it stays as it is.
        moments: Second moments of every layer's input, from `input_moments`, not only their diagonals.
        bits: Bits the layers will be rounded to.
        group_size: Inputs that will share a scale.
        symmetric: Whether they will be rounded without zeros.
        progress: Called with the name of each module that took up factors.

    Returns:
        A copy with new weights where factors were folded (everything else is shared with the model), and the second
        moments of its inputs.

    Raises:
        ValueError: `moments` are only diagonals, or the model has no place where factors can be folded in; the sentence
            names the model.
    """
    first = next(iter(moments.values()), None)
    if first is not None and len(first) > 1 and torch.equal(first, torch.diag(first.diagonal())):
        raise ValueError("awq needs whole second moments: input_moments(model, tokens) without diagonal=True.")
    folds = usable_folds(model)
    result, scaled = sharing_copy(model), dict(moments)
    for fold in folds:
        if any(name not in moments for name in fold.after):
            continue
        factors = _best_factors(result, fold, moments, bits, group_size, symmetric)
        if factors is not None:
            apply_fold(result, fold, factors)
            for name in fold.after:
                spread = fold.spread(factors).to(moments[name])
                scaled[name] = moments[name] / (spread[:, None] * spread)
        if progress is not None:
            progress(fold.before)
    return Folded(result, scaled)


def fold_for(
    method: str,
    model: nn.Module,
    moments: Mapping[str, Tensor] | None,
    bits: int,
    group_size: int,
    symmetric: bool = False,
) -> tuple[nn.Module, str, Mapping[str, Tensor] | None]:
    """What a method named `awq...` comes down to: the folded model, and how to round it. Other methods pass through.

    Returns:
        Model, method and second moments for `quantize_model`.
    """
    if method not in AFTER_FOLDING or moments is None:
        return model, method, moments
    if bits == 8:  # too fine for scales to show
        return model, "rtn", moments
    folded = fold_scales(model, moments, bits, group_size, symmetric)
    return folded.model, AFTER_FOLDING[method], folded.moments


def usable_folds(model: nn.Module) -> list[Fold]:
    """All folds of a model that leave its output as it is, each kind tried.

    Raises:
        ValueError: There is none.
    """
    found = [*_norm_folds(model), *_pair_folds(model)]
    kinds = dict.fromkeys(fold.kind for fold in found)
    usable = [kind for kind in kinds if _harmless(model, [fold for fold in found if fold.kind == kind])]
    folds = [fold for fold in found if fold.kind in usable]
    if not folds:
        tried = f" ({len(kinds)} kinds of neighbours changed its output)" if kinds else ""
        raise ValueError(
            f"{type(model).__name__} has no norm or projection that awq's scales could be folded into{tried}; "
            'use method="gptq" or "search".'
        )
    return folds


def _norm_folds(model: nn.Module) -> list[Fold]:
    """Norms and the linear layers that read the very tensor a norm returned, seen in a pass over a few tokens."""
    made: dict[int, str] = {}
    keep: list[Tensor] = []  # ids stay unique while the tensors live
    readers: dict[str, list[str]] = {}

    def returned(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                keep.append(output)
                made[id(output)] = name

        return hook

    def read(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            source = made.get(id(inputs[0])) if inputs else None
            if source is not None and name not in readers.setdefault(source, []):
                readers[source].append(name)

        return hook

    hooks = []
    head = output_head(model)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1:
            hooks.append(module.register_forward_hook(returned(name)))
        elif is_linear(module) and module is not head:
            hooks.append(module.register_forward_pre_hook(read(name)))
    try:
        _logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    return [Fold(norm, tuple(names)) for norm, names in readers.items()]


def _pair_folds(model: nn.Module) -> Iterator[Fold]:
    for name, parent in model.named_modules():
        for before, after in _PAIRS:
            first, second = getattr(parent, before, None), getattr(parent, after, None)
            if not isinstance(first, nn.Module) or not isinstance(second, nn.Module):
                continue
            if not is_linear(first) or not is_linear(second):
                continue
            channels, inputs = float_weight(first)[0].shape[0], float_weight(second)[0].shape[1]
            block = getattr(parent, "head_dim", 0) if channels != inputs else 0
            if channels != inputs and (not block or inputs % channels or channels % block):
                continue
            names = [f"{name}.{leaf}" if name else leaf for leaf in (before, after)]
            yield Fold(names[0], (names[1],), inputs // channels, block)


def _harmless(model: nn.Module, folds: Sequence[Fold]) -> bool:
    """Whether the model's output stays the same when all these folds are made with arbitrary factors."""
    trial = sharing_copy(model)
    generator = torch.Generator().manual_seed(0)
    for fold in folds:
        channels = _channels(model.get_submodule(fold.before))
        factors = 1.0 + torch.rand(channels, generator=generator)
        if not apply_fold(trial, fold, factors):
            return False
    wanted, found = _logits(model), _logits(trial)
    tolerance = 1e-3 if wanted.dtype is torch.float32 else 5e-2
    wanted, found = wanted.float(), found.float()
    return bool((wanted - found).abs().max() <= tolerance * wanted.abs().max().clamp(min=1e-6))


def _logits(model: Any) -> Tensor:
    ids = torch.tensor([_PROBE], device=next(model.parameters()).device)
    with _eval(model):
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _channels(module: nn.Module) -> int:
    return int(float_weight(module)[0].shape[0] if is_linear(module) else module.weight.shape[0])  # type: ignore[index]


def apply_fold(model: nn.Module, fold: Fold, factors: Tensor) -> bool:
    """Divide what leaves one module by factors and multiply them into its readers, in place but in new tensors.

    Args:
        model: A copy that may be changed.
        fold: Where.
        factors: `[C]`, positive.

    Returns:
        False if the module before is a norm of a kind that cannot be divided; nothing is changed then.
    """
    before = model.get_submodule(fold.before)
    divided = _divided(before, factors)
    if divided is None:
        return False
    replace_module(model, fold.before, divided)
    spread = fold.spread(factors)
    for name in fold.after:
        layer = _own_copy(model.get_submodule(name))
        old: Any = layer.weight
        scale = spread.to(old)
        # nn.Linear holds [N, K], Conv1D [K, N].
        layer.weight = _like(old * (scale if isinstance(layer, nn.Linear) else scale[:, None]))
        replace_module(model, name, layer)
    return True


def _divided(module: nn.Module, factors: Tensor) -> nn.Module | None:
    """A copy of a module whose output is divided channel by channel, None if its weight does not work that way."""
    layer = _own_copy(module)
    weight: Any = module.weight
    scale = factors.to(weight)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        layer.bias = _like(bias / scale)
    if is_linear(module):
        layer.weight = _like(weight / (scale[:, None] if isinstance(module, nn.Linear) else scale))
        return layer
    sample = torch.linspace(-2.0, 3.0, 3 * weight.shape[0], device=weight.device).view(3, -1).to(weight.dtype)
    wanted = module(sample) / scale
    for trial in (weight / scale, (1 + weight) / scale - 1):  # Gemma's norms multiply by one more than their weight
        layer.weight = _like(trial)
        if torch.allclose(layer(sample).float(), wanted.float(), rtol=2e-2 if weight.dtype != torch.float32 else 1e-4):
            return layer
    return None


def _own_copy(module: nn.Module) -> nn.Module:
    """A module with the same parameters, to be given others; a packed one multiplies plainly, with its own."""
    layer = copy.copy(module)
    layer._parameters = dict(module._parameters)
    if isinstance(layer.__dict__.get("forward"), PackedForward):
        del layer.__dict__["forward"]
    return layer


def _like(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _best_factors(
    model: nn.Module, fold: Fold, moments: Mapping[str, Tensor], bits: int, group_size: int, symmetric: bool
) -> Tensor | None:
    """The factors with the least output error, None if no scaling is best."""
    importance = fold.gather(moments[fold.after[0]].diagonal()).clamp(min=1e-12).sqrt()  # [C]
    weights = [float_weight(model.get_submodule(name))[0].float() for name in fold.after]
    best: tuple[float, Tensor | None] = (float("inf"), None)
    for step in range(STEPS):
        exponent = step / STEPS
        factors = importance.to(weights[0].device) ** exponent
        factors = (factors / (factors.max() * factors.min()).sqrt()).clamp(1e-4, 1e4)  # centred on 1
        spread = fold.spread(factors)
        error = 0.0
        for name, weight in zip(fold.after, weights, strict=True):
            rounded = round_to_nearest(weight * spread, bits, group_size, symmetric).dequantize() / spread
            wrong = rounded - weight
            error += float(((wrong @ moments[name].to(wrong)) * wrong).sum())
        if error < best[0]:
            best = (error, None if step == 0 else factors)
    return best[1]
