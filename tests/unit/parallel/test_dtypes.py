"""``auto`` is bfloat16 only where this machine multiplies it fast."""

import pytest
import torch

from megatron_amrlhf.parallel import dtypes
from megatron_amrlhf.parallel.dtypes import DtypeChoice, bfloat16_factor, own_choice, slowest

PROCESSORS = {
    "avx2": ("flags\t\t: fpu sse2 avx2 fma", None),
    "avx512": ("flags\t\t: fpu avx2 avx512f avx512_vnni", None),
    "avx512-bf16": ("processor : 0\nflags\t\t: fpu avx512f avx512_bf16", "AVX512-BF16"),
    "amx": ("flags\t\t: avx512_bf16 amx_bf16 amx_tile", "AMX"),
    "arm": ("Features\t: fp asimd i8mm bf16", "Arm's BF16"),
    "name only": ("model name\t: avx512_bf16 engine", None),
}


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_is_known_by_its_flags(tmp_path, name):
    text, instructions = PROCESSORS[name]
    file = tmp_path / "cpuinfo"
    file.write_text(text + "\n")
    assert dtypes.instructions(file) == instructions
    choice = own_choice(file, factor=lambda: 0.5)
    assert choice.dtype == ("float32" if instructions is None else "bfloat16")
    assert (instructions or "no bfloat16 instructions") in choice.why


def test_flags_are_confirmed_by_a_product(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("flags : avx512_bf16\n")
    slow = own_choice(file, factor=lambda: 8.24)
    assert slow.dtype == "float32" and "take 8.2 times as long" in slow.why


def test_without_flags_nothing_is_measured(tmp_path):
    def measure() -> float:
        raise AssertionError("takes seconds on such a machine")

    assert own_choice(tmp_path / "none", factor=measure).dtype == "float32"


@pytest.mark.parametrize("has_it", [True, False])
def test_a_gpu_is_asked(monkeypatch, has_it):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_it)
    assert own_choice().dtype == ("bfloat16" if has_it else "float32")


def test_all_ranks_take_what_the_slowest_machine_wants():
    fast, slow = DtypeChoice("bfloat16", "fast"), DtypeChoice("float32", "slow")
    assert slowest([fast, slow, fast]) == slow
    assert slowest([fast, fast]) == fast


def test_the_factor_is_measured_and_threads_are_as_before():
    threads = torch.get_num_threads()
    factor = bfloat16_factor(seconds=0.001)
    assert factor > 0 and torch.get_num_threads() == threads
