"""Turn a dense MONAI network into its sparse twin in place: same parameters, same ``state_dict`` keys."""

from __future__ import annotations

from typing import TypeVar

from monai.networks.blocks import ADN, Convolution, ResidualUnit
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets.unet import UNet
from torch import nn

from monai_memeff.sparse.core.tensor import SparseTensor, concatenate_channels
from monai_memeff.sparse.nn import activations, blocks
from monai_memeff.sparse.nn.conv import SparseConv3d, SparseConvTranspose3d

Network = TypeVar("Network", bound=nn.Module)


class SparseSkipConnection(SkipConnection):
    """MONAI's skip connection on sparse tensors: concatenation or sum over the union of the active voxels."""

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Run the branch and join it with its input."""
        branch = self.submodule(x)
        return concatenate_channels([x, branch]) if self.mode == "cat" else x + branch


class SparseADN(ADN):
    """MONAI's activation, dropout and norm; an activation behind a norm, with no active dropout between, is fused.

    Layers with hooks of their own are called one by one, so that these see what they expect.
    """

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Run the layers in their order."""
        layers = [layer for layer in self if not (isinstance(layer, DROPOUT) and not (layer.training and layer.p))]
        while layers:
            layer, *layers = layers
            x = layer(x, layers.pop(0)) if layers and _fuses(layer, layers[0]) else layer(x)
        return x


def _fuses(norm: nn.Module, act: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = any(getattr(layer, kind) for layer in (norm, act) for kind in kinds)
    return isinstance(norm, FUSED) and activations.slope_below_zero(act) is not None and not hooked


DROPOUT = (activations.SparseDropout, activations.SparseDropout3d)

FUSED = (blocks.SparseBatchNorm3d, blocks.SparseInstanceNorm3d)
"""Norms that take the activation behind them."""

SPARSE_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv3d: SparseConv3d,
    nn.ConvTranspose3d: SparseConvTranspose3d,
    nn.BatchNorm3d: blocks.SparseBatchNorm3d,
    nn.InstanceNorm3d: blocks.SparseInstanceNorm3d,
    nn.GroupNorm: blocks.SparseGroupNorm,
    nn.ReLU: activations.SparseReLU,
    nn.LeakyReLU: activations.SparseLeakyReLU,
    nn.PReLU: activations.SparsePReLU,
    nn.ELU: activations.SparseELU,
    nn.GELU: activations.SparseGELU,
    nn.SiLU: activations.SparseSiLU,
    nn.Sigmoid: activations.SparseSigmoid,
    nn.Tanh: activations.SparseTanh,
    nn.Dropout: activations.SparseDropout,
    nn.Dropout3d: activations.SparseDropout3d,
    SkipConnection: SparseSkipConnection,
    ADN: SparseADN,
}
"""Dense layer -> sparse layer with the same attributes and parameters."""

PASSED_THROUGH: tuple[type[nn.Module], ...] = (nn.Sequential, nn.Identity, Convolution, ResidualUnit)
"""Containers that only call their children, add results or do nothing: right for sparse tensors as they are."""


def to_sparse(network: Network) -> Network:
    """Swap every layer inside ``network`` for its sparse twin, in place.

    Parameters stay the same objects, so optimizers keep working and dense weights load strictly. The network then maps
    SparseTensor to SparseTensor. ``network`` itself must be in the tables or a container from them.

    Args:
        network: built of the layers in :data:`SPARSE_TWINS` and the containers in :data:`PASSED_THROUGH`.

    Returns:
        The same object.

    Raises:
        TypeError: a layer has no sparse twin (named in the message); nothing has been changed then.
        ValueError: a convolution has groups, another padding mode than zeros, or a padding that shifts the voxels; an
            instance norm keeps running statistics; a skip connection multiplies.

    Examples:
        >>> network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.ReLU())
        >>> type(to_sparse(network)[0]).__name__
        'SparseConv3d'
    """
    modules = list(network.named_modules())
    for name, module in modules:
        _check(name, module)
    for _, module in modules:
        twin = SPARSE_TWINS.get(type(module))
        if twin is not None:
            module.__class__ = twin
    return network


def _check(name: str, module: nn.Module) -> None:
    known = type(module) in SPARSE_TWINS or type(module) in SPARSE_TWINS.values()
    if not known and type(module) not in PASSED_THROUGH:
        supported = ", ".join(layer.__name__ for layer in SPARSE_TWINS)
        kind = f"{name or 'network'} ({type(module).__name__})"
        raise TypeError(f"{kind} has no sparse twin; {_way_out(module)}supported: {supported}.")
    if isinstance(module, SkipConnection) and module.mode == "mul":
        raise ValueError(f"{name}: a sparse skip connection joins by 'cat' or 'add', got 'mul'.")
    if isinstance(module, nn.InstanceNorm3d) and module.track_running_stats:
        raise ValueError(f"{name}: sparse instance norm keeps no running statistics; set track_running_stats=False.")
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
        _check_convolution(name, module)


def _way_out(module: nn.Module) -> str:
    """What to do with a network as a whole."""
    if type(module) is UNet:
        return (
            "use monai_memeff.sparse.SparseUNet with the same arguments, or convert its part: to_sparse(unet.model); "
        )
    inner = getattr(module, "model", None)
    return "convert its part: to_sparse(network.model); " if isinstance(inner, nn.Module) else ""


def _check_convolution(name: str, layer: nn.Conv3d | nn.ConvTranspose3d) -> None:
    if layer.groups != 1 or layer.padding_mode != "zeros":
        raise ValueError(
            f"{name}: sparse convolution needs groups=1 and padding_mode='zeros', "
            f"got groups={layer.groups}, padding_mode={layer.padding_mode!r}."
        )
    if layer.padding == "same":
        return
    paddings = (0, 0, 0) if layer.padding == "valid" else layer.padding
    for kernel, stride, dilation, padding, end in zip(
        layer.kernel_size, layer.stride, layer.dilation, paddings, layer.output_padding, strict=True
    ):
        reach = dilation * (kernel - 1) - 2 * int(padding) + int(end)
        if stride > 1 and type(layer) in (nn.Conv3d, nn.ConvTranspose3d) and not 0 <= reach < stride:
            raise ValueError(
                f"{name}: a sparse convolution of stride {stride} goes between n voxels and ceil(n / {stride}) cells, "
                f"which kernel {kernel} with padding {padding}, dilation {dilation} and output padding {end} does not; "
                f"use padding {dilation * (kernel - 1) // 2}."
            )
        if stride == 1 and 2 * int(padding) != dilation * (kernel - 1):
            raise ValueError(
                f"{name}: a stride-1 sparse convolution keeps its voxels, so padding must be "
                f"dilation * (kernel_size - 1) / 2 = {dilation * (kernel - 1) / 2:g}, got {padding}."
            )
