"""Packing of 2-, 4- and 8-bit codes into int32 words.

The layout is KIVI's (arXiv 2402.02750): little-endian inside a word, so that element ``j`` of a run of ``32 / bits``
codes sits at bits ``[bits * j, bits * (j + 1))``.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench_kernels.triton_if_used import runs, tl, triton

BITS = (2, 4, 8)


def pack_reference(codes: Tensor, bits: int) -> Tensor:
    """[..., n] uint8 codes -> [..., n * bits / 32] int32 words."""
    # Bytes first: every code lies inside one byte, and a word is four bytes, the lowest first.
    words = torch.empty(*codes.shape[:-1], codes.shape[-1] * bits // 32, dtype=torch.int32, device=codes.device)
    octets = words.view(torch.uint8)
    octets.copy_(codes[..., :: 8 // bits])
    for j in range(1, 8 // bits):
        octets |= codes[..., j :: 8 // bits] << (bits * j)
    return words


def unpack_reference(words: Tensor, bits: int) -> Tensor:
    """[..., m] int32 words -> [..., m * 32 / bits] uint8 codes."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return octets
    mask = (1 << bits) - 1
    parts = [(octets >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(-2)


@cache
def _table(bits: int) -> Tensor:
    """float32 [256, 8 / bits]: the codes in every byte."""
    octets = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 4).contiguous()
    return unpack_reference(octets.view(torch.int32), bits)[:, : 8 // bits].float()


def unpack_float(words: Tensor, bits: int) -> Tensor:
    """:func:`unpack` in float32: on a CPU by table, one pass over the memory instead of one per code in a byte."""
    if words.device.type != "cpu":
        return unpack(words, bits).float()
    _check_bits(bits)
    octets = words.contiguous().view(torch.uint8)
    return octets.float() if bits == 8 else F.embedding(octets.int(), _table(bits)).flatten(-2)


if triton is not None:

    @triton.jit
    def _pack_kernel(codes, words, count, BITS: tl.constexpr, BLOCK: tl.constexpr):
        per_word: tl.constexpr = 32 // BITS
        word = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)  # int64 before any stride
        here = word < count
        packed = tl.zeros([BLOCK], dtype=tl.int32)
        for j in tl.static_range(per_word):
            code = tl.load(codes + word * per_word + j, mask=here, other=0).to(tl.int32)
            packed = packed | (code << (BITS * j))
        tl.store(words + word, packed, mask=here)

    @triton.jit
    def _unpack_kernel(words, codes, count, BITS: tl.constexpr, BLOCK: tl.constexpr):
        per_word: tl.constexpr = 32 // BITS
        index = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        here = index < count
        word = tl.load(words + index // per_word, mask=here, other=0)
        # `>>` is arithmetic on int32: mask after the shift, or negative words leak their sign.
        shift = ((index % per_word) * BITS).to(tl.int32)
        tl.store(codes + index, ((word >> shift) & ((1 << BITS) - 1)).to(tl.uint8), mask=here)


def pack(codes: Tensor, bits: int, *, reference: bool = False, kernel: bool = False) -> Tensor:
    """Pack uint8 ``codes`` [..., n] into int32 words [..., n * bits / 32].

    CUDA tensors take the Triton kernel, others the torch twin; ``kernel=True`` forces the kernel (tests run it in
    Triton's interpreter).

    Raises:
        ValueError: ``bits`` is not 2, 4 or 8, codes are not uint8, or n codes do not fill whole words.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise ValueError(f"pack takes uint8 codes, got {codes.dtype}")
    if codes.shape[-1] * bits % 32:
        raise ValueError(f"pack needs a multiple of {32 // bits} codes in the last axis, got {codes.shape[-1]}")
    if not (kernel or (runs(codes) and not reference)):
        return pack_reference(codes, bits)
    codes = codes.contiguous()
    words = torch.empty(*codes.shape[:-1], codes.shape[-1] * bits // 32, dtype=torch.int32, device=codes.device)
    if words.numel():
        grid = (triton.cdiv(words.numel(), 256),)
        with torch.cuda.device_of(codes):
            _pack_kernel[grid](codes, words, words.numel(), BITS=bits, BLOCK=256)
    return words


def unpack(words: Tensor, bits: int, *, reference: bool = False, kernel: bool = False) -> Tensor:
    """Unpack int32 ``words`` [..., m] into uint8 codes [..., m * 32 / bits]; the inverse of :func:`pack`."""
    _check_bits(bits)
    if words.dtype != torch.int32:
        raise ValueError(f"unpack takes int32 words, got {words.dtype}")
    if not (kernel or (runs(words) and not reference)):
        return unpack_reference(words, bits)
    words = words.contiguous()
    codes = torch.empty(*words.shape[:-1], words.shape[-1] * 32 // bits, dtype=torch.uint8, device=words.device)
    if codes.numel():
        grid = (triton.cdiv(codes.numel(), 1024),)
        with torch.cuda.device_of(words):
            _unpack_kernel[grid](words, codes, codes.numel(), BITS=bits, BLOCK=1024)
    return codes


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, got {bits}")
