"""Sums and means over voxels inside a loss, completed over the parts of a volume; all else is refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from monai_memeff.halo.planning.errors import NotPartitionableError
from monai_memeff.halo.run.ranks.comm.exchange import sum_loss
from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh

VOXELWISE = frozenset(
    {
        "abs", "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "truediv",
        "floordiv", "neg", "negative", "pow", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square",
        "reciprocal", "sign", "floor", "ceil", "round", "clamp", "clip", "clamp_min", "clamp_max", "where",
        "maximum", "minimum", "lerp", "addcmul", "addcdiv", "relu", "sigmoid", "logsigmoid", "log_sigmoid", "tanh",
        "softplus", "hardtanh", "erf", "sin", "cos", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or",
        "logical_not", "and", "or", "xor", "invert", "isnan", "isfinite", "isinf", "nan_to_num", "to", "type", "float",
        "double", "half", "bfloat16", "int", "long", "bool", "clone", "contiguous", "detach", "requires_grad", "data",
        "zeros_like", "ones_like", "empty_like", "full_like", "masked_fill", "type_as", "cpu", "cuda", "alias", "fill",
        "zero", "copy", "cat", "concat", "concatenate", "scatter", "gather", "expand_as", "reshape_as", "view_as",
        "one_hot",
    }
)  # fmt: skip
ALONG_CHANNELS = {
    "softmax": 1, "log_softmax": 1, "cumsum": 1, "chunk": 2, "split": 2, "tensor_split": 2, "unbind": 1, "amax": 1,
    "amin": 1, "max": 1, "min": 1, "argmax": 1, "argmin": 1, "unsqueeze": 1, "squeeze": 1, "narrow": 1, "select": 1,
    "index_select": 1, "std": 1, "var": 1, "prod": 1, "any": 1, "all": 1,
}  # fmt: skip
"""Calls that are right on a part if they name a dimension before the spatial ones, and where that argument stands."""
QUESTIONS = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point",
        "is_complex", "get_device", "element_size", "len", "data_ptr", "hash", "register_hook", "retain_grad",
        "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_leaf", "layout", "grad", "grad_fn",
        "is_meta", "is_quantized", "is_sparse", "is_mps", "is_cpu", "is_nested", "is_xla", "is_mkldnn", "is_xpu",
        "names", "itemsize", "nbytes", "storage_offset", "version", "is_inference", "output_nr", "base",
        "backward_hooks", "format", "repr", "dim_order", "is_same_size",
    }
)  # fmt: skip
_ELEMENTWISE_LOSSES = frozenset(
    {
        "binary_cross_entropy", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss", "smooth_l1_loss",
        "huber_loss", "soft_margin_loss",
    }
)  # fmt: skip
_CLASS_LOSSES = frozenset({"cross_entropy", "nll_loss"})
_REFLECTED = {
    f"{p}{n}": n for p in "ir" for n in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "xor")
}


def _name(func: Callable[..., Any]) -> str:
    """Plain name of a torch call: no underscores, in-place and reflected forms folded into the ordinary one."""
    raw = getattr(func, "__name__", str(func))
    if raw in ("__get__", "__set__"):
        raw = getattr(getattr(func, "__self__", None), "__name__", raw)
    plain = raw.strip("_")
    return _REFLECTED.get(plain, plain)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested containers."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def is_part(tensor: Any) -> bool:
    """Whether a tensor holds one rank's voxels."""
    return getattr(tensor, "_memeff_loss_part", False)


class WholeSums(TorchFunctionMode):
    """Follows tensors that are parts of the volume through the loss and completes their sums."""

    def __init__(self, mesh: HaloMesh, spatial_dims: int) -> None:
        super().__init__()
        self._mesh, self._n = mesh, spatial_dims
        self._axes = [a - spatial_dims for a in mesh.axes]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        parts = [t for t in tensors_in((args, kwargs)) if is_part(t)]
        template = name in ("to", "type_as") and not is_part(args[0])  # a part lends its dtype and device only
        if name in QUESTIONS or template or not parts:
            return func(*args, **kwargs)
        if name in ("sum", "mean", "nansum"):
            return self._reduce(func, name, args, kwargs)
        if name == "linalg_vector_norm":
            return self._norm(*args, **kwargs)
        if name in _ELEMENTWISE_LOSSES or name in _CLASS_LOSSES:
            return self._loss(func, name, args, kwargs)
        self._check(name, args, kwargs)
        return self._followed(func(*args, **kwargs), parts[0], name)

    def _check(self, name: str, args: Any, kwargs: Any) -> None:
        """Refuse a call that reads along a spatial dimension, or whose meaning on parts is not known."""
        first: Any = args[0] if args else None
        if name == "getitem":
            known = self._index_is_before_space(first, args[1])
        elif name in ALONG_CHANNELS:
            place = ALONG_CHANNELS[name]
            dim = kwargs.get("dim", args[place] if len(args) > place else 0 if place == 2 or name == "unbind" else None)
            known = self._before_space(first, dim, extra=name == "unsqueeze")
        elif name in ("cat", "concat", "concatenate"):
            known = self._before_space(first[0], kwargs.get("dim", args[1] if len(args) > 1 else 0))
        elif name in ("scatter", "gather"):
            known = self._before_space(first, kwargs.get("dim", args[1] if len(args) > 1 else None))
        else:
            known = name in VOXELWISE
        if not known:
            raise NotPartitionableError(
                f"SpatialLoss: the loss calls '{name}' on parts of the volume, which is not a sum over voxels; "
                f"use SpatialLoss(..., gather=True)."
            )

    def _before_space(self, x: Any, dim: Any, extra: bool = False) -> bool:
        """Whether all dimensions named come before the spatial ones."""
        dims = [dim] if isinstance(dim, int) else dim
        if not isinstance(x, torch.Tensor) or not isinstance(dims, (list, tuple)) or not dims:
            return False
        rank = x.dim() + extra
        return all(isinstance(d, int) and (d + rank if d < 0 else d) < rank - self._n for d in dims)

    def _index_is_before_space(self, x: Any, index: Any) -> bool:
        entries = index if isinstance(index, tuple) else (index,)
        lead = [e for e in entries if e is not None]
        while lead and lead[-1] == slice(None):
            lead.pop()
        plain = all(isinstance(e, (int, slice)) for e in lead) and None not in entries
        return isinstance(x, torch.Tensor) and plain and len(lead) <= x.dim() - self._n

    def _followed(self, out: Any, part: torch.Tensor, name: str) -> Any:
        space = part.shape[-self._n :]
        for t in tensors_in(out):
            if t.dim() < self._n or t.shape[-self._n :] != space:
                raise NotPartitionableError(
                    f"SpatialLoss: the loss moves or removes spatial axes by '{name}'; use gather=True."
                )
            t._memeff_loss_part = True
        return out

    def _reduce(self, func: Any, name: str, args: Any, kwargs: Any) -> torch.Tensor:
        x = args[0] if args else kwargs["input"]
        dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        dims = range(x.dim()) if dims is None or dims == [] or dims == () else dims
        chosen = {d - x.dim() if d >= 0 else d for d in ([dims] if isinstance(dims, int) else dims)}
        inside = [a in chosen for a in self._axes]
        if not any(inside):
            if any(d >= -self._n for d in chosen):
                raise NotPartitionableError("SpatialLoss: the loss sums over some spatial axes only; use gather=True.")
            return self._followed(func(*args, **kwargs), x, name)
        if not all(inside):
            raise NotPartitionableError("SpatialLoss: the loss sums over some split axes only; use gather=True.")
        rows = math.prod(x.shape[a] for a in self._axes)
        if name == "mean":
            total = self._total(rows, x)
            y = func(*args, **kwargs) * (rows / total) if rows else self._nothing(x, chosen, kwargs)
        else:
            y = func(*args, **kwargs)
        return sum_loss(self._mesh.comm, y)

    def _nothing(self, x: torch.Tensor, chosen: set[int], kwargs: Any) -> torch.Tensor:
        """The sum over no rows, where a mean would be 0 / 0."""
        options = {k: v for k, v in kwargs.items() if k in ("keepdim", "dtype")}
        return torch.sum(x, tuple(sorted(chosen)), **options)

    def _norm(self, x: torch.Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False) -> torch.Tensor:
        if ord not in (1, 2):
            raise NotPartitionableError(f"SpatialLoss: the loss takes a norm of order {ord}; use gather=True.")
        powers = x.abs() if ord == 1 else x.square()
        powers._memeff_loss_part = True
        total = self._reduce(torch.sum, "sum", (powers,), {"dim": dim, "keepdim": keepdim})
        return total if ord == 1 else total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()

    def _total(self, count: float, like: torch.Tensor) -> float:
        counted = torch.tensor([float(count)], dtype=torch.float64, device=like.device)
        return float(self._mesh.comm.all_reduce(counted))

    def _loss(self, func: Any, name: str, args: Any, kwargs: Any) -> torch.Tensor:
        """torch's own losses: sum here, divide by the whole's weight."""
        reduction = kwargs.get("reduction", "mean")
        if len(args) > (3 if name in _CLASS_LOSSES else 2) or reduction not in ("mean", "sum", "none"):
            raise NotPartitionableError(f"SpatialLoss: '{name}' must get its options by keyword; use gather=True.")
        if reduction == "none":
            return self._followed(func(*args, **kwargs), args[0], name)
        y = sum_loss(self._mesh.comm, func(*args, **{**kwargs, "reduction": "sum"}))
        if reduction == "sum":
            return y
        x, target = args[0], args[1] if len(args) > 1 else kwargs["target"]
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        count = _class_weight(x, target, weight, kwargs) if name in _CLASS_LOSSES else float(x.numel())
        return y / self._total(count, y)


def _class_weight(x: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, options: Any) -> float:
    """What cross entropy divides by: the number of voxels, or the weights of their classes."""
    if target.is_floating_point():
        return target.numel() / x.shape[1]
    valid = target[target != options.get("ignore_index", -100)]
    return float(valid.numel() if weight is None else weight[valid].sum())
