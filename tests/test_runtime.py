"""What is chosen for the hardware, what is refused, and that nothing random has to be remembered."""

import os

import pytest
import torch

from bertling import runtime
from bertling.files import BertlingError
from bertling.runtime import Runtime, build_runtime, can_compile, choose_dtype, compile_pays, step_seed
from bertling.settings import Settings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "AMD Zen 4"}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ],
)
def test_auto_takes_bf16_only_where_the_hardware_multiplies_it_faster(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert choose_dtype("auto", CPU) == expected


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"avx512_vnni": True}, "cpu, 1 threads, int8 and fp32, eager"),
        ({"avx_vnni": True, "avx512_bf16": True, "cpu_name": "AMD Zen 5"}, "cpu, 1 threads, int8 and bf16, eager"),
        ({"avx512_vnni": True, "amx_bf16": True}, "cpu, 1 threads, bf16, eager"),
        ({"avx512_f": True}, "cpu, 1 threads, fp32, eager"),
    ],
)
def test_int8_is_taken_only_where_it_is_the_fastest_format(
    monkeypatch: pytest.MonkeyPatch, has: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    chosen = build_runtime(Settings(device="cpu", dtype="int8", threads=1))
    assert chosen.describe() == expected
    assert chosen.int8 == ("int8" in expected)
    assert [note[:42] for note in chosen.notes] == (
        [] if chosen.int8 else ["dtype = int8 is for CPUs with instructions"]
    )


@pytest.mark.parametrize(("has", "slow"), [("avx512_bf16", False), ("bf16", False), ("avx2", True)])
def test_a_number_format_that_is_named_is_taken(monkeypatch: pytest.MonkeyPatch, has: str, slow: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    chosen = build_runtime(Settings(device="cpu", dtype="bf16", threads=1))
    assert (chosen.device, chosen.dtype, chosen.compile) == (CPU, torch.bfloat16, False)
    assert chosen.describe() == "cpu, 1 threads, bf16, eager"
    assert [note[:52] for note in chosen.notes] == ["dtype = bf16: this CPU has no fast instructions for "] * slow
    with chosen.autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with Runtime(CPU, torch.float32, False).autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_a_process_gets_its_share_of_the_cores() -> None:
    build_runtime(Settings(device="cpu", dtype="fp32"), local_processes=1000)
    assert torch.get_num_threads() == 1


def test_the_cores_are_shared_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(runtime, "available_cores", lambda: 8)
    try:
        for processes, threads in ((2, 4), (1, 8), (3, 2)):
            build_runtime(Settings(device="cpu", dtype="fp32"), local_processes=processes)
            assert torch.get_num_threads() == threads
        build_runtime(Settings(device="cpu", dtype="fp32", threads=3), local_processes=2)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_what_a_machine_cannot_do_is_refused() -> None:
    with pytest.raises(BertlingError, match="dtype = fp16: a CPU trains in bf16 or fp32; choose one of these or auto"):
        build_runtime(Settings(device="cpu", dtype="fp16", threads=1))


def test_a_device_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BertlingError, match="device = cuda: torch finds none here; it has cpu"):
        build_runtime(Settings(device="cuda"))


def test_a_process_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BertlingError, match=r"nproc: process 1 has no GPU of its own \(1 here\); lower nproc"):
        build_runtime(Settings(), local_rank=1)


def test_without_a_compiler_the_model_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "can_compile", lambda device: False)
    chosen = build_runtime(Settings(device="cpu", dtype="fp32", compile="true", threads=1))
    assert not chosen.compile
    assert "no C++ compiler was found" in chosen.notes[0]
    monkeypatch.setattr(runtime, "can_compile", lambda device: True)
    assert build_runtime(Settings(device="cpu", dtype="fp32", compile="true", threads=1)).compile
    assert torch.are_deterministic_algorithms_enabled()  # so that a resumed run is equal to the bit
    torch.use_deterministic_algorithms(False)


def test_the_compiler_is_the_one_that_torch_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not can_compile(torch.device("cpu"))
    monkeypatch.setenv("CXX", os.path.realpath("/bin/sh"))
    assert can_compile(torch.device("cpu"))


def test_compiling_is_worth_it_only_in_long_runs_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    assert compile_pays(Settings(max_iters=60_000), gpu)
    assert not compile_pays(Settings(max_iters=100), gpu)
    assert compile_pays(Settings(max_minutes=60.0), gpu)
    assert not compile_pays(Settings(max_iters=60_000), CPU)
    assert not compile_pays(Settings(task_type="sst2", max_iters=60_000), gpu)  # each length is compiled anew


def test_each_step_and_process_has_a_dropout_seed_of_its_own() -> None:
    seeds = [step_seed(seed, step, rank) for seed in (0, 1, 123) for step in range(1000) for rank in range(4)]
    assert len(set(seeds)) > 0.999 * len(seeds)
    assert step_seed(123, 7, 1) == step_seed(123, 7, 1)
    assert all(0 <= seed < 2**31 for seed in seeds)
