"""One side of a paired measurement: a process that runs a method when it is told to, one JSON request and answer a line.

Our side is started as a module; kvpress's side is started as a file, by the interpreter of an environment that has kvpress
and not the workbench. So this file imports the workbench, kvpress and transformers only where its side needs them.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WARM_TOKENS = 64  # of a prompt read before the peak is taken: the libraries' own buffers are no part of it


class Side(ABC):
    """A network, and the cache of the prompt it read last. Requests are dicts; see :func:`answer`."""

    packages: tuple[str, ...] = ("torch", "transformers")
    cache: Any = None

    @abstractmethod
    def __init__(self, folder: str) -> None:
        """The model saved in ``folder``, in float32."""

    @abstractmethod
    def prefill(self, ids: Any, method: Any) -> Any:
        """Read the prompt ids [1, T] in one forward call, and compress; the last token's logits [vocabulary]."""

    @abstractmethod
    def step(self, token: Any, position: int) -> Any:
        """Feed one token [1, 1]; its logits."""

    @abstractmethod
    def held(self) -> dict[str, Any]:
        """Bytes of every tensor that the cache holds, as ``bytes``, and what else there is to say of them."""

    def release(self) -> None:
        """Let go of the cache."""
        self.cache = None


class Workbench(Side):
    """``method`` is a recipe."""

    def __init__(self, folder: str) -> None:
        from workbench.models.load import load

        self.model = load(folder, device="cpu", dtype="float32")

    def prefill(self, ids: Any, method: str) -> Any:
        from workbench.cache.make import cache

        self.cache = cache(method, self.model)
        return self._feed(ids)

    def step(self, token: Any, position: int) -> Any:
        return self._feed(token)

    def _feed(self, ids: Any) -> Any:
        found = self.model.network(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return found.logits[0, -1]

    def held(self) -> dict[str, Any]:
        memory = self.cache.memory()
        return {"bytes": memory.used_bytes, "by_kind": memory.by_kind}


class KVPress(Side):
    """``method`` is a press: ``{"class": …, parameters…}``, where a parameter may be a press again; None for the full cache.

    The press is entered while the prompt is read and left before decoding, and later tokens get their own positions, as in
    kvpress's pipeline. ``"attention": "eager"`` among the parameters is what ObservedAttentionPress asks for.
    """

    packages = ("torch", "transformers", "kvpress")

    def __init__(self, folder: str) -> None:
        import kvpress
        import torch
        from transformers import AutoModelForCausalLM

        self.presses = kvpress
        self.network = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=torch.float32
        ).eval()
        self.attention = "sdpa"

    def prefill(self, ids: Any, method: dict[str, Any] | None) -> Any:
        from transformers import DynamicCache

        given = dict(method or {})
        attention = given.pop("attention", "sdpa")
        if attention != self.attention:
            self.network.set_attn_implementation(attention)
            self.attention = attention
        self.cache = DynamicCache()
        if not given:
            return self._feed(ids)
        with self.press(given)(self.network):
            return self._feed(ids)

    def press(self, given: dict[str, Any]) -> Any:
        made = {name: self.press(value) if isinstance(value, dict) else value for name, value in given.items()}
        return getattr(self.presses, made.pop("class"))(**made)

    def step(self, token: Any, position: int) -> Any:
        import torch

        return self._feed(token, position_ids=torch.tensor([[position]]))

    def _feed(self, ids: Any, **more: Any) -> Any:
        found = self.network(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **more)
        return found.logits[0, -1]

    def held(self) -> dict[str, Any]:
        """Keys and values, and of a press that only hides entries the list of those."""
        hidden = [getattr(layer.self_attn, "masked_key_indices", None) or () for layer in self.network.model.layers]
        found = {
            "entries": [t for layer in self.cache.layers for t in (layer.keys, layer.values)],
            "hidden": [t for layer in hidden for t in layer],
        }
        by_kind = {kind: sum(t.numel() * t.element_size() for t in tensors) for kind, tensors in found.items()}
        return {"bytes": sum(by_kind.values()), "by_kind": by_kind}

    def release(self) -> None:
        super().release()
        for layer in self.network.model.layers:
            layer.self_attn.masked_key_indices = None


SIDES: dict[str, type[Side]] = {"workbench": Workbench, "kvpress": KVPress}


def race(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """Read the prompt and compress, then decode the given tokens: seconds of each, bytes after the prompt, last logits."""
    import torch

    ids, following = torch.tensor([request["ids"]]), torch.tensor([request["following"]])
    side.release()
    gc.collect()
    began = time.perf_counter()
    logits = side.prefill(ids, request["method"])
    read = time.perf_counter()
    held = side.held()
    resumed = time.perf_counter()
    for n in range(following.shape[1]):
        logits = side.step(following[:, n : n + 1], ids.shape[1] + n)
    done = time.perf_counter()
    return {"prefill": read - began, "decode": done - resumed, "held": held, "logits": logits.tolist()}


def peak(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """Resident bytes that :func:`race` added at its peak to the loaded model, and the whole process's."""
    race(side, {**request, "ids": request["ids"][:WARM_TOKENS], "following": request["following"][:2]})
    side.release()
    return resident_peak(lambda: race(side, request))


def resident_peak(work: Callable[[], object]) -> dict[str, int]:
    """Resident bytes at the peak of ``work()``: ``added`` to what there was, and ``total``."""
    gc.collect()
    CLEAR.write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    work()
    found = status("VmHWM")
    return {"added": found - before, "total": found}


def can_count() -> bool:
    """Whether the kernel counts peaks: it takes Linux's /proc/self/clear_refs."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return STATUS.exists()


def status(name: str) -> int:
    """A figure of this process in bytes, as Linux names it (VmRSS, VmHWM)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def answer(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """``{"do": "race" or "peak", "method": …, "ids": [T], "following": [tokens to decode]}``, or ``{"do": "about"}``."""
    if request["do"] == "about":
        return {"python": sys.version.split()[0], **{package: version(package) for package in side.packages}}
    return {"race": race, "peak": peak}[request["do"]](side, request)


def serve(name: str, folder: str, threads: int) -> None:
    """Answer on standard output until standard input ends; what fails is answered as ``{"failed": …}``."""
    import torch

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed is no answer
    torch.set_num_threads(threads)
    side = SIDES[name](folder)
    with torch.inference_mode():
        for line in sys.stdin:
            try:
                found = answer(side, json.loads(line))
            except Exception as error:  # the other process says it, and goes on with the next method
                found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
