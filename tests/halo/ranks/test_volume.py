"""Volumes are cut into parts and put together again, whatever their size."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from monai.data import MetaTensor

from monai_memeff.halo.run.ranks.comm.mesh import HaloMesh
from monai_memeff.halo.run.ranks.comm.process_group import init_mesh
from monai_memeff.halo.run.ranks.parts import part_of
from monai_memeff.halo.run.ranks.volume import gather, scatter
from tests.halo.ranks.threads import run_ranks


@pytest.mark.parametrize(("spatial", "axes"), [((3,), None), ((2,), (2,)), ((2, 2), None), ((2, 3), (2, 0))])
@pytest.mark.parametrize("src", [None, 1])
def test_there_and_back(spatial: Sequence[int], axes: Sequence[int] | None, src: int | None) -> None:
    whole = torch.randn(2, 3, 7, 5, 4)

    def work(mesh: HaloMesh) -> tuple[torch.Tensor, torch.Tensor, torch.Size]:
        part = scatter(whole if src in (None, mesh.comm.rank) else None, mesh, src)
        found = part_of(part)
        assert found is not None
        assert found.shape == whole.shape
        return gather(part, mesh), gather({"a": [part * 2]}, mesh)["a"][0], part.shape

    results = run_ranks(work, spatial, axes)
    for same, double, _ in results:
        assert torch.equal(same, whole)
        assert torch.equal(double, whole * 2)  # a computed tensor has no mark; its shapes tell
    assert sum(shape.numel() for *_, shape in results) == whole.numel()


def test_fewer_rows_than_parts_leave_empty_parts() -> None:
    whole = torch.randn(1, 1, 2, 3, 3)
    for src in (None, 0):
        results = run_ranks(lambda mesh, src=src: (p := scatter(whole, mesh, src), gather(p, mesh)), (3,))
        assert sorted(part.shape[2] for part, _ in results) == [0, 1, 1]
        assert all(torch.equal(back, whole) for _, back in results)


def test_what_does_not_fit_is_refused_on_every_rank() -> None:
    with pytest.raises(ValueError, match="has no volume"):
        run_ranks(lambda mesh: scatter(None, mesh, 0))
    with pytest.raises(ValueError, match="splits spatial axes"):
        run_ranks(lambda mesh: scatter(torch.zeros(1, 1, 4, 4), mesh), (2,), (2,))
    with pytest.raises(ValueError, match="lacks spatial axis"):
        run_ranks(lambda mesh: gather(torch.zeros(2, 3), mesh))
    with pytest.raises(ValueError, match="not split"):
        run_ranks(lambda mesh: gather(torch.zeros(1, 1, 4, 4 + mesh.comm.rank), mesh))


def test_one_process_is_a_mesh_of_one_part() -> None:
    mesh, image = init_mesh(spatial=(1,)), MetaTensor(torch.randn(1, 1, 4, 4, 4))
    assert torch.equal(gather(scatter(image, mesh), mesh), image.as_tensor())
    with pytest.raises(RuntimeError, match="torchrun"):
        init_mesh(spatial=(2,))
