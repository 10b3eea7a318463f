"""Train `house/recall`: a curriculum of recall, learnt with Muon and AdamW. `python -m workbench.training.recall.train --out DIR`.

The data of a step depends only on the seed, the step and the level, so a resumed run equals one that was never interrupted.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import batches, checkpoint, text, tokenizer
from .batches import Encoder
from .start import seed_induction
from .text import Role

MUON_LR, ADAMW_LR = 0.006, 2e-3  # matrices; embeddings and norms
WARM_UP = 50  # steps
DECAY_FROM = 0.6  # of the run: the learning rate falls linearly from here to its end
LEVEL_UP = (0.9, 0.9, 0.9, 0.9, 0.9, 0.9)  # accuracy that ends a level
JUDGE_EVERY = 50  # steps between two judgements of the level
BLIND_SHARE, BLIND_FROM = 0.4, 4  # of the steps, from this level on: see batches.blind_mask
EAGER_UP_TO = 384  # tokens a row: up to it plain attention takes less CPU time than the fused kernel
PLAIN_WEIGHT, PLAIN_WEIGHT_LATE, LATE_FROM = 0.2, 0.5, 0.85  # loss weight of what cannot be predicted


@dataclass
class Progress:
    """What a training run can say about itself; `accuracy` is by level, measured every now and then."""

    step: int = 0
    level: int = 0
    seconds: float = 0.0
    tokens: int = 0
    loss: float = float("nan")
    done: float = 0.0  # 0 to 1
    accuracy: dict[int, float] = field(default_factory=dict)

    @property
    def eta(self) -> float:
        """Seconds to go, at the mean pace so far; infinite at the very start."""
        return self.seconds / self.done * (1 - self.done) if self.done > 0 else float("inf")


def model_config(vocab_size: int, bos: int, eos: int) -> LlamaConfig:
    """The architecture of `house/recall`."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},  # most pairs turn little over 2,000 tokens
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
    )


def pick_device(device: str) -> torch.device:
    """`auto` takes the accelerator if there is one."""
    if device != "auto":
        return torch.device(device)
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices within the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, encoder: Encoder, level: int, texts: int = 10) -> float:
    """Share of answers of a level's own task that greedy decoding would give exactly, up to the mark that ends them."""
    rng = random.Random(f"judge {level}")
    device = next(model.parameters()).device
    right = asked = 0
    for _ in range(texts):
        e = encoder.encode(text.task(rng, level, encoder.count))
        best = model(input_ids=torch.tensor([e.ids], device=device), use_cache=False).logits[0].argmax(-1).tolist()
        hits: dict[int, bool] = {}
        for i, (role, group) in enumerate(zip(e.roles, e.groups)):
            if role == Role.ANSWER:
                hits[group] = hits.get(group, True) and best[i - 1] == e.ids[i]
        right += sum(hits.values())
        asked += len(hits)
    return right / asked


class Training:
    """One run: model, optimizers and progress, a step at a time."""

    def __init__(self, out: Path, device: str = "auto", seed: int = 0):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.seed, self.device = out, seed, pick_device(device)
        self.tokenizer: PreTrainedTokenizerFast = tokenizer.load_or_build(out, seed)
        self.encoder = Encoder(self.tokenizer)
        torch.manual_seed(seed)
        self.model = LlamaForCausalLM(
            model_config(len(self.tokenizer), self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        ).to(self.device)
        seed_induction(self.model)
        self.optimizers = optimizers(self.model)
        self.progress = Progress()

    def save(self) -> None:
        """Write the checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": asdict(self.progress),
            "seed": self.seed,
        }
        checkpoint.save(self.out, state)

    def resume(self) -> None:
        """Take up where the checkpoint left off."""
        state = checkpoint.load(self.out)
        if state["seed"] != self.seed:
            raise ValueError(
                f"The checkpoint in {self.out} was trained with seed {state['seed']}; resume with that seed, not {self.seed}."
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])

    def step(self) -> None:
        """One update of the weights."""
        p = self.progress
        rng = random.Random(f"step {self.seed} {p.step} {p.level}")
        batch = batches.training_batch(rng, p.level, self.encoder)
        ids, roles, blind = (t.to(self.device) for t in batch)
        mask = (
            batches.blind_mask(blind[:, :-1], torch.bfloat16)
            if p.level >= BLIND_FROM and rng.random() < BLIND_SHARE
            else None
        )
        plain = 1.0 if p.level == 0 else PLAIN_WEIGHT if p.done < LATE_FROM else PLAIN_WEIGHT_LATE
        weight = torch.where((roles == Role.ANSWER) | (roles == Role.COPY), 1.0, plain)[:, 1:].flatten()
        pace = min(1.0, (p.step + 1) / WARM_UP) * min(1.0, max(0.02, (1 - p.done) / (1 - DECAY_FROM)))
        for optimizer, rate in zip(self.optimizers, (MUON_LR, ADAMW_LR)):
            for group in optimizer.param_groups:
                group["lr"] = rate * pace
        self.model.train()
        self.model.set_attn_implementation("eager" if ids.shape[1] <= EAGER_UP_TO + 1 else "sdpa")
        mixed = torch.autocast(self.device.type, dtype=torch.bfloat16) if self.device.type != "mps" else nullcontext()
        with mixed:
            logits = self.model(input_ids=ids[:, :-1], attention_mask=mask, use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        p.step += 1
        p.tokens += ids.numel()
        p.loss = loss.item()

    def judge(self) -> None:
        """Measure the present level; go up if it is mastered."""
        p = self.progress
        self.model.eval()
        self.model.set_attn_implementation("sdpa")
        p.accuracy[p.level] = accuracy(self.model, self.encoder, p.level, texts=10 if p.level < 4 else 5)
        if p.level < len(LEVEL_UP) and p.accuracy[p.level] > LEVEL_UP[p.level]:
            p.level += 1

    def export(self) -> None:
        """Write the model folder: float16 weights, configuration, tokenizer. The configuration asks for float32 arithmetic."""
        export(self.model, self.tokenizer, self.out)


def export(model: LlamaForCausalLM, tok: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save weights in float16 (half the bytes; one answer in sixty differed) under a configuration that computes in float32."""
    half = LlamaForCausalLM(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.generation_config = GenerationConfig(
        bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, do_sample=False, max_new_tokens=64
    )
    half.save_pretrained(folder)
    config = half.config
    config.dtype = torch.float32
    config.save_pretrained(folder)
    tok.save_pretrained(folder)


def train(
    out: Path,
    minutes: float | None = None,
    steps: int | None = None,
    resume: bool = False,
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    save_minutes: float = 3.0,
) -> Progress:
    """Train into the folder `out`, for `minutes` or for `steps` (60 minutes if neither is given), and export the model there.

    `resume` goes on from the checkpoint in `out`; minutes and steps count from the beginning of the whole run. `progress` is called
    after every step. An interruption (Ctrl-C) leaves a valid checkpoint.
    """
    if minutes is not None and steps is not None:
        raise ValueError("train takes minutes or steps, not both.")
    limit = 60 * (60.0 if minutes is None else minutes)  # seconds
    run = Training(Path(out), device, seed)
    if resume:
        run.resume()
    p = run.progress
    began = time.monotonic() - p.seconds
    saved = time.monotonic()

    def share_done() -> float:
        return min(1.0, p.step / steps if steps is not None else p.seconds / limit)

    def tell() -> None:
        p.seconds = time.monotonic() - began
        p.done = share_done()
        if progress is not None:
            progress(p)

    p.done = share_done()
    try:
        while p.done < 1:
            run.step()
            if p.step % JUDGE_EVERY == 0:
                run.judge()
            tell()
            if time.monotonic() - saved > 60 * save_minutes:
                run.save()
                saved = time.monotonic()
    finally:
        run.save()
    run.export()
    return p


def _main() -> None:
    parser = argparse.ArgumentParser(description="Train house/recall.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    def say(p: Progress) -> None:
        if p.step % 20 == 0:
            judged = " ".join(f"{level}:{share:.2f}" for level, share in p.accuracy.items())
            print(
                f"step {p.step} level {p.level} loss {p.loss:.3f} {p.tokens / p.seconds:.0f} tokens/s {p.seconds / 60:.1f} min, {p.eta / 60:.0f} to go; accuracy {judged}",
                flush=True,
            )

    try:
        train(given.out, given.minutes, given.steps, given.resume, given.device, given.seed, say)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("Stopped; resume with --resume.") from None


if __name__ == "__main__":
    _main()
