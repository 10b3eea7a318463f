"""Run kvpress on tiny random models and freeze which entries each of its methods keeps.

Only needed to renew ``tests/oracle/fixtures``; the tests read the files alone. kvpress wants an older transformers than
the workbench and wraps transformers' attention functions when it is imported, so it lives in an environment of its own:

    python3.11 -m venv kvpress-env
    kvpress-env/bin/pip install torch==2.13.0
    kvpress-env/bin/pip install torch==2.13.0 "transformers==5.2.0" "kvpress==0.5.4" peft
    kvpress-env/bin/python -m tests.oracle.make_fixtures        # in the repository's root; two minutes on one core

(torch first, on its own, where a CPU build is wanted.) The versions that ran are written into every fixture.

How a case is made: one ordinary prefill in float32; at every full-attention layer the inputs of kvpress's hook are
caught, and ``press.compress`` is called on copies of them. That is what the hook does, and `check_the_hook` shows it:
the hook itself gives the same cache. The way round is for two reasons. Gemma 3's hook knows only the multimodal class and
asks the rotary embedding without naming the kind of layer, which transformers 5 refuses (`FullAttentionRotary` names it).
And every layer is asked many times over:

`margin` is the largest relative noise on the numbers that the press sorts, 1e-4 or 1e-5, that leaves a layer's kept set as
it is in each of several draws. Zero means a tie, or nearly one, of which torch.topk may keep either side. Noise, since one
gap at one cut does not describe the presses that sort more than once.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import kvpress
import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from tests.oracle.cases import ARCHITECTURES, FIXTURES, compared_layers, digest, network, prompt

LENGTHS = (97, 203, 331)
RATIOS = (0.1, 0.3, 0.5, 0.8)
NOISE = (1e-4, 1e-5)
DRAWS = 4
KEYS_KEPT_FOR = (0.5, 0.8)  # ratios whose rotated keys are kept, with the shortest prompt

# SnapKV's windows are shorter than every budget: where protected entries do not fit, kvpress keeps any of them. Critical's
# shares of the first stage give the same count of a rounded budget as of kvpress's unrounded one.
SNAP = [{"window_size": 8, "kernel_size": 5}, {"window_size": 16, "kernel_size": 7}]


def snap(ratio: float, window_size: int, kernel_size: int) -> Any:
    return kvpress.SnapKVPress(ratio, window_size=window_size, kernel_size=kernel_size)


def around_snap(press: type, *own: str) -> Callable[..., Any]:
    """A press around SnapKVPress; ``own`` are the parameters that are its own."""

    def make(ratio: float, **given: Any) -> Any:
        outer = {name: given.pop(name) for name in own}
        return press(snap(ratio, **given), **outer)

    return make


def each(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """SnapKV's two settings, each with a setting of the press around it."""
    return [{**SNAP[0], **one}, {**SNAP[1], **other}]


# Name in the fixtures -> how a press is made of a ratio and parameters, and the parameters it is run with.
PRESSES: dict[str, tuple[Callable[..., Any], list[dict[str, Any]]]] = {
    "StreamingLLMPress": (kvpress.StreamingLLMPress, [{"n_sink": 4}, {"n_sink": 1}]),
    "KeyRerotationPress(StreamingLLMPress)": (
        lambda ratio, **given: kvpress.KeyRerotationPress(kvpress.StreamingLLMPress(ratio, **given)),
        [{"n_sink": 4}],
    ),
    "ObservedAttentionPress": (kvpress.ObservedAttentionPress, [{}]),
    "TOVAPress": (kvpress.TOVAPress, [{}]),
    "SnapKVPress": (snap, SNAP),
    "PyramidKVPress": (
        lambda ratio, **given: kvpress.PyramidKVPress(ratio, **given),
        each({"beta": 20}, {"beta": 4}),
    ),
    "AdaKVPress(SnapKVPress)": (
        around_snap(kvpress.AdaKVPress, "alpha_safeguard"),
        each({"alpha_safeguard": 0.2}, {"alpha_safeguard": 0.95}),
    ),
    "KnormPress": (kvpress.KnormPress, [{}]),
    "KeyDiffPress": (kvpress.KeyDiffPress, [{}]),
    "BlockPress(KeyDiffPress)": (
        lambda ratio, block_size: kvpress.BlockPress(kvpress.KeyDiffPress(ratio), block_size=block_size),
        [{"block_size": 16}, {"block_size": 50}],
    ),
    "ExpectedAttentionPress": (
        kvpress.ExpectedAttentionPress,
        [
            {"n_future_positions": 512, "n_sink": 4, "use_covariance": True, "use_vnorm": True, "epsilon": 0.0},
            {"n_future_positions": 64, "n_sink": 2, "use_covariance": False, "use_vnorm": True, "epsilon": 0.01},
        ],
    ),
    "ChunkKVPress(SnapKVPress)": (
        around_snap(kvpress.ChunkKVPress, "chunk_length"),
        each({"chunk_length": 20}, {"chunk_length": 7}),
    ),
    "CriticalKVPress(SnapKVPress)": (
        around_snap(kvpress.CriticalKVPress, "epsilon", "first_stage_ratio"),
        each({"epsilon": 1e-4, "first_stage_ratio": 0.5}, {"epsilon": 1e-3, "first_stage_ratio": 0.25}),
    ),
    "CriticalAdaKVPress(SnapKVPress)": (
        around_snap(kvpress.CriticalAdaKVPress, "alpha_safeguard", "epsilon", "first_stage_ratio"),
        each(
            {"alpha_safeguard": 0.2, "epsilon": 1e-4, "first_stage_ratio": 0.5},
            {"alpha_safeguard": 0.95, "epsilon": 1e-3, "first_stage_ratio": 0.25},
        ),
    ),
    "ThinKPress": (kvpress.ThinKPress, [{"window_size": 32}, {"window_size": 8}]),
}
EAGER = ("ObservedAttentionPress",)  # needs the weights of the attention itself
ONE_CUT = (  # presses whose scores, one per entry, are all that decides
    "StreamingLLMPress ObservedAttentionPress TOVAPress SnapKVPress PyramidKVPress KnormPress KeyDiffPress "
    "ExpectedAttentionPress ThinKPress"
).split()


class FullAttentionRotary:
    """Gemma 3's rotary embedding as its full-attention layers use it, called as kvpress calls a Llama's."""

    def __init__(self, rotary: Any) -> None:
        self._rotary, self.inv_freq = rotary, rotary.full_attention_inv_freq

    def __call__(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._rotary(like, positions, "full_attention")


class Sorting(TorchFunctionMode):
    """Watches every ``topk``: keeps what the last one sorted, and adds relative noise to what it sorts."""

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.noise, self.last = noise, None
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (torch.topk, torch.Tensor.topk):
            return function(*args, **(kwargs or {}))
        scores = args[0]
        self.last = scores.clone()
        if self.noise:
            ordinary = scores.abs()[scores.abs() < 1e30]  # not the marks of what is sure to stay
            size = scores.abs() + 0.01 * ordinary.median()  # a score that crosses zero is not exact at zero
            scores = scores + self.noise * size * (torch.rand(scores.shape, generator=self._generator) * 2 - 1)
        return function(scores, *args[1:], **(kwargs or {}))


def caught(name: str, attention: str, ids: list[int]) -> tuple[list[dict[str, Any]], Tensor]:
    """What kvpress's hook is given at every compared layer, and the last token's logits."""
    model, cache, found = network(name, attention), DynamicCache(), []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        held = cache.layers[module.layer_idx]
        weights = output[1] if attention == "eager" else None
        found.append(
            {"module": module, "kwargs": kwargs, "keys": held.keys, "values": held.values, "attentions": weights}
        )

    modules = [model.model.layers[layer].self_attn for layer in compared_layers(name)]
    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    try:
        logits = model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
    finally:
        for handle in hooks:
            handle.remove()
    return found, logits


def rows_of(kept: Tensor, of: Tensor) -> Tensor:
    """bool [H, T]: which rows of ``of`` [H, T, D] are in ``kept`` [H, n, D], bit for bit."""
    left, entries = (t.contiguous().view(torch.int64)[..., 0] for t in (kept, of))  # two channels' bits tell them apart
    found = torch.stack([torch.isin(*head) for head in zip(entries, left)])
    if not (found.sum(1) == kept.shape[1]).all():
        raise ValueError("a kept entry is not exactly one of the entries there were")
    return found


def compress(press: Any, layer: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which entries (or, of ThinK, channels) ``press`` keeps: bool [H, T or D]; and the keys it leaves [H, n, D]."""
    module, keys, values = layer["module"], layer["keys"].clone(), layer["values"].clone()
    module.masked_key_indices = None
    found, left = press.compress(
        module, layer["kwargs"]["hidden_states"], keys, values, layer["attentions"], layer["kwargs"]
    )
    if module.masked_key_indices is not None:  # presses that only hide what they drop
        kept = torch.ones(keys.shape[1:3], dtype=torch.bool)
        _, heads, tokens = module.masked_key_indices
        kept[heads, tokens] = False
        return kept, found[0]
    if isinstance(press, kvpress.ThinKPress):
        return (found[0] != 0).any(1), found[0]
    if isinstance(press, kvpress.KeyRerotationPress):  # its keys are new: ask the press inside, and compare values
        plain, _ = press.press.compress(
            module, layer["kwargs"]["hidden_states"], keys, values, layer["attentions"], layer["kwargs"]
        )
        kept = rows_of(plain[0], layer["keys"][0])
        if not torch.equal(left[0], torch.stack([v[k] for v, k in zip(values[0], kept)])):
            raise ValueError("rotated entries are not those of the press inside")
        return kept, found[0]
    return rows_of(found[0], layer["keys"][0]), found[0]


def margin(press: Any, layer: dict[str, Any], kept: Tensor) -> float:
    """The largest relative noise, of `NOISE`, that leaves ``kept`` as it is; 0.0 where the smallest does not."""

    def same(noise: float, draw: int) -> bool:
        with Sorting(noise, seed=draw):
            return torch.equal(compress(press, layer)[0], kept)

    return next((noise for noise in NOISE if all(same(noise, draw) for draw in range(DRAWS))), 0.0)


def check_the_hook(name: str, press: Any, ids: list[int], layers: list[dict[str, Any]], attention: str) -> None:
    """kvpress used as its README says leaves the entries that `compress` found."""
    model, cache = network(name, attention), DynamicCache()
    with press(model):
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
    for layer in layers:
        held, module = cache.layers[layer["module"].layer_idx], layer["module"]
        hidden = getattr(module, "masked_key_indices", None)
        kept, keys = compress(press, layer)
        if hidden is not None:
            seen = torch.ones_like(kept)
            seen[hidden[1], hidden[2]] = False
            same = torch.equal(seen, kept)
        else:
            same = torch.equal(held.keys[0], keys)
        if not same:
            raise ValueError(f"{name}: the hook and compress disagree for {press}")


def made(name: str) -> Iterator[tuple[str, dict[str, Any], int, float, Any, list[dict[str, Any]]]]:
    """Every case of an architecture: press, parameters, length, ratio, the press itself, the layers it works on."""
    for length in LENGTHS:
        layers = {how: caught(name, how, prompt(length))[0] for how in ("sdpa", "eager")}
        for key, (make, settings) in PRESSES.items():
            attention = "eager" if key in EAGER else "sdpa"
            for parameters in settings:
                for ratio in RATIOS:
                    press = make(ratio, **parameters)
                    if name != "gemma3" and length == LENGTHS[0]:
                        check_the_hook(name, press, prompt(length), layers[attention], attention)
                    yield key, parameters, length, ratio, press, layers[attention]


def write(name: str) -> None:
    model = network(name, "sdpa")
    for how in ("sdpa", "eager"):
        inside = network(name, how).model
        for layer in compared_layers(name):
            rotary = FullAttentionRotary(inside.rotary_emb) if name == "gemma3" else inside.rotary_emb
            inside.layers[layer].self_attn.rotary_emb = rotary  # as the hook does
    table, bits, margins, scores, keys = [], [], [], [], []
    for key, parameters, length, ratio, press, layers in made(name):
        found, sorted_by = [], []
        for layer in layers:
            with Sorting() as watch:
                found.append(compress(press, layer))
            sorted_by.append(watch.last)
        kept = torch.stack([one for one, _ in found])
        bits.append(np.packbits(kept.numpy()))
        margins.append([margin(press, layer, one) for layer, one in zip(layers, kept)])
        show = key in ONE_CUT and length == LENGTHS[0] and ratio == 0.5
        if show:
            scores.append(torch.cat(sorted_by).numpy().ravel())
        turned = 0
        if key.startswith("KeyRerotation") and length == LENGTHS[0] and ratio in KEYS_KEPT_FOR:
            keys.append(torch.stack([one for _, one in found]).numpy().ravel())
            turned = found[0][1].shape[1]
        row = {"press": key, "parameters": parameters, "length": length, "ratio": ratio}
        table.append({**row, "width": kept.shape[-1], "scores": show, "keys": turned})
    about = {
        "versions": {
            **{package: version(package) for package in ("kvpress", "transformers", "torch")},
            "python": platform.python_version(),
        },
        "weights": digest(model),
        "lengths": LENGTHS,
        "layers": compared_layers(name),
        "noise": {"levels": NOISE, "draws": DRAWS},
        "cases": table,
    }
    np.savez_compressed(
        FIXTURES / f"{name}.npz",
        about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
        logits=torch.stack([caught(name, "sdpa", prompt(length))[1] for length in LENGTHS]).numpy(),
        kept=np.concatenate(bits),
        margin=np.array(margins, dtype=np.float32),
        scores=np.concatenate(scores),
        keys=np.concatenate(keys),
    )
    free = np.mean(np.array(margins) >= 1e-5)
    print(f"{name}: {len(table)} cases, {(FIXTURES / f'{name}.npz').stat().st_size:,} bytes, {free:.1%} free of ties")


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    with torch.inference_mode():
        for architecture in ARCHITECTURES:
            write(architecture)
