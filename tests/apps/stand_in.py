"""A small random model on disk, and a session of the app without a browser."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.training.recall import tokenizer

APPS = str(Path(__file__).resolve().parents[2] / "apps")
if APPS not in sys.path:
    sys.path.insert(0, APPS)

CONTEXT = "The colour of Mira is teal . The home of Tovi is the mill . The colour of Sela is amber . " * 6
QUESTION = "What is the colour of Mira ?"


def write_model(folder: Path) -> Path:
    """A random two-layer Llama whose heads are wide enough for every strategy."""
    tok = tokenizer.build(texts=20)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tok),
        bos_token_id=tok.bos_token_id,
        eos_token_id=None,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def session_for(model: Path | str, **ask: Any) -> Any:
    """A session with the three default lanes; nothing runs yet."""
    from workbench_app.ask import DEFAULT_LANES, Ask
    from workbench_app.runner import Shelf
    from workbench_app.session import Session

    options = {"prompt": CONTEXT, "question": QUESTION, "max_new_tokens": 6, **ask}
    session = Session(Shelf(), None, Ask(model=str(model), **options))
    session.start_with(DEFAULT_LANES)
    return session


def settle(session: Any, seconds: float = 60.0) -> None:
    """Deliver the worker's messages until it has nothing more to do."""
    deadline = time.monotonic() + seconds
    while True:
        idle = session.runner.idle
        session.mailbox.drain()
        if idle and session.runner.idle:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"the worker was still busy after {seconds} s")
        time.sleep(0.005)


def ready(session: Any) -> Any:
    """Load the model and run the comparison."""
    session.load(session.draft.model, session.run)
    settle(session)
    return session
