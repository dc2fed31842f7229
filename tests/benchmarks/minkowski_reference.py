"""MinkowskiEngine as a reference: its convolution for the benchmark, and the completion network for parity."""

from __future__ import annotations

import collections
import collections.abc
from types import ModuleType

import torch
from sparse_engines import Engine, ellipsoid_shell
from torch import Tensor, nn

from monai_memeff.sparse import SparseCompletionNet, SparseConvTranspose3d, SparseTensor


def load() -> ModuleType:
    """Import MinkowskiEngine 0.5.4, which looks for ``Sequence`` and others where Python 3.9 still had them.

    The names are put into ``collections`` for the time of the import only.
    """
    lent = [name for name in collections.abc.__all__ if not hasattr(collections, name)]
    for name in lent:
        setattr(collections, name, getattr(collections.abc, name))
    try:
        import MinkowskiEngine
    finally:
        for name in lent:
            delattr(collections, name)
    return MinkowskiEngine


def unavailable() -> str | None:
    """Why MinkowskiEngine cannot be used here, or None."""
    try:
        load()
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None


def to_minkowski_order(weight: Tensor) -> Tensor:
    """(A, B, k, k, k) with the last axis fastest to (k^3, A, B) with the first spatial axis fastest."""
    return weight.permute(4, 3, 2, 0, 1).flatten(0, 2).contiguous()


class MinkowskiEngineConvolution(Engine):
    """``MinkowskiConvolution``; the coordinate manager keeps the kernel map."""

    def __init__(self, mask: Tensor, features: Tensor, weight: Tensor, cotangent: Tensor) -> None:
        engine = load()
        self.layer = engine.MinkowskiConvolution(*weight.shape[1::-1], kernel_size=3, dimension=3)
        self.layer.kernel = nn.Parameter(to_minkowski_order(weight.transpose(0, 1)))
        coordinates = nn.functional.pad(mask.nonzero(), (1, 0)).int()
        placed = engine.SparseTensor(features.clone(), coordinates)
        if not torch.equal(placed.C, coordinates):
            raise RuntimeError("MinkowskiEngine has reordered the rows.")
        leaf = features.clone().requires_grad_()
        self.x = engine.SparseTensor(
            leaf, coordinate_map_key=placed.coordinate_map_key, coordinate_manager=placed.coordinate_manager
        )
        self.leaves = (leaf, self.layer.kernel)
        self.cotangent = cotangent

    def run(self) -> Tensor:
        """See :class:`Engine`."""
        return self.layer(self.x).F

    def comparable(self, features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`Engine`."""
        channels = weight.shape[1]
        return features, weight.view(3, 3, 3, channels, -1).permute(4, 3, 2, 1, 0)


class MinkowskiCompletionNet(nn.Module):
    """The published network as it is written for MinkowskiEngine, with the weights of a ``SparseCompletionNet``.

    Candidates beyond the border are dropped right after each generative convolution, before its batch norm.
    """

    def __init__(self, ours: SparseCompletionNet, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.engine, self.shape = load(), shape
        self.encoder = nn.ModuleList(self._twins(block) for block in (ours.stem, *ours.encoder))
        self.decoder = nn.ModuleList(self._twins(block) for block in ours.decoder)
        self.heads = nn.ModuleList(self._twin(head) for head in ours.heads)

    def _twins(self, block: nn.Sequential) -> nn.ModuleList:
        """Every layer of a block, nested blocks flattened."""
        layers = [part for part in block.modules() if not list(part.children())]
        return nn.ModuleList(self._twin(layer) for layer in layers)

    def _twin(self, layer: nn.Module) -> nn.Module:
        engine = self.engine
        if isinstance(layer, nn.BatchNorm3d):
            norm = engine.MinkowskiBatchNorm(layer.num_features)
            norm.bn.load_state_dict(layer.state_dict())
            return norm
        if isinstance(layer, nn.ReLU):
            return engine.MinkowskiReLU()
        transposed = isinstance(layer, SparseConvTranspose3d)
        kind = engine.MinkowskiGenerativeConvolutionTranspose if transposed else engine.MinkowskiConvolution
        size, stride = layer.kernel_size[0], layer.stride[0]
        twin = kind(layer.in_channels, layer.out_channels, size, stride, bias=layer.bias is not None, dimension=3)
        weight = to_minkowski_order(layer.weight if transposed else layer.weight.transpose(0, 1))
        twin.kernel.data.copy_(weight.view(twin.kernel.shape))
        if layer.bias is not None:
            twin.bias.data.copy_(layer.bias.view(twin.bias.shape))
        return twin

    def forward(self, coordinates: Tensor, wanted: set[tuple[int, ...]] | None) -> list:
        """Candidate logits of every level, coarsest first, from (N, 4) coordinates and the target's voxels, if any."""
        x = self.engine.SparseTensor(torch.ones(len(coordinates), 1), coordinates.int())
        features, levels = [], []
        for block in self.encoder:
            for layer in block:
                x = layer(x)
            features.append(x)
        x = features.pop()
        for block, head in zip(self.decoder, self.heads, strict=True):
            x = self._grow(block, x) + features.pop()
            levels.append(head(x))
            if features:
                x = self.engine.MinkowskiPruning()(x, self._worth_keeping(levels[-1], wanted))
        return levels

    def _grow(self, block: nn.ModuleList, x: object) -> object:
        x = block[0](x)
        inside = (x.C[:, 1:] < torch.tensor(self.shape)).all(dim=1)
        x = self.engine.MinkowskiPruning()(x, inside)
        for layer in block[1:]:
            x = layer(x)
        return x

    def _worth_keeping(self, level: object, wanted: set[tuple[int, ...]] | None) -> Tensor:
        keep = level.F[:, 0] > 0
        if wanted is not None:
            stride = level.tensor_stride[0]
            cells = {(b, *(c // stride * stride for c in place)) for b, *place in wanted}
            keep |= torch.tensor([tuple(place) in cells for place in level.C.tolist()])
        return keep


def compare_completion() -> list[dict]:
    """Run both networks on two defective shells, in training and in evaluation mode, and compare level by level."""
    torch.manual_seed(0)
    complete = torch.stack([ellipsoid_shell(64, 2.0), ellipsoid_shell(64, 3.0)])[:, None, :60, :, :49].float()
    defective = complete.clone()
    defective[:, :, 34:, 20:45] = 0
    ours = SparseCompletionNet()
    for norm in (part for part in ours.modules() if isinstance(part, nn.BatchNorm3d)):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.uniform_(-0.3, 0.3)
    for head in ours.heads:
        head.bias.data.fill_(0.2)  # so that some candidates survive the pruning and some do not
    for _ in range(30):  # running statistics for the evaluation mode
        _all_levels(ours, defective, complete)
    rows = []
    for mode in ("training", "evaluation"):
        theirs = MinkowskiCompletionNet(ours, tuple(complete.shape[2:])).train(mode == "training")
        ours.train(mode == "training")
        found = _all_levels(ours, defective, complete)
        wanted = {(b, i, j, k) for b, _, i, j, k in complete.nonzero().tolist()} if mode == "training" else None
        with torch.no_grad():
            reference = theirs(defective.nonzero()[:, [0, 2, 3, 4]], wanted)
        rows += [_compare_level(mode, mine, other) for mine, other in zip(found, reference, strict=True)]
    return rows


def _all_levels(net: SparseCompletionNet, defective: Tensor, complete: Tensor) -> list[SparseTensor]:
    """Logits of every level, in evaluation mode too, where the network returns the last one only."""
    levels: list[SparseTensor] = []
    hooks = [head.register_forward_hook(lambda _module, _inputs, level: levels.append(level)) for head in net.heads]
    with torch.no_grad():
        net(defective, complete)
    for hook in hooks:
        hook.remove()
    return levels


def _compare_level(mode: str, ours: SparseTensor, theirs: object) -> dict:
    stride = ours.stride[0]
    values = dict(zip(map(tuple, theirs.C.tolist()), theirs.F[:, 0].tolist(), strict=True))
    places = [(b, i * stride, j * stride, k * stride) for b, i, j, k in ours.coordinates.tolist()]
    same = set(places) == set(values)
    logits = ours.features[:, 0].tolist()
    errors = [abs(logit - values[place]) for place, logit in zip(places, logits, strict=True) if place in values]
    return {
        "mode": mode,
        "stride": stride,
        "candidates": len(places),
        "same_candidates": same,
        "largest": max(map(abs, logits), default=0.0),
        "difference": max(errors, default=0.0),
    }
