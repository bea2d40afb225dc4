"""Where the model code of a release of transformers has the functions that are replaced.

From 5.15 on a layer calls four functions of its modeling module by their names. Up to 5.14 each
layer holds them as attributes, which its ``__init__`` fills:

    self.chunk_gated_delta_rule, self.recurrent_gated_delta_rule
    self.causal_conv1d_fn, self.causal_conv1d_update      not OLMo-hybrid, which keeps its own

Source: the releases named in docs/transformers.md; ``make transformers-matrix`` runs them.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gdn_ops.integrations.transformers.functions import REPLACEMENTS, replacements

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "qwen4_exp", "lara_mini")


Owner = ModuleType | nn.Module | type


class Place(NamedTuple):
    """An attribute of a module of Python, of a layer or of a class, and what goes there."""

    owner: Owner
    name: str
    value: Any


def places(model: nn.Module | None, state_dtype: torch.dtype) -> Iterator[Place]:
    """Where the functions go; those of all families where there is no model.

    Raises:
        ValueError: ``model`` has no layer of a family, or there must be one and is none.
        NotImplementedError: this release lays out its model code in another way.
    """
    modules = _modeling_modules()
    layers = {} if model is None else _layers(model, modules)
    if model is not None:
        if not layers:
            raise ValueError(
                f"use_gdn_ops: model must have gated delta net layers of {', '.join(modules)}, "
                f"got {type(model).__name__}"
            )
        modules = {family: modules[family] for family in layers}
    for family, module in modules.items():
        if _keeps_attributes(module):
            if model is None:
                raise ValueError(
                    "use_gdn_ops: model must be given with transformers 5.14 and older, got None"
                )
            for layer in layers[family]:
                yield from _places_of_layer(family, layer, state_dtype)
        else:
            yield from _places_of_module(family, module, state_dtype)


def _modeling_modules() -> dict[str, ModuleType]:
    """The modeling modules of the families that this release has."""
    names = {family: f"transformers.models.{family}" for family in FAMILIES}
    found = {
        family: importlib.import_module(f"{name}.modeling_{family}")
        for family, name in names.items()
        if importlib.util.find_spec(name) is not None
    }
    if not found:
        raise NotImplementedError(
            f"use_gdn_ops: transformers must be 4.57 or newer, got {_version()}, "
            f"which has none of {', '.join(FAMILIES)}"
        )
    return found


def _layers(model: nn.Module, modules: dict[str, ModuleType]) -> dict[str, list[nn.Module]]:
    """By family, the layers of a model; those of a subclass too."""
    families = {module.__name__: family for family, module in modules.items()}
    found: dict[str, list[nn.Module]] = {}
    for layer in model.modules():
        for base in type(layer).__mro__:
            if base.__module__ in families and base.__name__.endswith("GatedDeltaNet"):
                found.setdefault(families[base.__module__], []).append(layer)
                break
    return found


def _keeps_attributes(module: ModuleType) -> bool:
    """Whether this is model code of 5.14 or older, which has this flag beside the attributes."""
    return hasattr(module, "is_fast_path_available")


def _places_of_module(family: str, module: ModuleType, state_dtype: torch.dtype) -> Iterator[Place]:
    _require(family, module, REPLACEMENTS)
    for name, function in replacements(state_dtype).items():
        yield Place(module, name, function)
    from gdn_ops.integrations.transformers.assisted import assistance

    for place in assistance(module, state_dtype):
        yield Place(*place)


def _places_of_layer(family: str, layer: nn.Module, state_dtype: torch.dtype) -> Iterator[Place]:
    _require(family, layer, ("chunk_gated_delta_rule", "recurrent_gated_delta_rule"))
    for name, function in _for_attributes(state_dtype).items():
        if hasattr(layer, name):
            yield Place(layer, name, function)


def _require(family: str, owner: ModuleType | nn.Module, names: Any) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise NotImplementedError(
            f"use_gdn_ops: transformers must be a release from 4.57 to 5.24, got {_version()}, "
            f"whose {family} has no {missing[0]}"
        )


@functools.cache
def _for_attributes(state_dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """The functions as 5.14 and older call them."""
    new = replacements(state_dtype)
    chunk_rule, convolution = new["torch_chunk_gated_delta_rule"], new["causal_conv1d_fn"]

    def chunk_gated_delta_rule(*args: Any, **kwargs: Any) -> Any:
        _refuse_packed("chunk_gated_delta_rule", "cu_seqlens", kwargs.get("cu_seqlens"))
        return chunk_rule(*args, **kwargs)

    def causal_conv1d_fn(x: Tensor, seq_idx: Tensor | None = None, **kwargs: Any) -> Any:
        _refuse_packed("causal_conv1d_fn", "seq_idx", seq_idx)
        return convolution(x, **kwargs)

    return {
        "chunk_gated_delta_rule": chunk_gated_delta_rule,
        "recurrent_gated_delta_rule": new["torch_recurrent_gated_delta_rule"],
        "causal_conv1d_fn": causal_conv1d_fn,
        "causal_conv1d_update": new["causal_conv1d_update"],
    }


def _refuse_packed(op: str, name: str, value: Tensor | None) -> None:
    """5.14 and older tell the convolution and the rule of the bounds in different ways, or not."""
    if value is not None:
        raise NotImplementedError(
            f"{op}: {name} must be None with transformers {_version()}: "
            f"packed sequences are served from 5.15 on"
        )


def _version() -> str:
    from transformers import __version__

    return str(__version__)
