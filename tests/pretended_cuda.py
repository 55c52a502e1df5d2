# SPDX-License-Identifier: Apache-2.0
"""Pretends that there is a CUDA device, on a machine without: what CUDA would refuse or wait for is written down.

Tensors stay in host memory, where they are computed; each storage is marked with the place that it would have. Code
that asks a tensor for its device, or names one, gets the answer that it would get on a machine with a GPU.

Beyond its reach are kernels of the device itself, memory, streams, and NCCL.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.collectives import COLLECTIVES

aten = torch.ops.aten

DEVICE, HOST = torch.device("cuda", 0), torch.device("cpu")
ANYWHERE = "anywhere"
"""The place of what autograd makes of nothing, such as zeros in place of a gradient: it lies where it is needed."""

INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
RESULTS_OF_UNKNOWN_SIZE = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
READS = {aten._local_scalar_dense.default, aten.equal.default}
WORK = ("mm", "addmm", "bmm", "baddbmm", "convolution", "embedding", "_scaled_dot_product", "_foreach_lerp", "lerp")
"""Beginnings of the names of what a device is there for: products of matrices, attention, optimizer steps."""


class Event(NamedTuple):
    """Something that happened, and where."""

    what: str
    line: str
    """The innermost line outside torch."""
    our_line: str
    """The innermost line of this package, which called it; `line` where none did, as in a backward pass."""

    @property
    def is_ours(self) -> bool:
        return self.line.startswith("verl/")


@dataclass
class Findings:
    """What happened on the pretended device, how often."""

    mixes: Counter[Event] = field(default_factory=Counter)
    """Operations between the device and the host, which CUDA refuses."""
    waits: Counter[Event] = field(default_factory=Counter)
    """What makes the host wait until the device has done all that it was given."""
    collectives: Counter[Event] = field(default_factory=Counter)
    """Collectives whose tensors are not contiguous, as NCCL wants them, or in places without a common backend."""
    host_work: Counter[Event] = field(default_factory=Counter)
    """Work of the device that was done on the host, as where a model's weights rest there."""

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()


def describe(events: Counter[Event]) -> str:
    """A line for each event, for messages of tests."""
    return "\n".join(
        f"{count} x {event.what} at {event.line}, from {event.our_line}" for event, count in events.most_common()
    )


# ---- places ----

_places: dict[int, tuple[StorageWeakRef, str]] = {}
_device_of, _is_cuda = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__


def place_of(tensor: torch.Tensor) -> str:
    """`cuda`, `cpu`, `anywhere`, or another device that is real, such as `meta`."""
    with torch._C.DisableTorchFunction():
        if tensor.device.type != "cpu":
            return tensor.device.type
        while is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
        _, place = _places.get(tensor.untyped_storage()._cdata, (None, "cpu"))
        return place


def _put(tensors: Any, place: str) -> None:
    with torch._C.DisableTorchFunction():
        for tensor in _tensors_in(tensors):
            # What vmap makes gets its place from the operations below it.
            if tensor.device.type == "cpu" and not is_functorch_wrapped_tensor(tensor):
                storage = tensor.untyped_storage()
                _places[storage._cdata] = (StorageWeakRef(storage), place)


def _is_marked(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return tensor.device.type != "cpu" or tensor.untyped_storage()._cdata in _places


def _forget_freed_storages() -> None:
    for key in [key for key, (storage, _) in _places.items() if storage.expired()]:
        del _places[key]


def _tensors_in(*values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _event(what: str) -> Event:
    lines = []
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and "/site-packages/torch/" not in path and not path.startswith("<"):
            name = path.rpartition("site-packages/")[2]
            name = name[name.find("verl/") :] if "/verl/" in name else name
            lines.append(f"{name}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    ours = (line for line in lines if line.startswith("verl/"))
    return Event(what, lines[0], next(ours, lines[0]))


# ---- what is intercepted ----


class _Operations(TorchDispatchMode):
    """Sees every operation of every tensor: gives results their places, and writes down what it finds."""

    def __init__(self, findings: Findings, calls: _Calls) -> None:
        super().__init__()
        self.findings = findings
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        tensors = _tensors_in(args, kwargs)
        places = [place_of(tensor) for tensor in tensors]
        if "cuda" in places:
            self._look(func, args, tensors, places)
        elif tensors and func.__name__.startswith(WORK):
            self.findings.host_work[_event(func.__name__)] += 1
        results = func(*args, **(kwargs or {}))
        new = [tensor for tensor in _tensors_in(results) if not _is_marked(tensor)]
        if "cuda" in places:
            _put(new, "cuda")
        elif ANYWHERE in places and set(places) == {ANYWHERE}:
            _put(new, ANYWHERE)
        elif not tensors and (torch._C._current_graph_task_id() != -1 or self.calls.got_device_tensors):
            _put(new, ANYWHERE)
        return results

    def _look(self, func: Any, args: tuple, tensors: list[torch.Tensor], places: list[str]) -> None:
        name = str(func).removeprefix("aten.")
        indices = [index for index in args[1] if index is not None] if func in INDEXING else []
        if any(place_of(index) == "cpu" for index in indices):
            self.findings.waits[_event(f"{name} by an index in host memory")] += 1
        by_mask = any(index.dtype == torch.bool for index in indices)
        if by_mask or func in RESULTS_OF_UNKNOWN_SIZE or func in READS:
            self.findings.waits[_event(name)] += 1
        if func in COPIES:
            return
        # A number is taken from anywhere by operations on single elements.
        takes_numbers = torch.Tag.pointwise in func.tags or "foreach" in name or func in (*INDEXING, aten.fill_.Tensor)
        for tensor, place in zip(tensors, places, strict=True):
            is_index = any(tensor is index for index in indices)
            if place == "cpu" and not is_index and not (takes_numbers and tensor.dim() == 0):
                self.findings.mixes[_event(f"{name} of {tuple(tensor.shape)} {tensor.dtype} in host memory")] += 1


class _Calls(TorchFunctionMode):
    """Sees calls of torch's Python functions: answers questions for devices, and moves tensors between them."""

    def __init__(self, findings: Findings) -> None:
        super().__init__()
        self.findings = findings
        self.got_device_tensors = False
        """Whether the call that is running got a tensor on the device: what it makes of nothing is there too."""
        self.special: dict[Any, Callable[..., Any]] = {
            _device_of: lambda tensor: DEVICE if place_of(tensor) == "cuda" else _device_of(tensor),
            _is_cuda: lambda tensor: place_of(tensor) == "cuda",
            torch.Tensor.get_device: lambda tensor: 0 if place_of(tensor) == "cuda" else -1,
            torch.Tensor.pin_memory: lambda tensor, *_: tensor,
            torch.Tensor.cuda: lambda tensor, *_: self._moved(tensor, DEVICE),
            torch.Tensor.cpu: lambda tensor, *_: self._moved(tensor, HOST),
            torch.Tensor.to: self._to,
            torch.Tensor.tolist: self._read(torch.Tensor.tolist),
            torch.Tensor.numpy: self._refuse_on_device(torch.Tensor.numpy),
            torch.Tensor.__array__: self._refuse_on_device(torch.Tensor.__array__),
            torch.Tensor.new_tensor: self._new_tensor,
            torch.histc: self._histc,
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.special:
            return self.special[func](*args, **kwargs)
        wanted = None
        if kwargs.get("device") is not None:
            wanted = torch.device(kwargs["device"])
        elif func is torch.tensor:
            wanted = HOST
        if func in (torch.as_tensor, torch.asarray) and wanted is not None and isinstance(args[0], torch.Tensor):
            return self._moved(args[0], wanted, dtype=kwargs.get("dtype"))
        if wanted is not None and wanted.type == "cuda":
            kwargs["device"] = HOST
            if func in (torch.tensor, torch.as_tensor, torch.asarray):
                self.findings.waits[_event("numbers sent to the device")] += 1
        outer = self.got_device_tensors
        got = wanted is None and any(place_of(tensor) == "cuda" for tensor in _tensors_in(args, kwargs))
        self.got_device_tensors = got
        try:
            results = func(*args, **kwargs)
        finally:
            self.got_device_tensors = outer
        if wanted is not None:
            _put(results, wanted.type)
        return results

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        other = kwargs.get("other", args[0] if args else None)
        if isinstance(other, torch.Tensor):
            return self._moved(tensor, DEVICE if place_of(other) == "cuda" else HOST, dtype=other.dtype)
        rest, options = list(args), dict(kwargs)
        device = options.pop("device", None)
        if rest and (rest[0] is None or isinstance(rest[0], (str, torch.device, int))):
            device = rest.pop(0)
        if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
            options["dtype"] = rest.pop(0)
        options |= dict(zip(("non_blocking", "copy"), rest, strict=False))
        if device is None:
            return self._moved(tensor, None, **options)
        return self._moved(tensor, DEVICE if isinstance(device, int) else torch.device(device), **options)

    def _moved(self, tensor: torch.Tensor, target: torch.device | None, **options: Any) -> torch.Tensor:
        """`target`: None leaves the tensor where it is, in another type perhaps."""
        options = {name: value for name, value in options.items() if value is not None}
        source = place_of(tensor)
        wanted = source if target is None else target.type
        if wanted != source and {wanted, source} == {"cuda", "cpu"}:
            if wanted == "cpu" or not options.get("non_blocking", False):
                self.findings.waits[_event(f"copy to {'the device' if wanted == 'cuda' else 'the host'}")] += 1
            options["copy"] = True
        if target is not None:
            options["device"] = HOST if wanted == "cuda" else target
        moved = tensor.to(**options) if options else tensor
        if moved is not tensor:
            _put(moved, wanted)
        return moved

    def _new_tensor(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("device", None)
        made = tensor.new_tensor(*args, **kwargs)
        _put(made, place_of(tensor))
        return made

    def _histc(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """CUDA has it for integers."""
        counted = tensor if tensor.is_floating_point() else tensor.float()
        return torch.histc(counted, *args, **kwargs).to(tensor.dtype)

    def _read(self, func: Callable[..., Any]) -> Callable[..., Any]:
        def read(tensor: torch.Tensor, *args: Any) -> Any:
            if place_of(tensor) == "cuda":
                self.findings.waits[_event(func.__name__)] += 1
            return func(tensor, *args)

        return read

    def _refuse_on_device(self, func: Callable[..., Any]) -> Callable[..., Any]:
        def convert(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if place_of(tensor) == "cuda":
                self.findings.mixes[_event(func.__name__)] += 1
            return func(tensor, *args, **kwargs)

        return convert


def _watched(collective: Callable[..., Any], findings: Findings) -> Callable[..., Any]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        tensors = _tensors_in(args, kwargs)
        if not all(tensor.is_contiguous() for tensor in tensors):
            findings.collectives[_event(f"{collective.__name__} of a tensor that is not contiguous")] += 1
        if len({place_of(tensor) for tensor in tensors}) > 1:
            findings.collectives[_event(f"{collective.__name__} of tensors in two places")] += 1
        return collective(*args, **kwargs)

    return watched


class _HostGenerator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


def _mesh_of_one(device_type: str, shape: Sequence[int], **names: Any) -> SimpleNamespace:
    """A mesh that a model without FSDP asks for nothing but its size."""
    assert tuple(shape) == (1,), "the pretended device is one rank's"
    return SimpleNamespace(device_type=device_type, size=lambda: 1)


@contextmanager
def pretended_cuda() -> Iterator[Findings]:
    """Inside, `device="cuda"` works for the one rank of this process, of models that need no FSDP."""
    findings = Findings()
    calls = _Calls(findings)
    of_device = {
        "current_device": lambda: 0,
        "empty_cache": lambda: None,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
        "get_rng_state": lambda *_: torch.zeros(1),
        "manual_seed_all": lambda *_: None,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 0,
        "set_rng_state": lambda *_: None,
        "synchronize": lambda *_: findings.waits.update([_event("synchronize")]),
    }
    with ExitStack() as stack:
        for name, answer in of_device.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch, "Generator", _HostGenerator))
        for name in COLLECTIVES:
            stack.enter_context(patch.object(dist, name, _watched(getattr(dist, name), findings)))
        stack.enter_context(patch("verl.workers.fsdp2.init_device_mesh", _mesh_of_one))
        stack.callback(_forget_freed_storages)
        stack.enter_context(calls)
        stack.enter_context(_Operations(findings, calls))
        yield findings
