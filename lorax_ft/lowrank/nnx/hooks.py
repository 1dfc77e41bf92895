"""Hooks on the calls of NNX modules, for which flax has none of its own.

A module with a hook has it in an attribute, and while the model runs its class has a `__call__`
that goes there (`hooked`). So it keeps its class, which the model's code may compare, and its other
modules are as they were. Transformations such as `nnx.scan` take a module apart into its class, its
static attributes and its arrays, so the hook and the adapter's leaves, which lie in the module, are
there inside them too.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from flax import nnx
from jax import Array

from lorax_ft.lowrank.layer_call import block_input, trace_block
from lorax_ft.lowrank.nnx.kinds import OWN, Kind, bound, layer_call, own_call, own_method, trace
from lorax_ft.lowrank.shared import with_shared
from lorax_ft.lowrank.spec import BIAS
from lorax_ft.lowrank.terms import check_layer
from lorax_ft.lowrank.terms.bottleneck import with_bottleneck
from lorax_ft.lowrank.watch import SeeAdapters, SeeCalls

HOOK = "lorax_ft_hook"
LEAVES = "lorax_ft_leaves"
"""The module's attributes that hold its hook and the adapter's leaves."""
REPLACED = "lorax_ft_replaced"
"""The attribute of a method in place of a class's own that holds what the class had."""


class Hook(Protocol):
    """What a hooked module's call goes to."""

    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's result."""
        ...

    def read(self, name: str) -> None:
        """An attribute of the module is read, by its own call or by the model's code."""
        ...


def add_hook(
    module: nnx.Module,
    kind: Kind | None,
    hook: Hook,
    leaves: Mapping[str, Array],
) -> None:
    """Let the calls of a module of a model that was just merged go to a hook.

    Args:
      module: it is changed.
      kind: its kind; None: it is no layer.
      hook: gets its calls.
      leaves: of its adapter, which come to lie beside its weight.
    """
    # In variables of the weight's own class, so that a scan which stacks the weight stacks them.
    variable = nnx.Param if kind is None else type(getattr(module, kind.attribute))
    data = {name: variable(leaf) for name, leaf in leaves.items()}
    # Not by a `__setattr__` of the module's own class, which may refuse them.
    nnx.Module.__setattr__(module, HOOK, nnx.static(hook))
    nnx.Module.__setattr__(module, LEAVES, nnx.data(data))


_lock = threading.Lock()
_users: collections.Counter[type] = collections.Counter()
"""How many running calls of `hooked` need a class to be changed."""


@contextlib.contextmanager
def hooked(model: nnx.Module) -> Iterator[None]:
    """Inside, the calls of those modules of a model that have a hook go to it.

    Their classes are changed for that time, as `nnx.tabulate` does. Other modules of the same
    classes, such as those of another thread, compute as they did.
    """
    classes = {type(module) for _, module in nnx.iter_modules(model) if HOOK in vars(module)}
    with _lock:
        for cls in classes:
            if not _users[cls]:
                _change(cls)
            _users[cls] += 1
    try:
        yield
    finally:
        with _lock:
            for cls in classes:
                _users[cls] -= 1
                if not _users[cls]:
                    del _users[cls]
                    _restore(cls)


def _change(cls: type) -> None:
    """Give a class a `__call__` that goes to a module's hook, and one that says what is read."""
    own_read = own_method(cls, "__getattribute__")

    def hook_of(module: Any) -> Hook | None:
        # A subclass calls these methods by `super()`.
        is_own = type(module) is cls
        return object.__getattribute__(module, "__dict__").get(HOOK) if is_own else None

    @functools.wraps(cls.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = hook_of(self)
        if hook is None:
            return own_call(self, cls)(*args, **kwargs)
        return hook.call(self, args, kwargs)

    def read(self: Any, name: str) -> Any:
        hook = hook_of(self)
        if hook is not None and not name.startswith("_"):
            hook.read(name)
        return own_read(self, name)

    for name, method in (("__call__", call), ("__getattribute__", read)):
        # What `_restore` puts back; None: the class inherits it.
        setattr(method, REPLACED, vars(cls).get(name))
        setattr(method, OWN, own_method(cls, name))
        setattr(cls, name, method)


def _restore(cls: type) -> None:
    """Undo `_change`."""
    for name in ("__call__", "__getattribute__"):
        replaced = getattr(vars(cls)[name], REPLACED)
        if replaced is None:
            delattr(cls, name)
        else:
            setattr(cls, name, replaced)


class Shared(dict[str, Array]):
    """Leaves that all layers share. Each is equal to itself alone.

    The arrays are part of the program that a transformation such as `nnx.jit` makes of the module,
    so it must not take one made with others.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclasses.dataclass(frozen=True)
class AdaptedCall:
    """The layer computes with its adapter, or from its quantized kernel."""

    path: str
    kind: Kind
    watch: SeeAdapters
    shared: Shared | None

    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        """The adapted layer's output."""
        x, extra = bound(own_call(module), args, kwargs)
        traced = trace(module, self.kind, x, extra)
        if traced is None:
            raise ValueError(
                f"{self.path} has an adapter, but this form of the layer supports none"
            )
        layer = {name: leaf.get_value() for name, leaf in getattr(module, LEAVES).items()}
        layer[self.kind.weight] = getattr(module, self.kind.attribute).get_value()
        bias = getattr(module, BIAS, None)
        if bias is not None:
            layer[BIAS] = bias.get_value()
        check_layer(layer, self.path)
        layer = with_shared(layer, self.shared or {}, traced.spec, traced.shape)
        own = layer_call(module, self.kind, traced, extra, path=self.path, gather=self.watch.gather)
        return own.output(layer, x)

    def read(self, name: str) -> None:
        """Nothing: `layout` has seen to it that calls alone read a weight that is adapted."""


@dataclasses.dataclass(frozen=True)
class AdaptedBlock:
    """A bottleneck stands beside the module, which is no layer."""

    path: str

    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Array:
        """The module's output with the bottleneck."""
        layer = {name: leaf.get_value() for name, leaf in getattr(module, LEAVES).items()}
        check_layer(layer, self.path)
        y = own_call(module)(*args, **kwargs)
        return with_bottleneck(layer, block_input(args, kwargs, y), y)

    def read(self, name: str) -> None:
        """Nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedBlock:
    """The calls of a module that is no layer are recorded, and it computes as it is."""

    path: str
    watch: SeeCalls
    names: Mapping[str, str]
    """The paths of the parameters in the tree, by those in the model."""

    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module's own output."""
        view = {}
        for keys, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
            name = self.names.get("/".join(map(str, (self.path, *keys))))
            if name is not None:
                view[name.removeprefix(f"{self.path}/")] = variable.get_raw_value().shape
        output = own_call(module)(*args, **kwargs)
        if view:
            self.watch.called_block(self.path, view, trace_block(args, kwargs, output))
        return output

    def read(self, name: str) -> None:
        """Nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class RecordedCall:
    """The calls of the layer are recorded, and the layer computes as it is."""

    path: str
    kind: Kind
    watch: SeeCalls
    calls: list[None] = dataclasses.field(default_factory=list)
    """As many as are running."""

    def call(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's own output."""
        own = own_call(module)
        self.calls.append(None)
        try:
            x, extra = bound(own, args, kwargs)
            self.watch.called(self.path, trace(module, self.kind, x, extra))
            return own(*args, **kwargs)
        finally:
            self.calls.pop()

    def read(self, name: str) -> None:
        """A table that is read without a call, such as by `attend`, is an output head too.

        An adapter on the lookup would not change it there. Other kernels are read for their shapes.
        """
        if name == self.kind.attribute and self.kind.module == "embed" and not self.calls:
            self.watch.unseen(
                self.path, f"its {name} is read without a call of the layer, as by attend"
            )
