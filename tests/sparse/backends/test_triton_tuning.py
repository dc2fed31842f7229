"""The choice of block sizes: timed once, remembered over processes, and never in the way when the file is bad."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with the extra [triton], on Linux")

from monai_memeff.sparse.backends.triton import kernels, launch, tuning
from monai_memeff.sparse.backends.triton.tuning import Blocks
from tests.sparse.backends.cases import convolution

OPTIONS = [Blocks(64, 16, 16, 4, 3), Blocks(32, 16, 16, 4, 2), Blocks(128, 16, 16, 8, 3)]


class Stopwatch:
    """Says how long each option takes, and counts what it was asked."""

    def __init__(self, milliseconds: dict[Blocks, float]) -> None:
        self.milliseconds, self.asked, self.running = milliseconds, 0, OPTIONS[0]

    def run(self, option: Blocks) -> None:
        self.running = option
        if option not in self.milliseconds:
            raise RuntimeError("out of shared memory")

    def __call__(self, call: Callable[[], object]) -> float:
        self.asked += 1
        call()
        return self.milliseconds[self.running]

    def choose(self, key: str = "k", options: list[Blocks] = OPTIONS, worth_timing: bool = True) -> Blocks:
        return tuning.choose(key, options, self.run, worth_timing, self)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own, in the file and in the process."""
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(tmp_path / "deep" / "choices.json"))
    monkeypatch.setattr(tuning, "_choices", {})
    return tmp_path / "deep" / "choices.json"


def forget() -> None:
    """As a new process would find it."""
    tuning._choices.clear()


def test_the_fastest_is_chosen_once_and_remembered(cache: Path) -> None:
    watch = Stopwatch({OPTIONS[0]: 3.0, OPTIONS[1]: 1.0, OPTIONS[2]: 2.0})
    assert watch.choose() == OPTIONS[1]
    assert watch.choose() == OPTIONS[1]
    assert watch.asked == 3
    forget()
    assert Stopwatch({}).choose() == OPTIONS[1]
    assert set(json.loads(cache.read_text())["choices"]) == {"k"}
    assert Stopwatch({OPTIONS[2]: 1.0}).choose("another") == OPTIONS[2]
    assert set(json.loads(cache.read_text())["choices"]) == {"k", "another"}
    assert [file.name for file in cache.parent.iterdir()] == [cache.name], "no temporary file is left"


def test_options_that_do_not_run_are_passed_over() -> None:
    assert Stopwatch({OPTIONS[2]: 5.0}).choose() == OPTIONS[2]
    with pytest.raises(RuntimeError, match="none of 3 block sizes runs on this device") as failure:
        Stopwatch({}).choose("another")
    assert "shared memory" in str(failure.value.__cause__)


def test_small_problems_are_not_timed(cache: Path) -> None:
    watch = Stopwatch({})
    assert watch.choose(worth_timing=False) == OPTIONS[0]
    assert not cache.exists()
    Stopwatch({OPTIONS[1]: 1.0}).choose()
    assert watch.choose(worth_timing=False) == OPTIONS[1], "what is known is used"


def test_a_remembered_choice_must_be_an_option() -> None:
    """Another version may have had other candidates."""
    Stopwatch({OPTIONS[0]: 1.0}).choose()
    for clean in (lambda: None, forget):
        clean()
        assert Stopwatch({OPTIONS[2]: 1.0}).choose(options=OPTIONS[1:]) == OPTIONS[2]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 0, "choices": {"k": [32, 16, 16, 4, 2]}}', '{"format": 1}',
     '{"format": 1, "choices": {"k": [1]}}', '{"format": 1, "choices": {"k": "x"}}', "\x00\xff"],
)  # fmt: skip
def test_a_broken_file_is_ignored_and_replaced(content: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(content, encoding="latin-1")
    assert Stopwatch({OPTIONS[0]: 3.0, OPTIONS[2]: 2.0}).choose() == OPTIONS[2]
    assert json.loads(cache.read_text())["choices"] == {"k": [128, 16, 16, 8, 3]}


def test_a_place_that_cannot_be_written_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file" / "choices.json", tmp_path):
        forget()
        monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, str(place))
        watch = Stopwatch({OPTIONS[1]: 1.0})
        assert watch.choose() == watch.choose() == OPTIONS[1]
        assert watch.asked == 3


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tuning.ENVIRONMENT_VARIABLE, "off")
    assert tuning.cache_file() is None
    assert Stopwatch({}).choose() == OPTIONS[0]


def test_the_usual_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(tuning.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.cache_file() == tmp_path / "monai_memeff" / "triton.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_file() == tmp_path / ".cache" / "monai_memeff" / "triton.json"


def _write_many(place: str, writer: int) -> None:
    for number in range(20):
        tuning._write(Path(place), f"{writer}-{number}", OPTIONS[writer % 3])


@pytest.mark.slow
def test_many_processes_may_write(cache: Path) -> None:
    """The file can be read at any time; a writer may lose another's line, which is then timed again."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(str(cache), number)) for number in range(3)]
    for process in writers:
        process.start()
    while any(process.is_alive() for process in writers):
        if cache.exists():
            json.loads(cache.read_text())
    for process in writers:
        process.join()
        assert process.exitcode == 0
    assert len(tuning._read(cache)) >= 20
    assert [file.name for file in cache.parent.iterdir()] == [cache.name]


def test_what_decides_the_shared_memory_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice that fits for 20 channels, which are loaded in other pieces, must not be trusted for 32."""
    features, kernel_map = torch.zeros(5, 20), convolution(3).kernel_map
    keys = [launch._key("multiply", features, kernel_map, channels, 32) for channels in (20, 32)]
    monkeypatch.setattr(kernels, "VERSION", "another")
    keys.append(launch._key("multiply", features, kernel_map, 20, 32))
    keys.append(launch._key("multiply", features.half(), kernel_map, 20, 32))
    assert len(set(keys)) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_fit_the_channels(dtype: torch.dtype) -> None:
    for channels in (1, 16, 33, 128, 500):
        for option in tuning.candidates(channels, channels, dtype):
            assert option.columns <= max(16, 2 * channels)
            assert option.depth <= max(16, 2 * channels)
            for size in (option.rows, option.columns, option.depth):
                assert size >= 16
                assert size & (size - 1) == 0
    assert [tuning.rounded(channels) for channels in (1, 16, 17, 33, 64)] == [16, 16, 32, 64, 64]
