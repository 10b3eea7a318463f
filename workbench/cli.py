"""``kvw``: the workbench on the command line.

Exit codes: 0 fine; 2 bad input, one sentence on stderr; 1 a failure or an interruption. ``KVW_DEBUG=1`` shows the
traceback of a failure. Imports that take time are made by the commands themselves, so that ``kvw --help`` is quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from workbench.errors import OutOfMemoryError, WorkbenchError

app = typer.Typer(
    name="kvw",
    help="Compare KV-cache compression methods side by side on your own prompt.",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train a house model again, or what a method needs for a model.", no_args_is_help=True)
app.add_typer(train_app, name="train")
calibrate_app = typer.Typer(help="Measure a model for the methods that need it beforehand.", no_args_is_help=True)
app.add_typer(calibrate_app, name="calibrate")

JsonFile = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE; - is standard output.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="House name, local folder, or Hub id.")]
Samples = Annotated[int, typer.Option(help="Prompts of each kind that are asked.")]
Target = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Where to write; by default beside the model, or in your data folder, where it is found again.",
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        from workbench import __version__

        print(f"kvw {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compare KV-cache compression methods side by side on your own prompt."""


@app.command("app")
def app_command(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve on; 0 takes a free one.")] = 5006,
    show: Annotated[bool, typer.Option("--show/--no-show", help="Open a browser.")] = False,
) -> None:
    """Serve the workbench on this machine; stop it with Ctrl-C."""
    from workbench.commands.serve import serve

    raise typer.Exit(serve(port, show))


@app.command()
def models(json_file: JsonFile = None) -> None:
    """List the models that need no network."""
    from workbench.commands.listing import list_models

    list_models(json_file)


@app.command()
def strategies(
    as_json: Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")] = False,
) -> None:
    """List the strategies with their parameters."""
    from workbench.commands.listing import list_strategies

    list_strategies(as_json)


@app.command()
def compare(
    model: ModelName,
    lane: Annotated[
        list[str],
        typer.Option(metavar="RECIPE", help="A recipe; repeat it for more lanes. The first is the reference."),
    ],
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A UTF-8 text file with the prompt; - is standard input.")
    ] = None,
    token_ids: Annotated[str | None, typer.Option(metavar='"1,5,9"', help="The prompt as token ids.")] = None,
    question: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Asked after the prompt was compressed; may repeat.")
    ] = None,
    first_token: Annotated[
        str,
        typer.Option(
            metavar="replayed|prefill",
            help="Where the first token comes from: the compressed cache, or the uncompressed prefill.",
        ),
    ] = "replayed",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    seed: Annotated[int, typer.Option(help="For sampling.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    device: Device = "auto",
    dtype: DType = "auto",
    chunk: Annotated[int, typer.Option(help="Prompt tokens read in one step.")] = 2048,
    kept: Annotated[bool, typer.Option("--kept", help="Include the kept positions of every head.")] = False,
    drift: Annotated[bool, typer.Option("--drift", help="Measure drift from the reference lane.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Run one prompt through several lanes and compare their answers, bytes and divergence."""
    from workbench.commands import compare as command

    options = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "temperature": temperature,
        "chunk": chunk,
        "first_token": first_token,
        "probes": ["drift"] if drift else [],
        "question": question or None,
    }
    text = command.one_prompt(prompt, prompt_file, token_ids)
    raise typer.Exit(command.run(model, text, lane, options, device, dtype, kept, json_file))


@app.command()
def inspect(
    model: ModelName,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="The prompt.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="A UTF-8 text file with the prompt; - is standard input.")
    ] = None,
    token_ids: Annotated[str | None, typer.Option(metavar='"1,5,9"', help="The prompt as token ids.")] = None,
    layer: Annotated[
        list[int] | None, typer.Option(metavar="N", help="A layer to count; may repeat. All if none is named.")
    ] = None,
    sinks: Annotated[int, typer.Option(help="How many first tokens count as attention sinks.")] = 4,
    top: Annotated[int, typer.Option(help="Tokens to name per head in the JSON.")] = 8,
    device: Device = "auto",
    dtype: DType = "auto",
    chunk: Annotated[int, typer.Option(help="Prompt tokens read in one step.")] = 2048,
    json_file: JsonFile = None,
) -> None:
    """Read a prompt and count what every head attends to, without a matrix of all pairs of tokens."""
    from workbench.commands.compare import one_prompt
    from workbench.commands.inspect import run as command

    options = {"sinks": sinks, "chunk": chunk}
    text = one_prompt(prompt, prompt_file, token_ids)
    raise typer.Exit(command(model, text, layer, options, top, device, dtype, json_file))


@train_app.command("recall")
def train_recall(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the checkpoint and the model.")],
    minutes: Annotated[
        float | None, typer.Option(help="Training time; 60 if neither this nor --steps is given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of minutes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in DIR.")] = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Decides the weights and the data.")] = 0,
) -> None:
    """Train house/recall. Ctrl-C leaves a checkpoint to go on from."""
    from workbench.commands.train import recall

    raise typer.Exit(recall(out, minutes, steps, resume, device, seed))


@train_app.command("locret")
def train_locret(
    model: Annotated[str, typer.Option(metavar="MODEL", help="House name, local folder, or Hub id.")],
    out: Target = None,
    steps: Annotated[int | None, typer.Option(help="Training texts; 3,000 if not given.")] = None,
    width: Annotated[
        int | None,
        typer.Option(help="Of the hidden layer; if not given 1,024, or half of a smaller model's hidden size."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint beside FILE.")] = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Decides the heads' first weights and the texts.")] = 0,
) -> None:
    """Train Locret's retaining heads for a model. Ctrl-C leaves a checkpoint to go on from."""
    from workbench.commands.train import locret

    raise typer.Exit(locret(model, out, steps, width, resume, device, seed))


@calibrate_app.command("compresskv")
def calibrate_compresskv(
    model: ModelName,
    samples: Samples = 120,
    out: Target = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Find the heads that read what answers, and how much each layer suffers from a very small cache."""
    from workbench.commands.calibrate import calibrate

    raise typer.Exit(calibrate("compresskv", model, samples, out, device, dtype))


@calibrate_app.command("headkv")
def calibrate_headkv(
    model: ModelName,
    samples: Samples = 120,
    out: Target = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Find out how often each head looks at the very token that is copied."""
    from workbench.commands.calibrate import calibrate

    raise typer.Exit(calibrate("headkv", model, samples, out, device, dtype))


@calibrate_app.command("rotatekv")
def calibrate_rotatekv(
    model: ModelName,
    samples: Samples = 80,
    out: Target = None,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Measure how large each channel of the rotated keys is, for the order in which channels share scales."""
    from workbench.commands.calibrate import calibrate

    raise typer.Exit(calibrate("rotatekv", model, samples, out, device, dtype))


@app.command()
def bench(
    subject: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SUBJECT]…",
            help="speed, bytes, kernels, load, rerun, app (these if none is named); eviction, accuracy, inspect, which take longer.",
        ),
    ] = None,
    recipe: Annotated[list[str] | None, typer.Option(metavar="RECIPE", help="Recipes for speed; may repeat.")] = None,
    length: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Prompt tokens for speed, kernels and inspect; may repeat.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Interleaved repetitions.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Methods for eviction and accuracy; may repeat.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Documents for accuracy; 100 if not given.")] = None,
    kvpress_python: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Python of an environment with kvpress, for eviction to measure against."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: to see that it works, not to measure.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure speed, bytes and latency against the full cache and plain transformers, eviction also against kvpress."""
    from workbench.commands.measure import measure

    raise typer.Exit(measure(subject or [], recipe, length, rounds, quick, json_file, method, samples, kvpress_python))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; every expected failure is one sentence on stderr. Returns the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        code = int(app(arguments, prog_name="kvw", standalone_mode=False) or 0)
        return code if code in (0, 1, 2) else _say("Interrupted.", 1)  # typer's own code for Ctrl-C is 130
    except WorkbenchError as error:
        return _say(str(error), 1 if isinstance(error, OutOfMemoryError) else 2)
    except (KeyboardInterrupt, typer.Abort):
        return _say("Interrupted.", 1)
    except BrokenPipeError:  # whoever read our output has gone
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        usage = getattr(error, "format_message", None)  # what typer raises for a wrong command line
        if usage is not None:
            return _say(_sentence(usage()) or "Give a command; kvw --help lists them.", 2)
        if os.environ.get("KVW_DEBUG"):
            raise
        return _say(
            f"Something unexpected failed ({type(error).__name__}: {_one_line(error)}); KVW_DEBUG=1 shows where.", 1
        )


def main() -> None:
    """Entry point of ``kvw``."""
    sys.exit(run())


def _sentence(text: str) -> str:
    return text if not text or text[-1] in ".!?" else text + "."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or "no message"


def _say(sentence: str, code: int) -> int:
    print(" ".join(sentence.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
