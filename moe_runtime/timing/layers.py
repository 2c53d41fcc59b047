"""LayerHooks: how a timer learns when a model enters and leaves its attention layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_models.interfaces import CausalLM
from moe_runtime.timing.parts import Part

_PART_OF_KIND = {"attention": Part.ATTENTION, "linear_attention": Part.LINEAR_ATTENTION}


class LayerHooks:
    """Calls `switch` with a layer's part before its forward and with OTHER after it, while attached."""

    def __init__(self, switch: Callable[[Part], None]) -> None:
        self._switch = switch
        self._layers: list[tuple[nn.Module, Part]] = []
        self._handles: list[RemovableHandle] = []

    def find(self, model: nn.Module) -> None:
        """Remember the attention layers of `model`; one that is no CausalLM has none."""
        self._layers = find_layers(model) if isinstance(model, CausalLM) else []

    def attach(self) -> None:
        """From now on call `switch`; does nothing while attached."""
        if self._handles:
            return
        for layer, part in self._layers:
            self._handles.append(layer.register_forward_pre_hook(self._entering(part)))
            self._handles.append(layer.register_forward_hook(self._leave))

    def detach(self) -> None:
        """The layers are as they were before `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _entering(self, part: Part) -> Callable[..., None]:
        switch = self._switch

        def enter(*_: Any) -> None:
            switch(part)

        return enter

    def _leave(self, *_: Any) -> None:
        self._switch(Part.OTHER)


def find_layers(model: CausalLM) -> list[tuple[nn.Module, Part]]:
    """The outermost modules all of whose parameters are, by `parameter_kind`, of one kind of attention."""
    kinds_of: dict[str, set[str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        kind = model.parameter_kind(name)
        while name:
            name = name.rpartition(".")[0]
            kinds_of.setdefault(name, set()).add(kind)
    part_of = {
        name: _PART_OF_KIND[kind]
        for name, kinds in kinds_of.items()
        if len(kinds) == 1 and (kind := next(iter(kinds))) in _PART_OF_KIND
    }
    modules = dict(model.named_modules(remove_duplicate=False))
    return [(modules[name], part) for name, part in part_of.items() if name.rpartition(".")[0] not in part_of]
