"""The guard: sees every torch call between the layers, tracks how tensors are spread, refuses the rest by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from monai_memeff.halo.layers import _tuple, shared_mask
from monai_memeff.halo.region import Layout, Margin, Region, margin_of, set_margin
from monai_memeff.halo.resize import resize_part

VOXELWISE = frozenset(
    {
        "abs", "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "truediv",
        "floordiv", "neg", "negative", "pow", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "square",
        "reciprocal", "sign", "floor", "ceil", "round", "clamp", "clip", "clamp_min", "clamp_max", "where",
        "maximum", "minimum", "lerp", "addcmul", "addcdiv", "relu", "relu6", "leaky_relu", "prelu", "elu", "celu",
        "selu", "gelu", "silu", "mish", "sigmoid", "logsigmoid", "log_sigmoid", "tanh", "softplus", "softsign",
        "hardtanh", "hardswish", "hardsigmoid", "threshold", "erf", "sin", "cos", "eq", "ne", "lt", "le", "gt", "ge",
        "logical_and", "logical_or", "logical_not", "and", "or", "xor", "invert", "isnan", "isfinite", "isinf",
        "nan_to_num", "to", "type", "float", "double", "half", "bfloat16", "int", "long", "bool", "clone",
        "contiguous", "detach", "requires_grad", "data", "zeros_like", "ones_like", "empty_like", "full_like",
        "masked_fill", "type_as", "cpu", "cuda", "alias", "view_as_real", "fill", "zero", "copy",
    }
)  # fmt: skip
PER_CHANNEL = frozenset(
    {
        "cat", "concat", "concatenate", "stack", "softmax", "log_softmax", "chunk", "split", "tensor_split",
        "unbind", "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "unsqueeze", "narrow", "select",
        "index_select", "cumsum", "norm", "std", "var", "prod", "any", "all",
    }
)  # fmt: skip
QUESTIONS = frozenset(
    {
        "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point",
        "is_complex", "get_device", "element_size", "len", "data_ptr", "hash", "register_hook", "retain_grad",
        "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_leaf", "layout", "grad", "grad_fn",
        "is_meta", "is_quantized", "is_sparse", "is_mps", "is_cpu", "is_nested", "is_xla", "is_mkldnn", "is_xpu",
        "names", "itemsize", "nbytes", "untyped_storage", "storage_offset", "version", "is_inference", "output_nr",
        "base", "backward_hooks", "format", "repr", "dim_order", "is_same_size",
    }
)  # fmt: skip
_REFLECTED = {
    f"{p}{n}": n for p in "ir" for n in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or", "xor")
}


def name_of(func: Callable[..., Any]) -> str:
    """Plain name of a torch call: no underscores, in-place and reflected forms folded into the ordinary one."""
    raw = getattr(func, "__name__", str(func))
    if raw == "__get__" or raw == "__set__":
        raw = getattr(getattr(func, "__self__", None), "__name__", raw)
    plain = raw.strip("_")
    return _REFLECTED.get(plain, plain)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested arguments."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def _spread(values: Any) -> list[torch.Tensor]:
    """Arguments that are spread over the ranks."""
    return [t for t in tensors_in(values) if (tag := getattr(t, "_halo_layout", None)) and not tag.replicated]


class Guard(TorchFunctionMode):
    """Active during the forward of a partitioned network.

    Args:
        region: what the network's layers share.
    """

    def __init__(self, region: Region) -> None:
        super().__init__()
        self.region = region

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if self.region.state.inside or name in QUESTIONS:
            return func(*args, **kwargs)
        parts = _spread((args, kwargs))
        if not parts:
            return self._free(func, name, args, kwargs)
        if name in VOXELWISE or ((name.endswith("dropout") or "dropout" in name) and not _training(args, kwargs)):
            return self._voxelwise(func, name, args, kwargs, parts)
        if name in PER_CHANNEL or name in ("getitem", "repeat", "expand", "pad"):
            return self._per_channel(func, name, args, kwargs, parts)
        if name == "interpolate" or name == "upsample":
            return self._interpolate(*args, **kwargs)
        if name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"):
            return self._dropout(name, *args, **kwargs)
        raise self._refusal(name)

    def _refusal(self, name: str) -> Exception:
        return self.region.fail(
            f"calls '{name}' on a tensor that is spread over the ranks; it is not on the list of calls that are exact "
            f"on a part of a volume."
        )

    def _free(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Nothing spread among the arguments: constants, weights, globally pooled tensors."""
        lost = [t for t in tensors_in((args, kwargs)) if not isinstance(t, torch.nn.Parameter)]
        unknown = [t for t in lost if not hasattr(t, "_halo_layout") and t.dim() > self.region.spatial_dims]
        if unknown and name not in VOXELWISE and name not in PER_CHANNEL:
            raise self._refusal(name)
        out = func(*args, **kwargs)
        if not unknown:
            everywhere = Layout((None,) * len(self.region.dims))
            for t in tensors_in(out):
                t._halo_layout = everywhere
        return out

    def _common(self, parts: list[torch.Tensor]) -> Layout:
        layouts = {p._halo_layout for p in parts}
        if len(layouts) > 1:
            raise self.region.fail(
                f"combines tensors that are cut differently ({' and '.join(str(la.bounds) for la in layouts)}); "
                f"is the volume a multiple of the network's stride?"
            )
        return layouts.pop()

    def _voxelwise(self, func: Any, name: str, args: Any, kwargs: Any, parts: list[torch.Tensor]) -> Any:
        layout = self._common(parts)
        for t in tensors_in((args, kwargs)):
            tag: Layout | None = getattr(t, "_halo_layout", None)
            if (tag is None or tag.replicated) and any(t.shape[d] != 1 for d in self.region.dims if t.dim() >= -d):
                raise self.region.fail(f"'{name}' mixes a part of the volume with a tensor of shape {tuple(t.shape)}.")
        margin = _merged_margin(parts)
        moved = None if margin is None else _through(func, args, kwargs, parts, margin, self.region.dims)
        out = func(*args, **kwargs)
        return self._tagged(out, layout, moved)

    def _tagged(self, out: Any, layout: Layout, margin: Margin | None) -> Any:
        for t in tensors_in(out):
            set_margin(self.region.tag(t, layout), margin if isinstance(out, torch.Tensor) else None)
        return out

    def _per_channel(self, func: Any, name: str, args: Any, kwargs: Any, parts: list[torch.Tensor]) -> Any:
        layout, leading = self._common(parts), parts[0].dim() - self.region.spatial_dims
        if not _keeps_space(name, args, kwargs, leading, self.region):
            raise self._refusal(name)
        margin = _merged_margin(parts) if name in ("cat", "concat", "concatenate") else None
        moved = None if margin is None else _through(func, args, kwargs, parts, margin, self.region.dims)
        return self._tagged(func(*args, **kwargs), layout, moved)

    def _interpolate(
        self,
        input: torch.Tensor,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
        antialias: bool = False,
    ) -> torch.Tensor:
        if antialias:
            raise self._refusal("interpolate(antialias=True)")
        n = self.region.spatial_dims
        size = None if size is None else self._whole_size(_tuple(size, n))
        scale = None if scale_factor is None else _tuple(scale_factor, n)
        with self.region.within(self.region.name):
            return resize_part(self.region, input, size, scale, mode, bool(align_corners), not recompute_scale_factor)

    def _whole_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """A size computed in the network's forward is that of a part: find the whole it belongs to."""
        at = [d + self.region.spatial_dims for d in self.region.dims]
        local = tuple(size[i] for i in at)
        found = {la for la in self.region.seen.layouts if not la.replicated and self.region.shape(la) == local}
        if len(found) != 1:
            raise self.region.fail(f"interpolates to {size}, which is not the size of one tensor seen before.")
        whole = list(size)
        for i, bounds in zip(at, found.pop().bounds, strict=False):
            whole[i] = bounds[-1] if bounds else 1
        return tuple(whole)

    def _dropout(
        self, name: str, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Any:
        region = self.region
        with region.within(region.name):
            mask = shared_mask(region, input, p, region.name, name != "dropout")
            return region.tag(input * mask, region.layout(input))


def _training(args: Any, kwargs: Any) -> bool:
    return bool(kwargs["training"] if "training" in kwargs else args[2] if len(args) > 2 else True)


def _merged_margin(parts: list[torch.Tensor]) -> Margin | None:
    """A margin all parts have, as boxes of the first part's margin; None if one of them lacks it."""
    margins = [margin_of(p) for p in parts]
    if any(m is None for m in margins) or any(p.requires_grad and torch.is_grad_enabled() for p in parts):
        return None
    return min((m for m in margins if m is not None), key=lambda m: m.width)


def _through(
    func: Any, args: Any, kwargs: Any, parts: list[torch.Tensor], margin: Margin, dims: tuple[int, ...]
) -> Margin | None:
    """Apply a call to the margin's rows instead of the parts."""
    pieces = {}
    for box in margin.pieces:
        rows = {id(p): m.rows(box, dims) for p in parts if (m := margin_of(p)) is not None}
        if any(r is None for r in rows.values()):
            return None
        pieces[box] = func(*_swap(args, rows), **_swap(kwargs, rows))
    return Margin(margin.width, pieces)


def _swap(values: Any, rows: dict[int, Any]) -> Any:
    if isinstance(values, torch.Tensor):
        return rows.get(id(values), values)
    if isinstance(values, (list, tuple)):
        return type(values)(_swap(v, rows) for v in values)
    if isinstance(values, dict):
        return {k: _swap(v, rows) for k, v in values.items()}
    return values


def _keeps_space(name: str, args: Any, kwargs: Any, leading: int, region: Region) -> bool:
    """Whether a call with an axis argument leaves the spatial axes alone."""
    if name == "getitem":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return len(index) <= leading and all(isinstance(i, (int, slice)) for i in index)
    if name in ("repeat", "expand"):
        sizes = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return all(n in ((1,) if name == "repeat" else (-1,)) for n in sizes[-region.spatial_dims :])
    if name == "pad":
        pads = kwargs.get("pad", args[1] if len(args) > 1 else ())
        return not any(n for d in region.dims for n in pads[2 * (-d - 1) : 2 * (-d - 1) + 2])
    axes = kwargs.get("dim", kwargs.get("axis", _positional(name, args)))
    axes = axes if isinstance(axes, (list, tuple)) else (axes,)
    after = leading + region.spatial_dims + (name in ("stack", "unsqueeze"))
    limit = leading + (name in ("stack", "unsqueeze"))
    return all(isinstance(a, int) and (a + after if a < 0 else a) < limit for a in axes)


def _positional(name: str, args: Any) -> Any:
    place = 2 if name in ("chunk", "split", "tensor_split", "norm") else 1
    default = (
        0 if name in ("cat", "concat", "concatenate", "stack", "unbind", "chunk", "split", "tensor_split") else None
    )
    return args[place] if len(args) > place else default
