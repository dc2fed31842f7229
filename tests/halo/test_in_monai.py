"""The inferer in the place of MONAI's `SimpleInferer`: evaluators, ensembles and diffusion sampling give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.engines import EnsembleEvaluator, SupervisedEvaluator
from monai.inferers import DiffusionInferer, SimpleInferer
from monai.networks.nets import BasicUNet, DiffusionModelUNet
from monai.networks.schedulers import DDIMScheduler
from monai.utils.enums import CommonKeys
from torch import nn

from monai_memeff.halo import SpatialPartitionInferer

LOADER = [{CommonKeys.IMAGE: torch.randn(1, 1, 35, 32, 32), CommonKeys.LABEL: torch.zeros(1)} for _ in range(2)]


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return BasicUNet(3, 1, 2, features=(4, 4, 4, 8, 8, 4), dropout=0.0)


def predictions(inferer: Any, mode: str) -> torch.Tensor:
    evaluator = SupervisedEvaluator(
        torch.device("cpu"), LOADER, network(0), inferer=inferer, mode=mode, decollate=False
    )
    evaluator.run()
    found: torch.Tensor = evaluator.state.output[CommonKeys.PRED]
    return found


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.slow
def test_an_evaluator_predicts_the_same(mode: str) -> None:
    expected = predictions(SimpleInferer(), mode)
    torch.testing.assert_close(predictions(SpatialPartitionInferer(3), mode), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_an_ensemble_predicts_the_same() -> None:
    found = []
    for inferer in (SimpleInferer(), SpatialPartitionInferer(3)):
        networks = [network(0), network(1)]
        evaluator = EnsembleEvaluator(
            torch.device("cpu"), LOADER, networks, ["one", "two"], inferer=inferer, decollate=False
        )
        evaluator.run()
        found.append([evaluator.state.output[key] for key in ("one", "two")])
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)
    assert not torch.equal(found[0][0], found[0][1])


@pytest.mark.slow
def test_diffusion_samples_the_same() -> None:
    torch.manual_seed(0)
    unet = DiffusionModelUNet(
        3, 1, 1, num_res_blocks=1, channels=(8, 8), attention_levels=(False, False), norm_num_groups=4
    ).eval()  # fmt: skip
    noise, found = torch.randn(1, 1, 12, 8, 8), []
    for inferer in (SimpleInferer(), SpatialPartitionInferer(3)):
        scheduler = DDIMScheduler(num_train_timesteps=10)
        scheduler.set_timesteps(num_inference_steps=3)

        def denoise(x: torch.Tensor, timesteps: Any, context: Any = None, inferer: Any = inferer) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = inferer(x, unet, timesteps=timesteps, context=context)
            return found

        diffusion = DiffusionInferer(scheduler)
        found.append(diffusion.sample(noise, denoise, scheduler, verbose=False))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)
