"""measure_peak against allocations counted by hand: what counts, how meters nest, which devices there are."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from monai_memeff.memory import measure_peak

KIB = 1024


def kib(count: int) -> Tensor:
    """A new tensor of ``count`` KiB."""
    return torch.zeros(count * KIB // 4)


@pytest.mark.slow
def test_nothing_counts_nothing() -> None:
    with measure_peak() as meter:
        pass
    assert (meter.peak_bytes, meter.live_bytes) == (0, 0)


@pytest.mark.slow
def test_a_sequence_counted_by_hand() -> None:
    with measure_peak() as meter:
        first = kib(8)
        second = kib(4)  # 12
        del first  # 4
        third = kib(6)  # 10
        assert meter.live_bytes == 10 * KIB
        third = torch.cat((second, third))  # 20 while the old third lives, then 14
        assert meter.live_bytes == 14 * KIB
    assert meter.peak_bytes == 20 * KIB
    assert meter.live_bytes == 14 * KIB
    del second, third
    assert meter.live_bytes == 14 * KIB, "the numbers stand still after exit"


@pytest.mark.slow
def test_freed_temporaries_do_not_add_up() -> None:
    x = kib(4)
    with measure_peak() as meter:
        for _ in range(5):
            (x + 1).mul(2).sum().item()
    assert meter.peak_bytes == 8 * KIB
    assert meter.live_bytes == 0


@pytest.mark.slow
def test_views_and_in_place_operations_count_nothing() -> None:
    x = kib(4)
    with measure_peak() as meter:
        kept = [x[3:], x.view(2, -1).T, x.unfold(0, 5, 1), x.detach(), x.expand(7, -1)]
        x.add_(1).relu_()
        x[::2] = 3
        torch.mul(x, 2, out=x)
    assert len(kept) == 5
    assert meter.peak_bytes <= 4, "at most the number 3 as a tensor"


@pytest.mark.slow
def test_a_view_keeps_its_whole_storage_alive() -> None:
    with measure_peak() as meter:
        last = kib(4)[-1:]
        assert meter.live_bytes == 4 * KIB
        del last
    assert meter.live_bytes == 0


@pytest.mark.parametrize("touched", [True, False], ids=["used inside", "never used inside"])
@pytest.mark.slow
def test_freeing_an_older_tensor_lowers_the_level(touched: bool) -> None:
    older = kib(8)
    with measure_peak() as meter:
        if touched:
            older.add_(1)
        del older
        assert meter.live_bytes == -8 * KIB
        newer = kib(6)
    assert newer.numel()
    assert (meter.peak_bytes, meter.live_bytes) == (0, -2 * KIB)


@pytest.mark.slow
def test_resized_storages() -> None:
    with measure_peak() as meter:
        x = kib(4)
        x.resize_(2 * KIB)  # 8 KiB
        assert meter.live_bytes == 8 * KIB
        x.untyped_storage().resize_(0)
        assert meter.live_bytes == 0
        x.untyped_storage().resize_(8 * KIB)
        torch.add(kib(1), 1, out=(y := torch.empty(0)))
        assert meter.live_bytes == 9 * KIB
        del x, y
    assert meter.live_bytes == 0
    assert "resize_" not in vars(torch.UntypedStorage), "torch is left as it was found"


@pytest.mark.slow
def test_tensors_that_no_operation_makes() -> None:
    with measure_peak() as meter:
        listed = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        assert meter.live_bytes == 24
        copied = copy.deepcopy(listed)
        assert meter.live_bytes == 48
        shared = torch.from_numpy(np.zeros(KIB)) + 0  # numpy's own memory does not count, the sum does
        assert meter.live_bytes == 48 + 8 * KIB
        del copied, shared
    assert meter.live_bytes == 24


@pytest.mark.slow
def test_sparse_tensors_count_indices_and_values() -> None:
    with measure_peak() as meter:
        sparse = torch.eye(16).to_sparse()
        assert meter.live_bytes == 16 * 4 + 2 * 16 * 8
        rows = sparse.to_sparse_csr()
        del sparse
    parts = (rows.crow_indices(), rows.col_indices(), rows.values())  # the columns are a view of both index rows
    assert meter.live_bytes == sum(part.untyped_storage().nbytes() for part in parts)


@pytest.mark.slow
def test_old_garbage_is_gone_before_entry() -> None:
    """Collected inside it would lower the level, and hide as much of the peak."""
    gc.disable()
    try:
        circle: list[object] = [kib(64)]
        circle.append(circle)
        del circle
        with measure_peak() as meter:
            kept = kib(8)
            gc.collect()
            assert meter.live_bytes == meter.peak_bytes == kept.nbytes
    finally:
        gc.enable()


@pytest.mark.slow
def test_an_inner_meter_collects_nothing() -> None:
    """It would free what a run without it still holds."""
    gc.disable()
    try:
        with measure_peak() as outer:
            circle: list[object] = [kib(8)]
            circle.append(circle)
            del circle
            with measure_peak() as inner:
                assert (outer.live_bytes, inner.live_bytes) == (8 * KIB, 0)
    finally:
        gc.enable()
    gc.collect()


@pytest.mark.slow
def test_nested_meters() -> None:
    with measure_peak() as outer:
        first = kib(4)
        with measure_peak() as inner:
            second = kib(2)
            del first
            third = kib(1)
        assert (inner.peak_bytes, inner.live_bytes) == (2 * KIB, -1 * KIB)
        fourth = kib(1)
    assert outer.peak_bytes == 6 * KIB
    assert outer.live_bytes == second.nbytes + third.nbytes + fourth.nbytes


@pytest.mark.slow
def test_an_exception_leaves_nothing_broken() -> None:
    meter = measure_peak()

    def fail_inside() -> None:
        with meter:
            kib(4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert meter.peak_bytes == 4 * KIB
    assert "resize_" not in vars(torch.UntypedStorage)
    with meter:  # the same meter starts afresh
        kib(1)
    assert meter.peak_bytes == 1 * KIB


@pytest.mark.slow
def test_one_meter_cannot_run_twice_at_once() -> None:
    with measure_peak() as meter, pytest.raises(RuntimeError, match="nest a second"), meter:
        pass


class Recorder(TorchDispatchMode):
    """Another dispatch mode, which counts operations."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_beside_another_dispatch_mode() -> None:
    with Recorder() as around, measure_peak() as meter, Recorder() as within:
        kept = kib(4) + kib(4)
    assert kept.nbytes == 4 * KIB
    assert meter.peak_bytes == 12 * KIB
    assert around.count == within.count == 3


@pytest.mark.slow
def test_int_and_half_types_count_their_own_bytes() -> None:
    with measure_peak() as meter:
        kept = [torch.zeros(1000, dtype=dtype) for dtype in (torch.bool, torch.float16, torch.int64)]
    assert meter.live_bytes == sum(tensor.nbytes for tensor in kept) == 1000 * (1 + 2 + 8)


@pytest.mark.slow
def test_wrapper_subclasses_count_what_they_wrap() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with measure_peak() as meter:
        pair = TwoTensor(kib(1), kib(1)) * 2
    assert meter.live_bytes == 2 * KIB
    assert pair.shape == (256,)


@pytest.mark.slow
def test_the_cpu_meter_starts_no_cuda() -> None:
    was_started = torch.cuda.is_initialized()
    with measure_peak("cpu"):
        kib(1)
    assert torch.cuda.is_initialized() == was_started


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="'cpu' and 'cuda', got 'meta'"):
        measure_peak("meta")


def test_absent_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no CUDA device"):
        measure_peak("cuda:0")


class PretendAllocator:
    """The three numbers of CUDA's allocator that a meter uses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.highest = 0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.highest)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "highest", self.now))

    def take(self, count: int) -> None:
        self.now += count
        self.highest = max(self.highest, self.now)


@pytest.mark.slow
def test_the_cuda_meters_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = PretendAllocator(monkeypatch)
    allocator.take(100)
    with measure_peak("cuda") as outer:
        allocator.take(50)
        allocator.take(-40)
        with measure_peak("cuda") as inner:
            allocator.take(20)
            allocator.take(-30)
            assert inner.peak_bytes == 20
        assert outer.live_bytes == 0
        assert outer.peak_bytes == 50
    allocator.take(1000)
    assert (outer.peak_bytes, inner.peak_bytes, inner.live_bytes) == (50, 20, -10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_blocks_of_its_allocator() -> None:
    with measure_peak("cuda") as meter:
        first = torch.zeros(1 << 20, device="cuda")
        with measure_peak("cuda") as inner:
            second = first + 1
            del first
    assert inner.peak_bytes == second.nbytes
    assert (meter.peak_bytes, meter.live_bytes) == (8 << 20, 4 << 20)


def test_meters_of_threads_end_in_any_order() -> None:
    before = vars(torch.UntypedStorage).get("resize_")
    first, second = measure_peak(), measure_peak()
    storage = torch.UntypedStorage(0)
    with ThreadPoolExecutor(1) as other:
        first.__enter__()
        other.submit(second.__enter__).result()
        first.__exit__(None, None, None)
        other.submit(lambda: [torch.empty(0).set_(storage), storage.resize_(800)]).result()
        other.submit(second.__exit__, None, None, None).result()
    assert second.peak_bytes == 800
    assert vars(torch.UntypedStorage).get("resize_") is before
