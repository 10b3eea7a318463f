"""Mustafar's bitmap format and attention over it: the card by hand, laws, and both paths against the definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernel_paths import ALL_PATHS, COMPILED, TWIN, Path
from workbench_kernels import Sparse, compress, sparse_attention, sparse_attention_reference
from workbench_kernels.sparse import bitmaps_of, bits_of, tiles_of

TOP = -(1 << 63)


def pruned(heads: int, entries: int, width: int, density: float = 0.5, seed: int = 0, batch: int = 1) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, entries, width, generator=made)
    return x * (torch.rand(x.shape, generator=made) < density)


def on(sparse: Sparse, path: Path) -> Sparse:
    return Sparse(*(x.to(path.device) for x in sparse[:3]), *sparse[3:])


def test_the_cards_tile() -> None:
    x = torch.zeros(1, 1, 64, 64)
    x[0, 0, 0, 0], x[0, 0, 3, 0], x[0, 0, 63, 0] = 1.5, -2.0, 0.25  # one channel: the first tile of keys
    for of_keys, tile in ((True, x), (False, x.transpose(2, 3))):
        bitmaps, offsets, numbers = compress(tile, of_keys)[:3]
        assert bitmaps.shape == offsets.shape == (1, 1, 1, 64)
        assert bitmaps.flatten()[0].item() == -8070450532247928831  # 0x9000000000000001
        assert numbers.tolist() == [1.5, -2, 0.25, 0, 0, 0, 0, 0]
        assert offsets.flatten().tolist() == [0] + [4] * 63  # in pairs
        assert not bitmaps.flatten()[1:].any()


def test_the_first_number_is_the_most_significant_bit() -> None:
    first, last = torch.zeros(2, 64, dtype=torch.bool)
    first[0], last[63] = True, True
    assert bitmaps_of(torch.stack((first, last, first | last))).tolist() == [TOP, 1, TOP + 1]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(TOP, -TOP - 1), min_size=1, max_size=9))
def test_bits_and_bitmaps_are_inverse(bitmaps: list[int]) -> None:
    words = torch.tensor(bitmaps)
    assert torch.equal(bitmaps_of(bits_of(words)), words)
    assert [int("".join(str(int(b)) for b in row), 2) for row in bits_of(words)] == [w % (1 << 64) for w in bitmaps]


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([16, 32, 64, 80, 96, 128]),
    st.sampled_from([0.0, 0.02, 0.3, 0.5, 1.0]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 99),
)
def test_what_was_compressed_comes_back_bit_for_bit(
    heads: int, blocks: int, width: int, density: float, of_keys: bool, dtype: torch.dtype, seed: int
) -> None:
    x = pruned(heads, 64 * blocks, width, density, seed, batch=2).to(dtype)
    sparse = compress(x, of_keys)
    assert sparse.entries == 64 * blocks and torch.equal(sparse.dense(), x)
    counts = bits_of(sparse.bitmaps).sum(-1)
    assert counts.sum() == (x != 0).sum()
    assert len(sparse.numbers) == (-(-counts // 8) * 8).sum()  # less than 8 more than a tile's own
    assert sparse.bitmaps.shape[-1] == tiles_of(width, of_keys)


@pytest.mark.parametrize("of_keys", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_blocks_are_found_and_their_bytes_do_not_depend_on_what_they_are_compressed_with(
    width: int, of_keys: bool
) -> None:
    x = pruned(2, 512, width, batch=2)
    at_once = compress(x, of_keys)
    parts = [compress(x[:, :, n : n + 128], of_keys) for n in range(0, 512, 128)]
    for name in ("bitmaps", "offsets", "numbers"):
        assert getattr(at_once, name).numel() == sum(getattr(part, name).numel() for part in parts)
    assert torch.equal(at_once.tiles(2, 4), parts[1].tiles())


@pytest.mark.parametrize("sparsity, key_share, value_share", [(0.5, 0.657, 0.656), (0.7, 0.461, 0.463)])
def test_bytes_of_the_cards_random_data(sparsity: float, key_share: float, value_share: float) -> None:
    x = torch.randn(1, 1, 8192, 128, generator=torch.Generator().manual_seed(0))
    least = x.abs().kthvalue(int(sparsity * 128), dim=-1, keepdim=True).values
    x = torch.where(x.abs() >= least, x, 0.0).half()
    for of_keys, share in ((True, key_share), (False, value_share)):
        sparse = compress(x, of_keys)
        used = sum(t.numel() * t.element_size() for t in sparse[:3])
        assert used / (x.numel() * 2) == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize("path", ALL_PATHS)
@pytest.mark.parametrize(
    "heads, group, entries, width",
    [(1, 1, 64, 32), (2, 4, 512, 64), (2, 2, 320, 128), (1, 3, 256, 96), (3, 1, 192, 16)],
)
def test_both_paths_equal_the_definition(heads: int, group: int, entries: int, width: int, path: Path) -> None:
    keys = on(compress(pruned(heads, entries, width), True), path)
    values = on(compress(pruned(heads, entries, width, 0.3, 1), False), path)
    q = torch.randn(1, heads * group, 1, width, generator=torch.Generator().manual_seed(2)).to(path.device)
    expected = sparse_attention_reference(q, keys, values, 0.2)
    for splits in (None, 1, 3):
        out, lse = sparse_attention(q, keys, values, 0.2, splits=splits, kernel=path.kernel)
        torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse, expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "path, dtype, tolerance",  # Triton's interpreter cannot multiply bfloat16
    [
        *(pytest.param(*path.values, torch.float16, 2e-3, marks=path.marks) for path in ALL_PATHS),
        *(pytest.param(*path.values, torch.bfloat16, 2e-2, marks=path.marks) for path in (TWIN, COMPILED)),
    ],
)
def test_half_precision_a_batch_and_several_queries(path: Path, dtype: torch.dtype, tolerance: float) -> None:
    keys = on(compress(pruned(2, 256, 64, batch=3).to(dtype), True), path)
    values = on(compress(pruned(2, 256, 64, seed=1, batch=3).to(dtype), False), path)
    q = torch.randn(3, 4, 2, 64, generator=torch.Generator().manual_seed(2)).to(path.device, dtype)
    out, lse = sparse_attention(q, keys, values, 0.125, kernel=path.kernel)
    expected = sparse_attention_reference(q, keys, values, 0.125)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse, expected[1], atol=tolerance, rtol=tolerance)


def test_nothing_held_and_what_does_not_belong_together() -> None:
    keys, values = compress(pruned(2, 64, 32), True), compress(pruned(2, 64, 32), False)
    q = torch.randn(1, 4, 1, 32)
    none = [side._replace(bitmaps=side.bitmaps[:, :, :0], offsets=side.offsets[:, :, :0]) for side in (keys, values)]
    out, lse = sparse_attention(q, *none, 1.0)
    assert (out == 0).all() and (lse == -math.inf).all()
    with pytest.raises(ValueError, match="do not hold the same entries"):
        sparse_attention(q, keys, compress(pruned(2, 128, 32), False), 1.0)
    with pytest.raises(ValueError, match="do not hold the same entries"):
        sparse_attention(q, values, keys, 1.0)
    with pytest.raises(ValueError, match="do not belong to queries"):
        sparse_attention(q[:, :3], keys, values, 1.0)
    with pytest.raises(ValueError, match="multiple of 64 entries, got 65"):
        compress(torch.zeros(1, 1, 65, 32), True)
