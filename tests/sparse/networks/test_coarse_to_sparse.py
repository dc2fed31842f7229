"""CoarseToSparseUNet: the choice of voxels, equality with a masked dense emulation, bounds on memory, and its edges."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks import ADN, Convolution, ResidualUnit
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets import UNet
from torch import nn
from torch.nn import functional

from monai_memeff.memory import measure_peak
from monai_memeff.sparse.core.tensor import SparseTensor
from monai_memeff.sparse.networks.cells import (
    cell_sizes,
    cells_to_voxels,
    choose_cells,
    interpolated_at,
    scatter_add_rows,
    upsample,
)
from monai_memeff.sparse.networks.coarse_to_sparse import CoarseToSparseUNet

ODD = (13, 10, 7)


def small_network(in_channels: int = 2, out_channels: int = 3, **options) -> CoarseToSparseUNet:
    """A network that is quick to run, with what the test changes."""
    torch.manual_seed(0)
    settings = {"refine_channels": (4, 6, 6), "context_channels": 3, "max_active": 0.3, **options}
    return CoarseToSparseUNet(3, in_channels, out_channels, (4, 6, 8), (1, 2), **settings)


def logits_for(background: torch.Tensor) -> torch.Tensor:
    """Two-class logits (B, 2, ...) whose softmax gives these background probabilities (B, 1, ...)."""
    return torch.cat((background.log(), (1 - background).log()), dim=1)


# --- cells


def test_cell_sizes_count_every_voxel_once():
    sizes = cell_sizes(ODD, (2, 3, 4))
    ones = torch.ones(1, 1, *sizes.shape)
    assert sizes.shape == (7, 4, 2)
    assert sizes.sum() == ODD[0] * ODD[1] * ODD[2]
    number = torch.arange(sizes.numel()).view(1, 1, *sizes.shape)
    voxels = cells_to_voxels(number, (2, 3, 4), ODD)
    assert voxels.shape[2:] == ODD
    assert torch.equal(voxels.flatten().bincount(), sizes.flatten())
    assert cells_to_voxels(ones, (1, 1, 1), sizes.shape).shape == ones.shape


@pytest.mark.parametrize("factor", [(2, 2, 2), (1, 2, 3)])
def test_interpolation_at_voxels_is_the_enlarged_volume_read_there(factor):
    torch.manual_seed(0)
    cells = torch.rand(2, 3, *cell_sizes(ODD, factor).shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, *ODD) < 0.3
    where = SparseTensor.from_dense(torch.zeros(2, 1, *ODD), mask)
    dense = SparseTensor.from_dense(upsample(cells, factor, ODD), mask).features
    rows = interpolated_at(cells, where, factor)
    torch.testing.assert_close(rows, dense, rtol=1e-10, atol=1e-10)
    weights = torch.rand_like(rows)
    gradients = [torch.autograd.grad((values * weights).sum(), cells)[0] for values in (rows, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_added_at_is_the_sum_with_the_dense_volume():
    torch.manual_seed(0)
    volume = torch.rand(2, 3, *ODD, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, *ODD) < 0.2
    rows = SparseTensor.from_dense(torch.rand(2, 3, *ODD, dtype=torch.float64), mask)
    rows = rows.replace(rows.features.requires_grad_())
    weights = torch.rand_like(volume)
    results = [scatter_add_rows(volume, rows), volume + rows.dense()]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    ours, theirs = (torch.autograd.grad((r * weights).sum(), (volume, rows.features)) for r in results)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# --- the choice


def test_sure_background_is_left_out_and_its_border_kept():
    background = torch.full((1, 1, 7, 7, 7), 0.99)
    background[0, 0, 3, 3, 3] = 0.5
    sizes = cell_sizes((14, 14, 14), (2, 2, 2))
    for dilation, expected in ((0, 1), (1, 27), (2, 125)):
        chosen = choose_cells(logits_for(background), sizes, 14**3, dilation=dilation)
        assert chosen.sum() == expected
        assert chosen[0, 0, 3, 3, 3]
    assert not choose_cells(logits_for(torch.full_like(background, 0.96)), sizes, 14**3).any()


def test_sure_foreground_is_chosen_too():
    background = torch.full((1, 1, 4, 4, 4), 1e-6)
    assert choose_cells(logits_for(background), cell_sizes((8, 8, 8), (2, 2, 2)), 512).all()


def test_the_most_uncertain_go_first():
    torch.manual_seed(0)
    background = torch.rand(2, 1, 5, 6, 4).clamp(0.01, 0.94)
    sizes = cell_sizes((10, 12, 8), (2, 2, 2))
    chosen = choose_cells(logits_for(background), sizes, limit=16 * 8, dilation=0)
    uncertainty = 1 - (2 * background - 1).abs()
    for item in range(2):
        assert chosen[item].sum() == 16
        assert uncertainty[item][chosen[item]].min() >= uncertainty[item][~chosen[item]].max()


def test_ties_go_to_the_first_cells_in_memory_order():
    logits = torch.zeros(1, 3, 4, 4, 4)
    chosen = choose_cells(logits, cell_sizes((8, 8, 8), (2, 2, 2)), limit=10 * 8)
    assert torch.equal(chosen.flatten(), torch.arange(64) < 10)


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 100, 499, 13 * 10 * 7, 10**6])
def test_the_limit_holds_in_voxels_whatever_the_sizes(limit):
    torch.manual_seed(0)
    sizes = cell_sizes(ODD, (2, 2, 2))
    chosen = choose_cells(torch.randn(2, 3, *sizes.shape) * 0.1, sizes, limit)
    for item in chosen[:, 0]:
        assert sizes[item].sum() <= limit
        assert sizes[item].sum() > min(limit, sizes.sum()) - 8  # and it is used


def test_overlapping_classes_are_judged_one_by_one():
    logits = torch.full((1, 3, 2, 2, 2), -8.0)
    logits[0, 2, 0, 0, 0] = 8.0  # sure of class 2
    logits[0, 0, 1, 1, 1] = 0.0  # unsure of class 0
    sizes = cell_sizes((2, 2, 2), (1, 1, 1))
    chosen = choose_cells(logits, sizes, 8, dilation=0, sigmoid=True)
    assert chosen.flatten().tolist() == [True, *[False] * 6, True]
    assert choose_cells(logits, sizes, 1, dilation=0, sigmoid=True).flatten().nonzero().flatten().tolist() == [7]


# --- equality with a masked dense emulation


class MaskedDense:
    """Runs a MONAI UNet on dense volumes, masked after every layer, as its sparse twin must compute it."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.masks = [mask]

    def run(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Run any part of the network on a masked volume."""
        if isinstance(module, nn.Sequential | Convolution | ADN):
            for child in module.children():
                x = self.run(child, x)
            return x
        if isinstance(module, SkipConnection):
            return torch.cat((x, self.run(module.submodule, x)), dim=1)
        if isinstance(module, ResidualUnit):
            masks = list(self.masks)
            shortcut = self.run(module.residual, x)
            self.masks = masks
            return shortcut + self.run(module.conv, x)
        return self.layer(module, x) * self.masks[-1]

    def layer(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Run a single layer; strided ones also change the level."""
        if isinstance(module, nn.ConvTranspose3d):
            if module.stride != (1, 1, 1):
                self.masks.pop()
            fine = self.masks[-1].shape[2:]
            settings = (module.stride, module.padding, module.output_padding)
            y = functional.conv_transpose3d(x, module.weight, module.bias, *settings)
            return y[:, :, : fine[0], : fine[1], : fine[2]]
        if isinstance(module, nn.Conv3d):
            if module.stride != (1, 1, 1):
                coarse = functional.max_pool3d(self.masks[-1], module.stride, ceil_mode=True)
                self.masks.append(coarse)
            return functional.conv3d(x, module.weight, module.bias, module.stride, module.padding)
        if isinstance(module, nn.InstanceNorm3d):
            return self.instance_norm(module, x)
        if isinstance(module, nn.PReLU):
            return functional.prelu(x, module.weight)
        assert isinstance(module, nn.Identity) or getattr(module, "p", None) == 0, module
        return x

    def instance_norm(self, module: nn.InstanceNorm3d, x: torch.Tensor) -> torch.Tensor:
        """Statistics over active voxels."""
        mask = self.masks[-1]
        count = mask.sum((2, 3, 4), keepdim=True).clamp(min=1)
        mean = (x * mask).sum((2, 3, 4), keepdim=True) / count
        variance = (((x - mean) * mask) ** 2).sum((2, 3, 4), keepdim=True) / count
        return (x - mean) / (variance + module.eps).sqrt()


def emulated(network: CoarseToSparseUNet, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's logits and coarse logits by dense operations alone."""
    shape, factor = x.shape[2:], network.coarse_factor
    given = network._coarse_features(x)
    coarse_logits = given[:, : network.out_channels]
    mask = cells_to_voxels(network.active_cells(coarse_logits, shape), factor, shape).to(x.dtype)
    features = torch.cat((x, upsample(given, factor, shape)), dim=1) * mask
    refined = MaskedDense(mask).run(network.refine.model, features)
    return upsample(coarse_logits, factor, shape) + refined * mask, coarse_logits


@pytest.mark.parametrize("max_active", [0.002, 0.2, 1.0], ids=["almost nothing", "some", "everything"])
@pytest.mark.parametrize("options", [{}, {"num_res_units": 2}, {"coarse_factor": (1, 2, 3), "use_checkpoint": True}])
def test_equals_the_masked_dense_emulation(max_active, options):
    network = small_network(max_active=max_active, **options).double()
    x = torch.rand(2, 2, *ODD, dtype=torch.float64, requires_grad=True)
    ours, theirs = network.both_logits(x), emulated(network, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weights = [torch.rand_like(y) for y in ours]
    parameters = [x, *network.parameters()]
    gradients = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(logits, weights, strict=True)), parameters)
        for logits in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


# --- what it promises


@pytest.mark.parametrize("out_channels", [1, 2, 5])
@pytest.mark.parametrize("shape", [(16, 16, 16), ODD, (9, 5, 6)])
def test_gradients_of_the_logits_reach_both_stages(out_channels, shape):
    network = small_network(3, out_channels, num_res_units=1)
    logits = network(torch.rand(2, 3, *shape))
    assert logits.shape == (2, out_channels, *shape)
    (logits * torch.rand_like(logits)).sum().backward()
    for name, parameter in network.named_parameters():
        # a bias right before an instance norm cannot matter: its gradient is zero up to rounding
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert all(parameter.grad.abs().max() > 0 for parameter in network.parameters() if parameter.ndim == 5)


def test_nothing_active_leaves_the_coarse_logits_and_a_connected_graph():
    network = small_network()
    with torch.no_grad():
        network.coarse.model[2].conv.bias[0] += 100  # sure background everywhere
    x = torch.rand(1, 2, *ODD)
    logits, coarse_logits = network.both_logits(x)
    assert not network.active_cells(coarse_logits, ODD).any()
    assert torch.equal(logits, upsample(coarse_logits, network.coarse_factor, ODD))
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())  # DDP needs every one
    assert all(parameter.grad.abs().max() == 0 for parameter in network.refine.parameters())


@pytest.mark.slow
def test_the_cap_bounds_memory_whatever_is_in_the_volume():
    x = torch.rand(1, 1, 40, 40, 40)
    peaks = []
    for max_active in (0.05, 1.0):
        network = small_network(1, 2, max_active=max_active, certainty=1.0)  # every voxel is worth it
        with measure_peak() as meter:
            logits, coarse_logits = network.both_logits(x)
            logits.sum().backward()
        cells = network.active_cells(coarse_logits, x.shape[2:])
        active = cells_to_voxels(cells, network.coarse_factor, x.shape[2:]).float().mean()
        assert max_active - 0.001 < active <= max_active
        peaks.append(meter.peak_bytes)
    assert peaks[0] < 0.25 * peaks[1]


@pytest.mark.slow
def test_trains_in_much_less_memory_than_the_dense_network():
    x = torch.rand(1, 1, 48, 48, 48)
    settings = {"num_res_units": 2, "act": ("leakyrelu", {"inplace": True})}
    ours = CoarseToSparseUNet(3, 1, 3, (16, 32, 64), (1, 2), max_active=0.06, use_checkpoint=True, **settings)
    dense = UNet(3, 1, 3, (16, 32, 64, 64), (1, 2, 2), **settings)
    peaks = []
    for network in (ours, dense):
        with measure_peak() as meter:
            network(x).sum().backward()
        peaks.append(meter.peak_bytes)
    assert peaks[0] < 0.3 * peaks[1]


def test_recomputing_changes_neither_results_nor_names():
    plain, lean = small_network(num_res_units=2), small_network(num_res_units=2, use_checkpoint=True)
    assert plain.state_dict().keys() == lean.state_dict().keys()
    x = torch.rand(2, 2, *ODD)
    gradients = []
    for network in (plain, lean):
        logits = network(x)
        logits.square().sum().backward()
        gradients.append([logits, *[parameter.grad for parameter in network.parameters()]])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_is_deterministic_and_independent_of_the_number_of_threads():
    network = small_network(max_active=0.1).eval()
    x = torch.rand(2, 2, *ODD)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 1, 2):
            torch.set_num_threads(number)
            results.append(network(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-5)


def test_deep_supervision_gives_monais_loss_both_logits_in_training_only():
    from monai.losses import DeepSupervisionLoss, DiceCELoss

    network = small_network(deep_supervision=True)
    x, target = torch.rand(1, 2, *ODD), torch.randint(0, 3, (1, 1, *ODD)).float()
    both = network(x)
    assert [y.shape[2:] for y in both] == [ODD, (7, 5, 4)]
    DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))(both, target).backward()
    assert torch.equal(network.eval()(x), both[0])


def test_autocast_runs_both_stages_in_half_precision():
    network = small_network(max_active=1.0, certainty=1.0)  # everything active: the choice cannot differ
    x = torch.rand(1, 2, 16, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(x)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    torch.testing.assert_close(logits.float(), network(x), rtol=0.1, atol=0.1)


def test_anisotropic_strides():
    network = CoarseToSparseUNet(
        3, 1, 2, (4, 6, 8), (1, (1, 2, 2)), coarse_factor=(1, 2, 2), refine_strides=(1, (1, 2, 2))
    )
    assert network.divisor == (1, 2, 2)
    assert network(torch.rand(1, 1, 5, 14, 11)).shape == (1, 2, 5, 14, 11)


def test_monai_builds_it_from_a_config():
    from monai.bundle import ConfigParser

    config = {"_target_": "monai_memeff.sparse.CoarseToSparseUNet", "spatial_dims": 3, "in_channels": 1}
    config |= {"out_channels": 2, "channels": [4, 8, 16], "strides": [1, 2], "num_res_units": 2}
    parser = ConfigParser({"network_def": config})
    assert isinstance(parser.get_parsed_content("network_def"), CoarseToSparseUNet)


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_active": 0.0}, "max_active must be above 0 and at most 1, got 0.0"),
        ({"max_active": 1.5}, "max_active must be above 0 and at most 1, got 1.5"),
        ({"certainty": 0.0}, "certainty must be above 0 and at most 1, got 0.0"),
        ({"dilation": -1}, "dilation must be 0 or more cells, got -1"),
        ({"context_channels": -1}, "context_channels must be 0 or more, got -1"),
        ({"coarse_factor": 0}, "coarse_factor must be a positive number or three of them, got 0"),
        ({"coarse_factor": (2, 2)}, "coarse_factor must be a positive number or three of them"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        small_network(**options)


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="spatial_dims must be 3, got 2"):
        CoarseToSparseUNet(2, 1, 2, (4, 8), (1,))
    for shape in ((1, 2, 8, 8), (1, 1, 8, 8, 8)):
        with pytest.raises(ValueError, match=r"the input must have shape \(B, 2, H, W, D\), got"):
            small_network()(torch.rand(shape))
