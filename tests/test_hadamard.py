"""The Hadamard transform: the RotateKV card by hand, its laws, and matrix and kernel against the butterflies."""

from __future__ import annotations

import pytest
import torch

from tests.kernel_paths import ALL_PATHS, COMPILED, TWIN, Path
from workbench_kernels import hadamard

DTYPES = [
    *(pytest.param(*path.values, torch.float32, 1e-5, marks=path.marks) for path in ALL_PATHS),
    *(pytest.param(*path.values, torch.float16, 2e-3, marks=path.marks) for path in ALL_PATHS),
    # Triton's interpreter cannot multiply bfloat16
    *(pytest.param(*path.values, torch.bfloat16, 2e-2, marks=path.marks) for path in (TWIN, COMPILED)),
]


def numbers(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def test_the_cards_example() -> None:
    k = torch.tensor([[8.0, 1, -1, 0], [6, 0, 2, -1]])
    for reference in (True, False):
        turned = hadamard(k, reference=reference)
        assert turned.tolist() == [[4, 3, 5, 4], [3.5, 4.5, 2.5, 1.5]]
        assert torch.equal(hadamard(turned, reference=reference), k)


@pytest.mark.parametrize("path, dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", [(1, 32), (3, 5, 64), (33, 96), (2, 7, 128), (1, 40, 80), (31, 256)], ids=str)
def test_matrix_and_kernel_equal_the_butterflies(
    shape: tuple[int, ...], path: Path, dtype: torch.dtype, tolerance: float
) -> None:
    x = numbers(*shape, device=path.device).to(dtype)
    found, expected = hadamard(x, kernel=path.kernel), hadamard(x, reference=True)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize("width", [32, 64, 96, 128, 256])
def test_lengths_stay_and_twice_gives_the_same_back(width: int, path: Path) -> None:
    x = numbers(11, width, device=path.device)
    turned = hadamard(x, kernel=path.kernel)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hadamard(turned, kernel=path.kernel), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ALL_PATHS)
def test_one_large_channel_is_spread_evenly(path: Path) -> None:
    x = torch.zeros(1, 64, device=path.device)
    x[0, 5] = 8.0
    assert torch.equal(hadamard(x, kernel=path.kernel).abs(), torch.ones(1, 64, device=path.device))


@pytest.mark.parametrize("path", ALL_PATHS)
def test_blocks_are_transformed_apart_and_a_transposed_input_is_read_in_its_own_order(path: Path) -> None:
    x = numbers(64, 6, device=path.device).T
    found = hadamard(x, block=16, kernel=path.kernel)
    for n in range(4):
        part = x[:, 16 * n : 16 * n + 16]
        torch.testing.assert_close(found[:, 16 * n : 16 * n + 16], hadamard(part, reference=True), atol=1e-5, rtol=0)


def test_several_heads_at_once_need_no_matrix() -> None:
    x = numbers(3, 1024)
    torch.testing.assert_close(hadamard(hadamard(x)), x, atol=1e-5, rtol=1e-5)


def test_nothing_to_transform_and_wrong_blocks() -> None:
    assert hadamard(torch.empty(0, 64)).shape == (0, 64)
    for block in (3, 48, 128, 0):
        with pytest.raises(ValueError, match="a power of two that divides 96"):
            hadamard(torch.zeros(2, 96), block)
    with pytest.raises(ValueError, match="blocks of 16 to 256"):
        hadamard(torch.zeros(2, 512), kernel=True)
