"""SparseTrainer's edit of the plans, its patch rule against measured memory, and the network as nnU-Net builds it."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="the extra `nnunet` is not installed")

from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

import nnunet_plugins
from monai_memeff.memory import measure_peak
from nnunet_plugins.plans_network import CoarseToSparsePlansUNet
from nnunet_plugins.sparse_plans import KEY, STOCK_BYTES, edit_plans, grown, sparse_bytes, stock_bytes
from nnunet_plugins.sparse_trainer import SparseTrainer

STRIDES = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
LABELS = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "a": 1, "b": 2}, "numTraining": 4}


def architecture(strides: list, features: list[int]) -> dict:
    """The entry that nnU-Net's default planner writes."""
    stages = len(strides)
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": features,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": strides,
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def stock_plans() -> dict:
    """Plans with a 3D and a 2D configuration, as far as SparseTrainer reads them."""
    full = {"patch_size": [64, 64, 48], "median_image_size_in_voxels": [150.0, 140.0, 130.5]}
    full["architecture"] = architecture(STRIDES, [32, 64, 128, 256])
    cascade = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    lowres = {**copy.deepcopy(full), "next_stage": "3d_cascade_fullres"}
    flat = {"patch_size": [512, 512], "architecture": architecture([[1, 1], [2, 2]], [32, 64])}
    configurations = {"3d_fullres": full, "3d_lowres": lowres, "3d_cascade_fullres": cascade, "2d": flat}
    return {"dataset_name": "Dataset900_X", "plans_name": "nnUNetPlans", "configurations": configurations} | {
        "label_manager": "LabelManager"
    }


def defaults(**changes: object) -> dict:
    """The trainer's settings."""
    from nnunet_plugins.sparse_trainer import SETTINGS, SparseTrainer

    return {**{name: getattr(SparseTrainer, name) for name in SETTINGS}, **changes}


def edited(
    configuration: str = "3d_fullres", plans: dict | None = None, dataset: dict = LABELS, **changes: object
) -> dict:
    """The configuration after the edit."""
    plans = stock_plans() if plans is None else plans
    edit_plans(plans, configuration, dataset, defaults(**changes))
    json.dumps(plans)  # nnU-Net saves them
    return plans["configurations"][configuration]


# --- the rule


def test_a_patch_grows_where_it_covers_least_and_never_beyond_the_image():
    assert grown([32, 32, 32], [64, 64, 64], [16, 16, 16], 48 * 32 * 32) == [48, 32, 32]
    assert grown([32, 32, 32], [64, 128, 64], [16, 16, 16], 10**9) == [64, 128, 64]
    assert grown([32, 32, 32], [60, 32, 20], [16, 16, 16], 10**9) == [64, 32, 32]  # rounded up as nnU-Net pads
    assert grown([48, 48, 48], [100, 100, 100], [16, 16, 16], 10) == [48, 48, 48]  # never smaller
    assert grown([16, 64, 64], [40, 200, 200], [4, 16, 16], 3 * 16 * 64 * 64) == [20, 96, 96]


def test_the_patch_grows_to_what_the_memory_allows():
    configuration = edited()
    patch, stock = configuration["patch_size"], stock_plans()["configurations"]["3d_fullres"]
    allowed = stock_bytes(stock["architecture"], stock["patch_size"], 2, 3)
    needed = sparse_bytes(configuration["architecture"]["arch_kwargs"], 2, 3)
    assert needed * np.prod(patch) <= allowed < needed * np.prod([extent + 8 for extent in patch])
    assert np.prod(patch) >= 4 * np.prod(stock["patch_size"])
    assert all(extent % 8 == 0 for extent in patch)
    half = edited(memory_share=0.5)["patch_size"]
    assert 0.3 * np.prod(patch) < np.prod(half) < 0.6 * np.prod(patch)
    assert edited(patch_size=(80, 72, 64))["patch_size"] == [80, 72, 64]


def step_peak(network: torch.nn.Module, patch: tuple[int, int, int], scales: list[float], heads: int) -> int:
    """Peak bytes of one training step with nnU-Net's loss, two samples."""
    options = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
    x = torch.rand(2, 1, *patch)
    shapes = [[round(extent * scale) for extent in patch] for scale in scales]
    targets = [torch.randint(0, heads, (2, 1, *shape)).float() for shape in shapes]
    with measure_peak() as meter:
        DeepSupervisionWrapper(loss, [1 / 2**level for level in range(len(scales))])(network(x), targets).backward()
    return meter.peak_bytes


@pytest.mark.parametrize("heads", [2, 14])
@pytest.mark.long
def test_the_estimates_are_near_what_a_training_step_needs(heads):
    features = [16, 32, 64]
    stock = architecture(STRIDES[:3], features)
    arguments = [stock["arch_kwargs"], stock["_kw_requires_import"], 1, heads]
    dense = get_network_from_plans(stock["network_class_name"], *arguments, deep_supervision=True)
    patch = (48, 48, 40)
    measured = step_peak(dense, patch, [1, 0.5], heads)
    # on the CPU everything is in single precision, twice the size of the rule's mixed precision
    assert 2 * stock_bytes(stock, patch, 1, heads) * 2 == pytest.approx(measured, rel=0.3)
    assert stock_bytes(stock, patch, 1, heads) == STOCK_BYTES * dense.compute_conv_feature_map_size(patch)

    ours = CoarseToSparsePlansUNet(1, heads, STRIDES[:3], features)
    needed = sparse_bytes({"strides": STRIDES[:3], "features_per_stage": features, **defaults()}, 1, heads, value=4)
    large = (64, 64, 64)
    assert 2 * needed * np.prod(large) == pytest.approx(step_peak(ours, large, [1, 0.5], heads), rel=0.35)


# --- the loss


@pytest.mark.parametrize("regions", [False, True])
def test_a_voxel_of_a_larger_patch_counts_for_as_much_as_in_stock(regions):
    stock, larger = (4, 6, 8), (8, 6, 10)
    trainer = object.__new__(SparseTrainer)
    trainer.label_manager = SimpleNamespace(has_regions=regions, ignore_label=None)
    trainer.is_ddp = trainer.enable_deep_supervision = False
    trainer.configuration_manager = SimpleNamespace(
        batch_dice=False, patch_size=larger, configuration={KEY: {"stock": {"patch_size": stock}}}
    )
    losses = {larger: trainer._build_loss(), stock: super(SparseTrainer, trainer)._build_loss()}
    gradients = []
    for extents, loss in losses.items():
        loss.weight_dice = 0
        logits = torch.zeros(1, 3, *extents, dtype=torch.float64, requires_grad=True)
        target = torch.ones(1, 3 if regions else 1, *extents, dtype=torch.float64)
        loss(logits, target).backward()
        gradients.append(logits.grad[0, :, 1, 2, 3])
    torch.testing.assert_close(*gradients)


# --- the edit


def test_the_residual_encoder_presets_have_the_pyramid_too():
    plans = stock_plans()
    entry = plans["configurations"]["3d_fullres"]["architecture"]
    entry["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    entry["arch_kwargs"]["n_blocks_per_stage"] = entry["arch_kwargs"].pop("n_conv_per_stage")
    assert np.prod(edited(plans=plans)["patch_size"]) > 4 * 64 * 64 * 48


def test_the_edit_keeps_what_it_replaced_and_can_be_repeated():
    plans = stock_plans()
    first = copy.deepcopy(edited(plans=plans))
    assert first[KEY]["stock"] == {
        name: stock_plans()["configurations"]["3d_fullres"][name] for name in ("patch_size", "architecture")
    }
    assert edited(plans=plans) == first
    assert edited(plans=plans, max_active=0.5) == first  # what the plans say goes before the class
    other = {name: value for name, value in plans["configurations"].items() if name not in ("3d_fullres",)}
    assert other == {name: value for name, value in stock_plans()["configurations"].items() if name != "3d_fullres"}


def test_settings_in_the_plans_go_first():
    plans = stock_plans()
    plans["configurations"]["3d_fullres"][KEY] = {"max_active": 0.2, "patch_size": [96, 96, 64]}
    configuration = edited(plans=plans, max_active=0.01, dilation=2)
    arguments = configuration["architecture"]["arch_kwargs"]
    assert configuration["patch_size"] == [96, 96, 64]
    assert (arguments["max_active"], arguments["dilation"]) == (0.2, 2)
    plans["configurations"]["3d_lowres"][KEY] = {"max_activ": 0.2}
    with pytest.raises(ValueError, match="unknown setting 'max_activ' under 'sparse_trainer' in the plans; known are"):
        edited("3d_lowres", plans)


@pytest.mark.parametrize("configuration", ["3d_lowres", "3d_cascade_fullres"])
def test_lowres_and_a_configuration_that_inherits(configuration):
    plans = stock_plans()
    edited(configuration, plans)
    manager = PlansManager(plans).get_configuration(configuration)
    assert manager.network_arch_class_name.endswith("CoarseToSparsePlansUNet")
    assert np.prod(manager.patch_size) > 64 * 64 * 48


def test_regions_are_judged_one_by_one():
    regions = {**LABELS, "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}}
    assert edited(dataset={**regions, "regions_class_order": [1, 2]})["architecture"]["arch_kwargs"]["sigmoid"] is True
    ignored = {**LABELS, "labels": {"background": 0, "a": 1, "ignore": 2}}
    assert edited(dataset=ignored)["architecture"]["arch_kwargs"]["sigmoid"] is False


def test_what_cannot_work_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"configuration 2d has the patch size \[512, 512\]: train 3d_fullres"):
        edited("2d")
    plans = stock_plans()
    plans["configurations"]["3d_fullres"]["architecture"] = architecture([[1, 1, 1]], [32])
    with pytest.raises(ValueError, match="too small for SparseTrainer: the plan has one resolution"):
        edited(plans=plans)
    del plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["strides"]
    with pytest.raises(ValueError, match="states no strides: use plans of nnU-Net's own planners"):
        edited(plans=plans)


# --- the network and the trainer


@pytest.mark.slow
def test_nnunet_builds_the_network_from_the_edited_plans():
    manager = PlansManager({**stock_plans(), "configurations": {"3d_fullres": edited()}}).get_configuration(
        "3d_fullres"
    )
    entry = (manager.network_arch_class_name, manager.network_arch_init_kwargs)
    network = get_network_from_plans(*entry, manager.network_arch_init_kwargs_req_import, 2, 3, deep_supervision=True)
    assert isinstance(network, CoarseToSparsePlansUNet)
    assert network.coarse.channels == (32, 64, 128, 256)
    assert network.coarse_factor == (2, 2, 2)
    x = torch.rand(1, 2, 24, 24, 16)
    assert [tuple(y.shape) for y in network.eval()(x)] == [(1, 3, 24, 24, 16), (1, 3, 12, 12, 8)]
    network.decoder.deep_supervision = False  # what the stock trainer does before it predicts
    assert network(x).shape == (1, 3, 24, 24, 16)
    assert torch.compile(network)(x).shape == (1, 3, 24, 24, 16)  # the stock trainer compiles: left as it is


@pytest.mark.parametrize(
    ("strides", "features"),
    [([[1, 1, 1]], [8]), ([[2, 2, 2], [2, 2, 2]], [8, 8]), (STRIDES, [8, 8]), ([[1, 1], [2, 2]], [8, 8])],
)
def test_plans_without_a_pyramid_are_refused_by_the_network(strides, features):
    with pytest.raises(ValueError, match=r"strides must name two or more 3D stages, the first one \[1, 1, 1\]"):
        CoarseToSparsePlansUNet(1, 2, strides, features)


def test_every_parameter_takes_part_in_every_step_of_ddp(tmp_path):
    network = CoarseToSparsePlansUNet(1, 2, STRIDES[:3], [4, 4, 4])
    last = [module for module in network.coarse.modules() if isinstance(module, torch.nn.Conv3d)][-1]
    with torch.no_grad():  # sure background everywhere: no voxel is active
        last.bias[0] += 100
    coarse_logits = network.both_logits(torch.rand(1, 1, 16, 16, 16))[1]
    assert not network.active_cells(coarse_logits, (16, 16, 16)).any()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(network)
        for _ in range(3):
            sum(logits.sum() for logits in parallel(torch.rand(1, 1, 16, 16, 16))).backward()
    finally:
        torch.distributed.destroy_process_group()


def test_a_dataset_too_small_for_five_folds_is_refused_with_the_way_out(monkeypatch):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    trainer = nnunet_plugins.SparseTrainer.__new__(nnunet_plugins.SparseTrainer)
    trainer.fold, trainer.dataset_json, trainer.preprocessed_dataset_folder_base = 0, {"numTraining": 1}, "/data/D"
    monkeypatch.setattr(nnUNetTrainer, "do_split", lambda self: generate_crossval_split(["c_000"]))
    with pytest.raises(
        ValueError, match=r"fold 0 .* for 1 training cases: train with fold `all`, or write /data/D/spl"
    ):
        trainer.do_split()


def test_the_trainer_can_be_pickled_and_has_nnunets_signature():
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    trainer = nnunet_plugins.SparseTrainer
    assert pickle.loads(pickle.dumps(trainer)) is trainer
    assert list(inspect.signature(trainer.__init__).parameters) == list(
        inspect.signature(nnUNetTrainer.__init__).parameters
    )
