"""GPUs that aren't there: tensors that say they lie on one, computed on the CPU, refused where real ones would be.

several_devices.py runs it in a process of its own: a kind of device is registered once per process, for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

KIND = "pretended"
MOVING = {"aten::_to_copy", "aten::copy_"}  # what may read one device and write another
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}  # which take indices that lie on the CPU, too


class Placed(torch.Tensor):
    """A tensor on a pretended device; its numbers are in `inner`, on the CPU."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Placed:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=device,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside PretendedDevices")

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()  # by which accelerate knows weights that are tied


def register() -> None:
    """Make torch know the kind of device; `torch.device(1)` is the second of them then."""
    backend_registration._setup_privateuseone_for_python_backend(KIND)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made on the CPU and moved


class PretendedDevices(TorchDispatchMode):
    """While it is entered every operation is checked and computed here."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            parts = func.decompose(*args, **kwargs)
        return _computed(func, args, kwargs) if parts is NotImplemented else parts


def _computed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    name, asked = func._schema.name, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    placed = [tensor for tensor in tensors if isinstance(tensor, Placed)]
    if placed and name not in MOVING:
        near = [t for t in tensors if t.device.type != "cpu" or (t.dim() and name not in INDEXING)]
        if len({tensor.device for tensor in near}) > 1:
            raise RuntimeError(f"{name}: its tensors lie on {sorted({str(tensor.device) for tensor in near})}")
    if asked is not None:
        device, kwargs = torch.device(asked), kwargs | {"device": torch.device("cpu")}
    elif name == "aten::copy_":
        device = args[0].device
    else:
        device = placed[0].device if placed else torch.device("cpu")
    found = func(*_stripped(args), **_stripped(kwargs))
    if device.type == "cpu":
        return found
    same = {id(tensor.inner): tensor for tensor in placed}  # what is written in place stays the tensor that it was

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return same[id(leaf)] if id(leaf) in same else Placed(leaf, device)

    found = tree_map(place, found)
    if any(result.alias_info for result in func._schema.returns):
        return return_and_correct_aliasing(func, args, kwargs, found)
    return found


def _stripped(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.inner if isinstance(leaf, Placed) else leaf, tree)
