"""Packing codes into words: by hand, and the Triton kernel (in its interpreter on a CPU) against the torch twin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_paths import ALL_PATHS, KERNELS, Path
from workbench_kernels import pack, unpack, unpack_float

CPU = Path("cpu", False)


def codes_of(shape: tuple[int, ...], bits: int, seed: int = 0, path: Path = CPU) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator).to(path.device)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize(
    "codes, bits, word",
    [
        ([0, 1, 2, 3] * 4, 2, -454761244),  # 0xE4E4E4E4
        (list(range(8)), 4, 0x76543210),
        (list(range(15, 7, -1)), 4, -1985229329),  # 0x89ABCDEF: a negative word
        ([1, 2, 3, 255], 8, -16580095),  # 0xFF030201
    ],
)
def test_words_by_hand(codes: list[int], bits: int, word: int, path: Path) -> None:
    packed = pack(torch.tensor(codes, dtype=torch.uint8, device=path.device), bits, kernel=path.kernel)
    assert packed.tolist() == [word]
    assert unpack(packed, bits, kernel=path.kernel).tolist() == codes


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (257,), (2, 1, 3, 7), (1024,)], ids=str)
def test_the_kernel_equals_the_twin(shape: tuple[int, ...], bits: int, path: Path) -> None:
    codes = codes_of((*shape[:-1], shape[-1] * 32 // bits), bits, path=path)
    words = pack(codes, bits, kernel=True)
    assert words.dtype == torch.int32 and torch.equal(words, pack(codes, bits, reference=True))
    assert torch.equal(unpack(words, bits, kernel=True), codes)
    assert torch.equal(unpack(words, bits, reference=True), codes)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_transposed_input_is_read_in_its_own_order(bits: int, path: Path) -> None:
    codes = codes_of((32, 6), bits, path=path).T
    assert torch.equal(unpack(pack(codes, bits, kernel=path.kernel).T.contiguous().T, bits, kernel=path.kernel), codes)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([2, 4, 8]), st.integers(0, 9), st.integers(1, 4), st.integers(0, 999))
def test_unpacking_gives_back_what_was_packed(bits: int, words: int, rows: int, seed: int) -> None:
    codes = codes_of((rows, words * 32 // bits), bits, seed)
    packed = pack(codes, bits)
    assert packed.shape == (rows, words) and torch.equal(unpack(packed, bits), codes)


def test_wrong_inputs_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="bits must be one of"):
        pack(codes_of((32,), 2), 3)
    with pytest.raises(ValueError, match="uint8 codes, got"):
        pack(torch.zeros(32), 2)
    with pytest.raises(ValueError, match="multiple of 16 codes"):
        pack(codes_of((17,), 2), 2)
    with pytest.raises(ValueError, match="int32 words, got"):
        unpack(codes_of((32,), 2), 2)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unpacking_to_floats_is_unpacking(bits: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (3, 5), generator=torch.Generator().manual_seed(bits)).to(torch.int32)
    floats = unpack_float(words, bits)
    assert floats.dtype == torch.float32
    assert torch.equal(floats, unpack(words, bits).float())
