"""An NNX model as a function of its parameters, like a linen model's `apply`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax_ft.lowrank.nnx.hooks import (
    AdaptedBlock,
    AdaptedCall,
    RecordedBlock,
    RecordedCall,
    Shared,
    add_hook,
    hooked,
)
from lorax_ft.lowrank.nnx.kinds import KINDS, Kind, kind_of
from lorax_ft.lowrank.shared import shared_leaves
from lorax_ft.lowrank.spec import BIAS, Module
from lorax_ft.lowrank.terms import bottleneck, is_adapted
from lorax_ft.lowrank.watch import SeeAdapters, SeeCalls, watches
from lorax_ft.quant.kernels import Quantized
from lorax_ft.schema import is_base
from lorax_ft.tree import Layer, Tree, flatten, from_modules, join, modules, unflatten

OTHERS = ("dense", "einsum", "embed")
"""What classes that are not nnx's own can be."""
Variables = dict[str, tuple[tuple[Any, ...], nnx.Variable]]
"""By slash path, the keys by which NNX finds a variable, and the variable without its value."""

_IN_LINEN = "it is in a linen model inside NNX (nnx.bridge.ToNNX); adapt the linen model itself"


def from_nnx(
    model: nnx.Module,
    call: Callable[..., Any] | None = None,
    *,
    layers: Mapping[type[nnx.Module], tuple[Module, str]] = MappingProxyType({}),
) -> tuple[NnxApply, Tree]:
    """A flax.nnx model as a pure function, with its parameters as a nested dict.

    Args:
      model: the model. It is not changed, and its arrays are shared with the result, not copied.
      call: a function of the model and the inputs, for example of another method than `__call__`;
        None: the model's `__call__`.
      layers: what other classes than nnx's own compute, by class: the kind of layer and the name of
        the `nnx.Param` that holds its weight, as in `{Einsum: ("einsum", "w")}`. A "dense" layer
        multiplies by a weight `[I, O]`, an "embed" looks up rows of it, and an "einsum" has the
        equation as `einsum_str`. The input is the first argument of such a class, which may have a
        `bias` that it can do without.

    Returns:
      `apply`, which computes `apply({"params": params}, *inputs)`, and `params`. Both are for
      `lorax_ft.layout`, `add_adapters`, `adapt` and all that follows, as linen's.

    Raises:
      ValueError: a parameter has the name of an adapter's leaf, as in `nnx.LoRA`, or a class in
        `layers` is not what it is said to be.

    >>> import jax.numpy as jnp
    >>> apply, params = from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> apply({"params": params}, jnp.ones((2, 4))).shape
    (2, 3)
    """
    if not isinstance(model, nnx.Module):
        raise ValueError(f"from_nnx needs an nnx.Module, not {type(model).__name__}")
    others = {}
    for cls, (layer_type, attribute) in layers.items():
        if layer_type not in OTHERS:
            raise ValueError(
                f"layers: {cls.__name__} is said to be {layer_type!r}, and can be one of {OTHERS}"
            )
        others[cls] = Kind(layer_type, attribute)
    parts: Any = nnx.split(model, nnx.Param, ...)
    graphdef, param_state, other_state = parts
    renamed = _renamed(model, others)
    params, places = _values(param_state, renamed)
    state, state_places = _values(other_state, {})
    for path in params:
        if not is_base(path):
            raise ValueError(
                f"the model's parameter {path!r} has the name of a leaf of lorax_ft's adapters; "
                "merge or remove the model's own LoRA layers first"
            )
    apply = NnxApply(
        graphdef=graphdef,
        call=call or _call,
        kinds=KINDS | others,
        places=places,
        state_places=state_places,
        state=unflatten(state),
    )
    return apply, unflatten(params)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class NnxApply:
    """`apply({"params": params}, *inputs)` of an NNX model (`from_nnx` makes it).

    What the model has beside its parameters, such as the statistics of BatchNorm and the streams of
    random numbers, is its `state`. `apply({"params": params, "state": state}, *inputs)` returns the
    output and the new state. Without it the state is that of the model given to `from_nnx`, and a
    call that changes it is an error.
    """

    graphdef: Any
    call: Callable[..., Any]
    kinds: Mapping[type[nnx.Module], Kind]
    places: Variables
    state_places: Variables
    state: Tree
    """The nested dict of what the model has beside its parameters."""

    def __call__(self, variables: Mapping[str, Tree], /, *inputs: Any, **named: Any) -> Any:
        """The output; with a state in the variables, the output and the new state."""
        if "params" not in variables or set(variables) - {"params", "state"}:
            raise ValueError(
                f'apply needs {{"params": params}} and may have a "state", but the variables are '
                f"{sorted(variables)}"
            )
        state = flatten(variables.get("state", self.state))
        model = self._watched(modules(variables["params"]), state)
        if "state" in variables:
            with hooked(model):
                output = self.call(model, *inputs, **named)
            return output, unflatten(self._state(model))
        writes = _note_writes(model, self.state_places)
        with hooked(model):
            output = self.call(model, *inputs, **named)
        only_traced = any(isinstance(watch, SeeCalls) for watch in watches())
        if writes and not only_traced:
            raise ValueError(
                f"the call changes {writes[0]} of the model, which would be lost; call model.eval()"
                ' before from_nnx, or give apply the state: output, state = apply({"params": '
                'params, "state": state}, ...), with apply.state at first'
            )
        return output

    def model(self, params: Tree, state: Tree | None = None) -> nnx.Module:
        """An NNX model with these parameters, such as those that `merge_adapters` gives.

        Raises:
          ValueError: leaves are missing, or there are adapters or quantized kernels.
        """
        state = self.state if state is None else state
        layers = modules(params)
        _check_plain(layers)
        return self._merged(layers, flatten(state))

    def _watched(self, layers: dict[str, Layer], state: Mapping[str, Any]) -> nnx.Module:
        """The model, with its layers hooked as `adapt` and `layout` want."""
        seen = watches()
        adapts = [watch for watch in seen if isinstance(watch, SeeAdapters)]
        if not adapts:
            _check_plain(layers)
        model = self._merged(layers, state)
        for watch in seen:
            if isinstance(watch, SeeCalls):
                self._record(model, watch)
        if adapts:
            # Adapting twice is adapting once.
            self._adapt(model, layers, adapts[0])
        return model

    def _merged(self, layers: Mapping[str, Layer], state: Mapping[str, Any]) -> nnx.Module:
        """The model of these leaves. Those of adapters are left out."""
        flat = flatten(from_modules(layers))
        variables = {}
        for places, values in ((self.places, flat), (self.state_places, state)):
            for path, (keys, variable) in places.items():
                if path not in values:
                    raise ValueError(f"the model has {path}, which the variables lack")
                variables[keys] = variable.replace(values[path])
        for path in flat:
            if is_base(path) and path not in self.places:
                raise ValueError(f"the parameters have {path}, which the model lacks")
        return nnx.merge(self.graphdef, nnx.from_flat_state(variables))

    def _adapt(self, model: nnx.Module, layers: Mapping[str, Layer], watch: SeeAdapters) -> None:
        """Hook the layers that have an adapter or a quantized kernel."""
        shared = Shared(shared_leaves(layers.get("", {})))
        found = dict(_by_path(model))
        for path, layer in layers.items():
            if not is_adapted(layer) and not _is_quantized(layer):
                continue
            kind = kind_of(found[path], self.kinds) if path in found else None
            own = {name: leaf for name, leaf in layer.items() if not is_base(name)}
            if path in found and kind is None and bottleneck.ACTIVE in own:
                add_hook(found[path], None, AdaptedBlock(path), own)
                continue
            if kind is None:
                raise ValueError(f"{path} has an adapter, but the model has no such layer there")
            hook = AdaptedCall(path, kind, watch, shared or None)
            add_hook(found[path], kind, hook, own)

    def _record(self, model: nnx.Module, watch: SeeCalls) -> None:
        """Hook the layers that could be adapted, and say of the other modules why they cannot."""
        holders = _holders(model)
        names = {_slash_path(keys): path for path, (keys, _) in self.places.items()}
        for path, module in list(_by_path(model)):
            kind = kind_of(module, self.kinds)
            if isinstance(module, nnx.bridge.ToNNX):
                for inside in _modules_below(path, self.places):
                    watch.unseen(inside, _IN_LINEN)
            elif kind is None:
                watch.unseen(path, _no_layer(module, self.kinds))
                if path and callable(module):
                    add_hook(module, None, RecordedBlock(path, watch, names), {})
            elif len(owners := holders[id(getattr(module, kind.attribute))]) > 1:
                watch.unseen(path, f"its weight is that of {' and '.join(owners)} too")
            else:
                add_hook(module, kind, RecordedCall(path, kind, watch), {})

    def _state(self, model: nnx.Module) -> dict[str, Any]:
        """What the model has beside its parameters, by slash path."""
        variables = dict(nnx.to_flat_state(nnx.state(model)))
        return {
            path: variables[keys].get_raw_value() for path, (keys, _) in self.state_places.items()
        }


def _call(model: Any, *inputs: Any, **named: Any) -> Any:
    """The model's `__call__`."""
    return model(*inputs, **named)


def _slash_path(keys: tuple[Any, ...]) -> str:
    """The slash path of the keys by which NNX finds a module or variable."""
    return "/".join(map(str, keys))


def _by_path(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """The modules of a model, each once, by slash path."""
    for keys, module in nnx.iter_modules(model):
        yield _slash_path(keys), module


def _note_writes(model: nnx.Module, places: Variables) -> list[str]:
    """The paths of the state that the model's code sets, a list that grows while it runs.

    A variable that a transformation such as `nnx.jit` takes along and puts back is not set.
    """
    writes: list[str] = []

    def note(path: str) -> Callable[[nnx.Variable, Any], Any]:
        def on_set_value(variable: nnx.Variable, value: Any) -> Any:
            writes.append(path)
            return value

        return on_set_value

    paths = {keys: path for path, (keys, _) in places.items()}
    for keys, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable) and keys in paths:
            own = node.get_metadata().get("on_set_value", ())
            hooks = own if isinstance(own, tuple) else (own,)
            node.set_metadata(on_set_value=(*hooks, note(paths[keys])))
    return writes


def _modules_below(path: str, places: Variables) -> set[str]:
    """The paths of the modules at or below a path that hold parameters."""
    prefix = join(path, "")
    return {place.rpartition("/")[0] for place in places if place.startswith(prefix)}


def _holders(model: nnx.Module) -> dict[int, list[str]]:
    """By the identity of each variable, the paths of the modules that hold it."""
    found: dict[int, list[str]] = {}
    for path, module in _by_path(model):
        for value in vars(module).values():
            if isinstance(value, nnx.Variable):
                found.setdefault(id(value), []).append(path)
    return found


def _renamed(
    model: nnx.Module,
    kinds: Mapping[type[nnx.Module], Kind],
) -> dict[str, str]:
    """The paths in the tree of the weights of these classes, by those that they have in the model.

    Raises:
      ValueError: as `_check_layer`.
    """
    paths = {}
    for path, module in _by_path(model):
        kind = kinds.get(type(module))
        if kind is not None:
            _check_layer(path, module, kind)
            paths[join(path, kind.attribute)] = join(path, kind.weight)
    return paths


def _no_layer(module: nnx.Module, kinds: Mapping[type[nnx.Module], Kind]) -> str:
    """Why a module of a class that is in no kind takes no adapter, and what may help."""
    name = type(module).__name__
    why = f"{name} is no layer that takes adapters"
    own = [key for key, value in vars(module).items() if isinstance(value, nnx.Param)]
    weights = [key for key in own if key != BIAS]
    if len(weights) != 1:
        return why
    (weight,) = weights
    # A subclass of a layer, with a `__call__` of its own.
    of_base = [kind.module for cls, kind in kinds.items() if isinstance(module, cls)]
    likely = "einsum" if hasattr(module, "einsum_str") else "dense"
    kind = next((kind for kind in of_base if kind in OTHERS), likely)
    return (
        f"{why}; if it computes a product with one weight, or looks up its rows, say so: "
        f'from_nnx(model, layers={{{name}: ("{kind}", "{weight}")}})'
    )


def _check_layer(path: str, module: Any, kind: Kind) -> None:
    """Raise where a layer is not what its kind says."""
    where = f"{path or 'the model'}, a {type(module).__name__},"
    own = {name for name, value in vars(module).items() if isinstance(value, nnx.Param)}
    if kind.attribute not in own:
        raise ValueError(
            f"{where} has no nnx.Param called {kind.attribute!r}; give the name of its weight in "
            f"layers: {' or '.join(sorted(own)) or 'it has none'}"
        )
    if others := own - {kind.attribute, BIAS}:
        raise ValueError(
            f"{where} has {' and '.join(sorted(others))} beside its weight {kind.attribute!r}; "
            "only a product with one weight, and perhaps a bias, can take an adapter"
        )
    if kind.module == "einsum" and not hasattr(module, "einsum_str"):
        raise ValueError(f"{where} has no einsum_str, which a layer of the kind 'einsum' needs")


def _values(state: nnx.State, renamed: Mapping[str, str]) -> tuple[dict[str, Any], Variables]:
    """The values of some variables by slash path, and where they belong."""
    values = {}
    places: Variables = {}
    for keys, variable in nnx.to_flat_state(state):
        path = _slash_path(keys)
        path = renamed.get(path, path)
        value = variable.get_raw_value()
        # Some loaders leave NumPy arrays in the model.
        values[path] = jnp.asarray(value) if isinstance(value, np.ndarray) else value
        places[path] = (keys, variable.replace(None))
    return values, places


def _is_quantized(layer: Layer) -> bool:
    """Whether a layer has a quantized kernel."""
    return isinstance(layer.get("kernel"), Quantized)


def _check_plain(layers: Mapping[str, Layer]) -> None:
    """Raise where the parameters hold what the model itself cannot compute with."""
    for path, layer in layers.items():
        if is_adapted(layer) or _is_quantized(layer):
            raise ValueError(
                f"{path} has an adapter or a quantized kernel, which only adapt(apply) sees; "
                "merge_adapters gives the model's own parameters"
            )
