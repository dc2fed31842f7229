"""MinkowskiEngine as a reference: its convolution for the benchmark, and the completion network for parity."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sparse_engines import Engine, ellipsoid_shell
from torch import Tensor, nn

from monai_memeff.sparse import SparseCompletionNet, SparseTensor
from monai_memeff.sparse.backends import minkowski
from monai_memeff.sparse.networks.minkowski_weights import kernel_to_weight, to_minkowski, weight_to_kernel

Spatial = tuple[int, int, int]

STORED = 20
"""Every so many of the example's logits are stored."""


def unavailable() -> str | None:
    """Why MinkowskiEngine cannot be used here, or None."""
    return minkowski.unavailable(torch.device("cpu"))


class MinkowskiEngineConvolution(Engine):
    """``MinkowskiConvolution``; the coordinate manager keeps the kernel map."""

    def __init__(self, mask: Tensor, features: Tensor, weight: Tensor, cotangent: Tensor) -> None:
        engine = minkowski.library()
        self.layer = engine.MinkowskiConvolution(*weight.shape[1::-1], kernel_size=3, dimension=3)
        self.layer.kernel = nn.Parameter(weight_to_kernel(weight))
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
        return features, kernel_to_weight(weight, (3, 3, 3))


class MinkowskiCompletionNet(nn.Module):
    """The published network as it is written for MinkowskiEngine, with the published names of its layers.

    Its weights are copied from a ``SparseCompletionNet``. Candidates beyond the border are dropped right after each
    generative convolution, before its batch norm.
    """

    def __init__(self, ours: SparseCompletionNet, shape: Spatial) -> None:
        super().__init__()
        self.engine, self.shape = minkowski.library(), shape
        channels = ours.channels
        plain, growing = self.engine.MinkowskiConvolution, self.engine.MinkowskiGenerativeConvolutionTranspose
        self.enc_block_s1 = self._block((plain, 1, channels[0], 3, 1))
        for n in range(6):
            wide = channels[n + 1]
            block = self._block((plain, channels[n], wide, 2, 2), (plain, wide, wide, 3, 1))
            self.add_module(f"enc_block_s{2**n}s{2 ** (n + 1)}", block)
        for n in reversed(range(6)):
            slim, size = channels[n], 4 if n == 5 else 2
            block = self._block((growing, channels[n + 1], slim, size, 2), (plain, slim, slim, 3, 1))
            self.add_module(f"dec_block_s{2 ** (n + 1)}s{2**n}", block)
            self.add_module(f"dec_s{2**n}_cls", plain(slim, 1, 1, bias=True, dimension=3))
        last = plain(channels[0], 1, 1, bias=True, dimension=3)
        self.final_out = nn.Sequential(last, self.engine.MinkowskiSigmoid())
        self.load_state_dict(to_minkowski(ours))

    def _block(self, *convolutions: tuple) -> nn.Sequential:
        """Convolutions (kind, in, out, kernel size, stride), each with batch norm and ReLU."""
        layers: list[nn.Module] = []
        for kind, before, after, size, stride in convolutions:
            layers += [kind(before, after, size, stride, dimension=3), self.engine.MinkowskiBatchNorm(after)]
            layers.append(self.engine.MinkowskiReLU())
        return nn.Sequential(*layers)

    def forward(self, coordinates: Tensor, wanted: set[tuple[int, ...]] | None) -> list:
        """Candidate logits of every level, coarsest first, from (N, 4) coordinates and the target's voxels, if any."""
        x = self.engine.SparseTensor(torch.ones(len(coordinates), 1), coordinates.int())
        features, levels = [self.enc_block_s1(x)], []
        for n in range(6):
            features.append(self.get_submodule(f"enc_block_s{2**n}s{2 ** (n + 1)}")(features[-1]))
        x = features.pop()
        for n in reversed(range(6)):
            x = self._grow(self.get_submodule(f"dec_block_s{2 ** (n + 1)}s{2**n}"), x) + features.pop()
            levels.append(self.get_submodule(f"dec_s{2**n}_cls")(x))
            if features:
                x = self.engine.MinkowskiPruning()(x, self._worth_keeping(levels[-1], wanted))
        return levels

    def _grow(self, block: nn.Sequential, x: object) -> object:
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


def store_example(path: Path) -> None:
    """Write the state dict of a small network with random weights, an input, and MinkowskiEngine's logits for it."""
    torch.manual_seed(0)
    mask = torch.stack([ellipsoid_shell(28, 1.5), ellipsoid_shell(28, 2.5)])[:, :24, :, :27]
    mask[:, :, 18:, 20:] = False
    theirs = MinkowskiCompletionNet(SparseCompletionNet((2, 2, 3, 3, 2, 4, 5)), tuple(mask.shape[1:]))
    for part in theirs.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()  # random numbers of MinkowskiEngine's own, in its own order
    for norm in (part for part in theirs.modules() if isinstance(part, nn.BatchNorm1d)):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.uniform_(-0.3, 0.3)
    for name, entry in theirs.state_dict().items():
        if name.endswith("cls.bias"):
            entry.fill_(0.3)  # so that not everything is pruned
    coordinates = mask.nonzero().contiguous()
    with torch.no_grad():
        for _ in range(30):
            theirs(coordinates, {tuple(place) for place in coordinates.tolist()})
        theirs.dec_s1_cls.bias -= theirs.eval()(coordinates, None)[-1].F.median()  # as many above 0 as below
        last = theirs(coordinates, None)[-1]
    torch.save(
        {
            "state_dict": theirs.state_dict(),
            "spatial_shape": list(mask.shape[1:]),
            "coordinates": coordinates.to(torch.uint8),
            "candidates": len(last),
            "places": last.C[::STORED].to(torch.uint8),
            "logits": last.F[::STORED, 0].clone(),
        },
        path,
    )
    print(f"wrote {path}: {len(last)} logits, {int((last.F > 0).sum())} above 0")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=store_example.__doc__)
    parser.add_argument("path", type=Path)
    store_example(parser.parse_args().path)
