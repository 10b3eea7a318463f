"""``kvw compare``: the prompt from one place, the run with its progress and its cancel, the result as JSON or table."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from workbench.commands.output import STDOUT, check_target, console, size, stderr, write_result
from workbench.errors import PromptError, StorageError

if TYPE_CHECKING:
    from workbench.runs.control import Control
    from workbench.runs.events import AnyEvent
    from workbench.runs.lane import Answer, Comparison, Lane

MOST_BYTES = 256 << 20  # of a prompt file: far beyond what any model here reads


def one_prompt(prompt: str | None, prompt_file: str | None, token_ids: str | None) -> str | list[int]:
    """The prompt from the one place it was given; PromptError where there is none, or more than one."""
    given = [
        name
        for name, value in (("--prompt", prompt), ("--prompt-file", prompt_file), ("--token-ids", token_ids))
        if value is not None
    ]
    if len(given) != 1:
        came = f"{' and '.join(given)} were given" if given else "there is none"
        raise PromptError(f"Give the prompt once, as --prompt, --prompt-file or --token-ids; {came}.")
    if prompt is not None:
        return prompt
    return read_prompt(prompt_file) if prompt_file is not None else parse_ids(token_ids or "")


def read_prompt(file: str) -> str:
    """The text of a UTF-8 file, or of standard input for ``-``."""
    try:
        if file == STDOUT:
            raw = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with Path(file).expanduser().open("rb") as opened:
                raw = opened.read(MOST_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(f"The prompt file {file} cannot be read ({reason}); give a text file.") from None
    if len(raw) > MOST_BYTES:
        raise PromptError(f"The prompt file {file} is larger than {size(MOST_BYTES)}; give a shorter text.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PromptError(f"The prompt file {file} is not UTF-8 text; save it as UTF-8.") from None


def parse_ids(text: str) -> list[int]:
    """Token ids from "1,5,9"."""
    ids = []
    for piece in text.replace("[", "").replace("]", "").split(","):
        if not piece.strip():
            continue
        try:
            ids.append(int(piece))
        except ValueError:
            raise PromptError(
                f"Token ids are whole numbers with commas between them, like 1,5,9; '{piece.strip()[:40]}' is none."
            ) from None
    return ids


def run(
    model: str,
    prompt: str | list[int],
    lanes: Sequence[str],
    options: dict[str, Any],
    device: str,
    dtype: str,
    kept: bool,
    json_file: str | None,
) -> int:
    """Run the comparison; 0, or 1 where a lane failed or the run was interrupted (what was computed is written)."""
    from workbench.models.load import load
    from workbench.runs.compare import Run
    from workbench.strategies.recipe import Recipe

    check_target(json_file)
    recipes = [Recipe.parse(text) for text in lanes]  # a slip is told before a large model loads
    work = Run(load(model, device, dtype), prompt, recipes, **options)
    with interruptible(work.control):
        _follow(work.events(), len(work.prompt), work.lanes, work.settings.sampling.max_new_tokens)
    result = work.comparison()
    if json_file is None:
        show(result)
    else:
        write_result(json_file, result.as_dict(kept=kept))
    failed = [lane for lane in result if lane.error]
    for lane in failed:
        print(f"The lane {lane.recipe} failed: {lane.error}", file=sys.stderr)
    if work.control.cancelled:
        print("Interrupted; this is what was computed until then.", file=sys.stderr)
    return 1 if failed or work.control.cancelled else 0


@contextmanager
def interruptible(control: Control) -> Iterator[None]:
    """Ctrl-C cancels the run at its next token or chunk; a second one stops at once."""

    def cancel(number: int, frame: FrameType | None) -> None:
        if control.cancelled:
            raise KeyboardInterrupt
        control.cancel()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _follow(events: Iterator[AnyEvent], prompt_tokens: int, lanes: Sequence[Lane], new_tokens: int) -> None:
    """Consume the run; a bar per lane on stderr where that is a terminal."""
    from workbench.runs.events import LaneDone, PrefillProgress, Queued, Token

    out = stderr()
    if not out.is_terminal:
        for _ in events:
            pass
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[doing]}"), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        total = prompt_tokens + new_tokens * len(lanes[0].answers)
        bars = [progress.add_task(escape(lane.recipe), total=total, doing="waiting", start=False) for lane in lanes]
        for event in events:
            bar = bars[event.lane]
            if isinstance(event, PrefillProgress):
                progress.start_task(bar)
                progress.update(bar, completed=event.done, doing=f"prompt {event.done:,} of {event.total:,}")
            elif isinstance(event, Token):
                progress.update(bar, advance=1, doing=f"token {event.index + 1:,}")
            elif isinstance(event, Queued):
                progress.update(bar, doing=f"{event.ahead} before this one")
            elif isinstance(event, LaneDone):
                progress.update(bar, completed=total, doing=str(event.result.stopped))
                progress.stop_task(bar)


def show(result: Comparison) -> None:
    """The comparison as a table, and the answers below it."""
    out = console()
    model, g = result.model.id, result.model.geometry
    out.print(
        f"{model}: {g.num_layers} layers, {g.num_kv_heads} KV heads, {g.dtype}; {len(result.prompt):,} prompt tokens",
        markup=False,
    )
    table = Table(
        "lane", "cache", "of reference", "KL mean (nats)", "same top token", "first divergence", "prefill", "decode"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for number, lane in enumerate(result):
        first = lane.answers[0]
        name = lane.resolved + (" (reference)" if number == result.reference else "")
        table.add_row(
            escape(name),
            size(lane.memory.used_bytes) if lane.memory.used_bytes else "-",
            f"{lane.memory.ratio:.1%}" if lane.memory.ratio is not None else "-",
            f"{first.kl_mean:.4g}" if first.kl_mean is not None else "-",
            f"{first.top1_agreement:.1%}" if first.top1_agreement is not None else "-",
            _divergence(first, number == result.reference),
            f"{lane.seconds['prefill']:.2f} s",
            f"{lane.seconds['decode']:.2f} s",
        )
    out.print(table)
    for question in range(len(result[0].answers)):
        asked = result[0].answers[question].question
        out.print(f"\nQuestion: {asked}" if asked is not None else "", markup=False)
        for number, lane in enumerate(result):
            answer = lane.answers[question]
            said = lane.error or answer.text.strip() or "(nothing)"
            out.print(f"[{number}] {lane.recipe} ({answer.stopped}): {said}", markup=False)
    out.print("\n" + protocol(result), markup=False)


def protocol(result: Comparison) -> str:
    """One sentence on how the lanes were asked: it decides what the numbers mean."""
    if result[0].answers[0].question is not None:
        return "Query-agnostic: the questions came after the prompt was compressed."
    if result[0].first_token == "replayed":
        return (
            "Query-aware: the strategies saw the whole prompt; the first token comes from the compressed cache "
            "(first token: replayed)."
        )
    return (
        "Query-aware: the strategies saw the whole prompt; the first token comes from the uncompressed prefill, so short "
        "answers hide losses (first token: prefill)."
    )


def _divergence(answer: Answer, is_reference: bool) -> str:
    if is_reference or answer.kl is None:
        return "-"
    return "never" if answer.first_divergence is None else f"token {answer.first_divergence}"
