# SPDX-License-Identifier: Apache-2.0
"""The same float model with its matrices laid out for the CPU's multiplier: exact, opt-in, undone exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import string_at
from typing import TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_polyspec.cpu.compiled import compiles
from hf_polyspec.cpu.compiled.places import address
from hf_polyspec.cpu.float_kernels import multiplies, pack_float, packing_size, packs
from hf_polyspec.cpu.fusable import fusable, fused_blocks
from hf_polyspec.cpu.fused_block import FusedBlock
from hf_polyspec.cpu.joint_product import SIBLINGS, JointProduct, change_count, sampled
from hf_polyspec.cpu.memory import grant
from hf_polyspec.cpu.shortage import Shortage
from hf_polyspec.defaults import require_model
from hf_polyspec.host.release import is_compiled
from hf_polyspec.host.walking import modules_of
from hf_polyspec.integers.linear import Kernel

Model = TypeVar("Model", bound=nn.Module)
Marks = tuple[object, ...]
Kept = tuple[Kernel, tuple[Marks, ...]]

# Below this many rows the plain product is memory-bound and wins (measured, docs/quantization.md) where nothing is
# compiled; 16-bit types that the machine multiplies itself are packed for every number of rows there.
FEW_ROWS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 3}

# Layers whose siblings have turned out to read other inputs than theirs.
_APART: WeakSet[nn.Linear] = WeakSet()


class PackedProduct(JointProduct):
    """The packed product of one float layer, or of several that read the same input.

    Args:
        layers: Layers of one width, dtype and device.
        kept: From `kept()` of an earlier one; packed again if a weight has changed since.
    """

    layers: list[nn.Linear]
    looks_at_weights = True

    def __init__(self, layers: Sequence[nn.Linear], kept: Kept | None = None, shortage: Shortage | None = None) -> None:
        super().__init__(layers)
        self._packed: Kernel | None = None if kept is None else kept[0]
        self._stamp: tuple[Marks, ...] = () if kept is None else kept[1]
        self._shortage = shortage or Shortage()
        self.lacks = 0
        """Bytes that were not to be had when the matrix was to be packed last."""

    def kept(self) -> Kept | None:
        """The packed matrix and what it was packed from, None if it has not been needed yet."""
        return None if self._packed is None else (self._packed, self._stamp)

    def kernel(self) -> Kernel | None:
        """The packed matrix of the weights as they are now, None where there can be none or memory is short."""
        if not _can_multiply(self.layers):
            return None
        stamp = tuple(_marks(layer) for layer in self.layers)
        # First pass, or a weight was changed since, or memory was short: it is asked for again in every pass.
        if stamp != self._stamp or self.lacks:
            weights = [layer.weight.detach() for layer in self.layers]
            self._packed, self._stamp, self._sizes = None, stamp, [weight.shape[0] for weight in weights]
            self._packed = self._pack(weights)
        return self._packed

    def _pack(self, weights: list[Tensor]) -> Kernel | None:
        """The packed matrix, None where there is no memory for it."""
        needed = sum(packing_size(weight, len(weights) > 1) for weight in weights)
        if grant(needed):
            try:
                packed = pack_float(weights[0] if len(weights) == 1 else torch.cat(weights), self._bias())
                self.lacks = 0
                return packed
            except (
                MemoryError,
                RuntimeError,
            ) as error:  # torch's allocator raises the latter, and packing nothing else
                if not isinstance(error, MemoryError) and "alloc" not in str(error):
                    raise
        self.lacks = needed
        self._shortage.tell(self.layers, needed)
        return None

    def takes(self, dtype: torch.dtype, rows: int) -> bool:
        plain = all(dtype is layer.weight.dtype and _can_pack(layer.weight) for layer in self.layers)
        return plain and few_rows(dtype) == 0 and not _autocasts()

    def unchanged(self, member: int) -> bool:
        # Asked for every layer of every pass; nobody merges adapters between two siblings, so torch's count will do.
        weight = self.layers[member].weight
        start, _, count, *_ = self._stamp[member]
        return start == weight.data_ptr() and count == change_count(weight)

    def alone(self, member: int) -> PackedProduct:
        """The product of one of the layers by itself."""
        return PackedProduct([self.layers[member]], shortage=self._shortage)

    def dissolve(self) -> None:
        super().dissolve()
        self._packed, self._stamp, self.lacks = None, (), 0
        _APART.update(self.layers)

    def _bias(self) -> Tensor | None:
        if all(layer.bias is None for layer in self.layers):
            return None
        biases = (
            layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in self.layers
        )
        return torch.cat([bias.detach() for bias in biases])

    def __getstate__(self) -> dict[str, object]:
        # Packed weights are opaque to copy and pickle, and quick to build again.
        return {**super().__getstate__(), "_packed": None, "_stamp": (), "lacks": 0}


def _marks(layer: nn.Linear) -> Marks:
    """What changes when a layer's numbers do: where they lie, torch's counts of changes, and some of the numbers.

    Writing through `.data`, as PEFT does to merge adapters, is counted by nobody.
    """
    weight, bias = _own(layer, "weight"), _own(layer, "bias")
    assert weight is not None
    start = weight.data_ptr()
    sample = tuple(string_at(*place) for place in sampled(weight))
    marks = (start, weight.dtype, change_count(weight), weight.shape, sample)
    if bias is None:
        return marks
    return (*marks, bias.data_ptr(), change_count(bias), string_at(*sampled(bias, whole=False)[0]))


def _can_multiply(layers: Sequence[nn.Linear]) -> bool:
    """Whether the layers' matrices can stand one below the other.

    Raises:
        RuntimeError: The memory of one was taken away; torch may end the process over that.
    """
    for layer in layers:
        weight, bias = _own(layer, "weight"), _own(layer, "bias")
        if weight is None or not _can_pack(weight) or weight.shape[1] != layers[0].weight.shape[1]:
            return False
        address(weight, "weights")
        if bias is not None:
            if bias.shape != weight.shape[:1] or bias.device != weight.device or not bias.is_contiguous():
                return False
            address(bias, "biases")
    return True


def _own(layer: nn.Linear, name: str) -> Tensor | None:
    """A parameter without the detour through `nn.Module.__getattr__`: asked for in every pass."""
    found: Tensor | None = layer._parameters[name] if name in layer._parameters else getattr(layer, name)
    return found


class PackedForward:
    """Takes the place of one layer's `forward`; the layer's parameters and class stay what they are.

    Args:
        product: Computes the layer, perhaps with its siblings.
        member: The layer's place among them.
    """

    def __init__(self, product: PackedProduct, member: int = 0) -> None:
        self._place = product, member  # replaced as one: other threads may be calling

    @property
    def product(self) -> PackedProduct:
        """What computes the layer."""
        return self._place[0]

    @property
    def linear(self) -> nn.Linear:
        """The layer."""
        product, member = self._place
        return product.layers[member]

    def __call__(self, input: Tensor) -> Tensor:
        product, member = self._place
        linear = product.layers[member]
        weight = linear.weight
        trained = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        rows = input.numel() // max(1, linear.in_features)
        torchs = rows < few_rows(weight.dtype)
        if not (trained or torchs or input.dtype is not weight.dtype or not _can_pack(weight) or _autocasts()):
            if product.dissolved:
                product, member = self._place = product.alone(member), 0
            part = product.part(member, input) if _plain(input, linear.in_features) else None
            if part is not None:
                return part
        return F.linear(input, weight, linear.bias)


def _can_pack(weight: Tensor) -> bool:
    """Whether the numbers of a matrix lie in memory one after the other, and packing them pays.

    Subclasses (quantised, distributed) bring products of their own; a weight that is no parameter is made anew by
    somebody's hook in every pass.
    """
    plain = type(weight) is nn.Parameter and weight.dim() == 2
    return plain and packs(weight) and weight.is_contiguous()


def _plain(x: Tensor, width: int) -> bool:
    """Whether these are numbers in the CPU's memory, as many as wanted; torch's own product has words for the rest."""
    return type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.shape[-1] == width


def _autocasts() -> bool:
    return torch.is_autocast_enabled("cpu")


def few_rows(dtype: torch.dtype) -> int:
    """The number of rows from which the packed product is used."""
    if compiles() or (multiplies(dtype) and dtype is not torch.float32):
        return 0
    return FEW_ROWS.get(dtype, 0)


def pack(model: Model) -> Model:
    """Let a model's float linear layers multiply in a layout that suits the CPU; in place, undone by `unpack`.

    The same numbers are multiplied in another order, so outputs agree within the rounding of the dtype; layers that
    read the same input are one product. Types that this CPU has no instructions for (float16; bfloat16 without
    AVX512-BF16) are multiplied in float32 and rounded once at the end. Parameters, `state_dict` and class of every
    layer stay; a weight that is changed later is packed again (one exception: a few numbers written through `.data`,
    which torch does not count; `unpack` and `pack` after that). Costs a second copy of the matrices, in float32 for
    those types unless numba is installed. It is made matrix by matrix in the first pass, as far as memory is left: what
    is not packed is said once in a warning and in the statistics of a generation, and tried again in every pass. Does
    nothing on other devices, under autocast, and for layers whose `forward` someone else has already
    replaced.

    Args:
        model: Any model.

    Returns:
        The same model.
    """
    require_model("pack", model)
    blocks = list(fusable(model))  # tried out before anything is packed, which is put off until it is needed
    for product in _products(_packable(model), {}, _shortage(model)):
        _install(product)
    for block in blocks:
        block.__dict__["forward"] = FusedBlock(block)
    _STAY.add(model)
    return model


def _packable(model: nn.Module) -> Iterator[list[nn.Linear]]:
    """Layers to be packed, those together that may read the same input."""
    grouped: set[int] = set()
    modules = modules_of(model)
    if not any(type(module) is nn.Linear for module in modules):
        return  # as in a copy with integer weights
    for parent in modules:
        for names in SIBLINGS if isinstance(parent._modules, dict) and parent._modules else ():  # none of a script
            layers = [parent._modules.get(name) for name in names]  # what is missing costs getattr an exception
            found = [layer for layer in layers if isinstance(layer, nn.Linear) and _is_plain(layer)]
            alike = len(found) == len(names) and len({_kind(layer) for layer in found}) == 1
            if alike and not any(layer in _APART for layer in found):
                grouped.update(map(id, found))
                yield found
    for module in modules:
        if isinstance(module, nn.Linear) and _is_plain(module) and id(module) not in grouped:
            yield [module]


def _is_plain(layer: nn.Linear) -> bool:
    return type(layer) is nn.Linear and "forward" not in layer.__dict__ and _can_pack(layer.weight)


def _kind(layer: nn.Linear) -> tuple[object, ...]:
    return (layer.in_features, layer.weight.dtype, layer.weight.device)


def _products(
    groups: Iterable[list[nn.Linear]], kept: Mapping[nn.Linear, Kept], shortage: Shortage
) -> list[PackedProduct]:
    return [PackedProduct(layers, kept.get(layers[0]), shortage) for layers in groups]


def _shortage(model: nn.Module) -> Shortage:
    """What the products of a model share, from one time that it is packed to the next."""
    found = _SHORT.get(model)
    if found is None:
        found = _SHORT[model] = Shortage(type(model).__name__)
    return found


def _install(product: PackedProduct) -> None:
    for member, layer in enumerate(product.layers):
        layer.__dict__["forward"] = PackedForward(product, member)


# Packed matrices of assistants between two generations, for as long as their layers live.
_KEPT: WeakKeyDictionary[nn.Linear, Kept] = WeakKeyDictionary()
_SHORT: WeakKeyDictionary[nn.Module, Shortage] = WeakKeyDictionary()
_STAY: WeakSet[nn.Module] = WeakSet()  # models that are packed between generations too


@contextmanager
def packed_assistants(assistants: Iterable[object], target: nn.Module | None = None) -> Iterator[None]:
    """Pack the assistants of a chain while it runs; afterwards they are as they were, whatever ended it.

    What was packed and fused is kept for the next time. Layers shared with the target are left alone (the target's
    are packed only by `pack`), and so are compiled models; where memory is short see `pack`.

    Args:
        assistants: Members of a chain; those that are no models are passed over.
        target: The model above them.
    """
    products: dict[int, PackedProduct] = {}
    models = [one for one in assistants if isinstance(one, nn.Module) and one not in _STAY and not is_compiled(one)]
    alone = set(map(id, modules_of(target))) if models and target is not None else set()
    for assistant in models:
        groups = [layers for layers in _packable(assistant) if not any(id(one) in alone for one in layers)]
        for product in _products(groups, _KEPT, _shortage(assistant)):
            products[id(product.layers[0])] = product
    blocks = [block for model in models for block in fused_blocks(model) if id(block.layer) not in alone]
    layers = [block.layer for block in blocks]
    layers += [layer for product in products.values() for layer in product.layers]
    try:
        # Twice, since an interrupt can end either of them midway.
        try:
            for product in products.values():
                _install(product)
            for block in blocks:
                block.layer.__dict__["forward"] = block
            yield
        finally:
            _restore(layers)
    finally:
        _restore(layers)


def _restore(layers: Iterable[nn.Module]) -> None:
    """Give layers their own forward back, and keep what they were computed with for the next time."""
    for layer in layers:
        forward = layer.__dict__.get("forward")
        if isinstance(forward, PackedForward | FusedBlock):
            layer.__dict__.pop("forward", None)  # another thread may have been here
            _keep(forward)


def _keep(forward: object) -> None:
    """What an assistant's layer was computed with, for the next time."""
    kept = forward.product.kept() if isinstance(forward, PackedForward) else None
    if isinstance(forward, PackedForward) and kept is not None:
        _KEPT[forward.product.layers[0]] = kept


def unfuse(model: Model) -> Model:
    """Let decoder layers compute by their own operations again; their linear layers stay packed.

    Args:
        model: A model, packed or not.

    Returns:
        The same model.
    """
    require_model("unpack", model)
    _STAY.discard(model)
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedBlock):
            del module.__dict__["forward"]
    return model


def unpack(model: Model) -> Model:
    """Undo `pack` exactly; models that are not packed are left alone.

    Args:
        model: A model, packed or not.

    Returns:
        The same model.
    """
    for module in unfuse(model).modules():
        if isinstance(module.__dict__.get("forward"), PackedForward):
            del module.__dict__["forward"]
    return model


def is_packed(model: nn.Module) -> bool:
    """Whether any layer of a model is packed."""
    return any(is_packing(module.__dict__.get("forward")) for module in model.modules())


def is_packing(forward: object) -> bool:
    """Whether what stands in the place of a layer's `forward` is the packed way."""
    return isinstance(forward, PackedForward | FusedBlock)
