"""``wb.load``: a causal LM by house name, local folder or Hub id. safetensors only; remote code never runs.

transformers' models are imported where one is loaded: that takes over a second, and the app draws its page meanwhile.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from workbench.errors import ModelError, PromptError
from workbench.models.artifacts import Artifacts, content_hash
from workbench.models.geometry import Geometry
from workbench.models.house import HOUSE, house_path
from workbench.models.layerwise import LayerLoop

LOG = logging.getLogger(__name__)
HUB_SECONDS = 5.0  # that the Hub may take to answer before a model is looked for on this machine only


class Model:
    """A loaded causal LM.

    Attributes:
        id: the name it was loaded by; network: the transformers model; tokenizer: its tokenizer or None;
        geometry: the shape of its attention; device: where it runs;
        artifacts: what was calibrated or trained for it.
    """

    def __init__(self, id: str, network: Any, tokenizer: Any, folder: Path | None = None) -> None:
        self.id, self.network, self.tokenizer = id, network, tokenizer
        self.device = next(network.parameters()).device
        self.geometry = Geometry.of_network(network)
        self.artifacts = Artifacts(id, self.geometry, lambda: self.content_hash, folder)

    @functools.cached_property
    def content_hash(self) -> str:
        """What its artifacts know it by: see :func:`workbench.models.artifacts.content_hash`."""
        return content_hash(self.network, self.geometry)

    def __repr__(self) -> str:
        g = self.geometry
        return (
            f"<Model {self.id}: {g.num_layers} layers, {g.num_heads} heads, {g.num_kv_heads} KV heads, head_dim "
            f"{g.head_dim}, {g.dtype}, {g.bytes_per_token:,} bytes a token, on {self.device}>"
        )

    def as_dict(self) -> dict[str, Any]:
        """What results in JSON say of the model they were measured on."""
        named = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "dtype")
        return {"id": self.id, **{name: getattr(self.geometry, name) for name in named}}

    @functools.cached_property
    def loop(self) -> LayerLoop:
        """Its decoder layers, to be run one by one; ModelError where that cannot be done."""
        return LayerLoop(self.network, self.geometry)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate``; pass ``past_key_values=wb.cache(recipe, model)``."""
        return self.network.generate(*args, **kwargs)

    def encode(self, prompt: str | Sequence[int], *, continues: bool = False) -> list[int]:
        """Token ids of a prompt, checked against the vocabulary and the model's positions.

        Args:
            prompt: text, or token ids.
            continues: the text continues another one, so no beginning-of-text token is added.

        Raises:
            PromptError: empty, too long, ids out of range, or text for a model without a tokenizer.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise PromptError("The prompt is empty; write some text or choose an example.")
            if self.tokenizer is None:
                raise PromptError(f"{self.id} has no tokenizer; give the prompt as token ids.")
            ids = self.tokenizer.encode(prompt, add_special_tokens=not continues)
        else:
            ids = self._checked_ids(prompt)
        limit = self.geometry.max_positions
        if len(ids) >= limit:
            raise PromptError(
                f"The prompt has {len(ids):,} tokens, but {self.id} reads at most {limit:,} including the answer; "
                "shorten it or choose a model with a longer context."
            )
        return [int(i) for i in ids]

    def _checked_ids(self, ids: Sequence[int]) -> list[int]:
        if len(ids) == 0:
            raise PromptError("The prompt is empty; give at least one token id.")
        size = self.geometry.vocab_size
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < size:
                raise PromptError(f"Token id {i!r} is out of range; {self.id} knows ids from 0 to {size - 1}.")
        return list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; without a tokenizer, the ids themselves."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_text(self, ids: Sequence[int]) -> list[str]:
        """Every token as text on its own; a token that is part of a character is shown as its bytes."""
        if self.tokenizer is None:
            return [str(i) for i in ids]
        return [_readable(self.tokenizer, i) for i in ids]


def _readable(tokenizer: Any, token: int) -> str:
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if "\ufffd" not in text:
        return text
    raw = tokenizer.convert_ids_to_tokens(token)
    byte_of = _byte_level()
    return "".join(f"⟨0x{byte_of[c]:02X}⟩" if c in byte_of else c for c in raw)


def _byte_level() -> dict[str, int]:
    """The characters byte-level BPE writes bytes as (GPT-2's table)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {char: byte for byte, char in bytes_to_unicode().items()}


def load(name: str | Path, device: str = "auto", dtype: str = "auto") -> Model:
    """Load a causal LM.

    Args:
        name: a house name (``house/recall``), a local folder, or a Hub id.
        device: ``auto`` (CUDA where there is one, else the CPU) or a torch device.
        dtype: ``auto`` (what the checkpoint says), or float32, bfloat16, float16.

    Raises:
        ModelError: one sentence saying why it cannot be loaded and what to do.
    """
    from workbench.cache.attention import register

    register()
    transformers_logging.disable_progress_bar()
    source = _source(str(name))
    torch_dtype = _dtype(dtype)
    place = pick_device(device)
    local = isinstance(source, Path) or not _hub_answers(source)
    with _quiet():
        config = _config(str(name), source, local)
        Geometry.of(config)  # refuses models without a plain attention cache before anything is read
        if isinstance(source, Path):
            _check_weights(str(name), source)
        network = _network(str(name), source, config, torch_dtype, local)
    try:
        network = network.to(place).eval()
    except torch.cuda.OutOfMemoryError:
        raise ModelError(f"{name} does not fit on {place}; load it with device='cpu' or dtype='bfloat16'.") from None
    folder = source if isinstance(source, Path) else None
    return Model(str(name), network, _tokenizer(str(name), source, local), folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' tables about a checkpoint stay off the screen: what matters in them becomes one sentence."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _hub_answers(name: str) -> bool:
    """Whether the Hub can be asked for this id now.

    The Hub's client repeats a request that cannot be answered for half a minute, and a name server may take as long;
    this asks once and waits :data:`HUB_SECONDS`.
    """
    answered = threading.Event()

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
        except HfHubHTTPError:
            pass  # an answer all the same; from_pretrained will say which
        except Exception as error:  # whatever the transport of this version raises
            LOG.info("the Hub cannot be reached: %s", error)
            return
        answered.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS + 1)
    return answered.is_set()


def _source(name: str) -> Path | str:
    """A folder, or the Hub id itself."""
    if name in HOUSE:
        return house_path(name)
    if name.startswith("house/"):
        raise ModelError(f"There is no house model '{name}'; there is {', '.join(sorted(HOUSE))}.")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        is_file = path.exists()
    except (OSError, ValueError, RuntimeError):  # too long a name, a NUL in it, no such user
        raise ModelError(
            f"{name[:40]!r} is no model's name; give a folder, a Hub id like owner/name, or house/recall."
        ) from None
    if is_file:
        raise ModelError(f"{name} is a file; give the folder that holds config.json and the safetensors weights.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name, re.ASCII):
        raise ModelError(
            f"There is no model '{name}': no such folder, and not a Hub id like owner/name; house models: "
            f"{', '.join(sorted(HOUSE))}."
        )
    return name


def _dtype(dtype: str) -> torch.dtype | str:
    known: dict[str, torch.dtype | str] = {
        "auto": "auto",
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if dtype not in known:
        raise ModelError(f"dtype '{dtype}' is not known; use one of {', '.join(known)}.")
    return known[dtype]


def pick_device(device: str) -> torch.device:
    """``auto`` takes CUDA where there is one; ModelError for a name that is no device, or is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ModelError(f"device '{device}' is not known; use auto, cpu or cuda.") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("There is no CUDA device on this machine; use device='cpu' or 'auto'.")
    return place


def _config(name: str, source: Path | str, local: bool) -> Any:
    if isinstance(source, Path) and not (source / "config.json").is_file():
        raise ModelError(f"The folder {name} has no config.json; give a folder saved with save_pretrained.")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        LOG.info("loading the config of %s failed: %s", name, error)
        if isinstance(source, Path):
            raise ModelError(f"The config.json of {name} cannot be read as JSON; save the model again.") from None
        raise ModelError(
            f"'{name}' could not be found as a folder or on the Hub (is there a network, and is the name right?); "
            f"house models need neither: {', '.join(sorted(HOUSE))}."
        ) from None
    except Exception as error:  # a config from elsewhere may hold anything
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise ModelError(
                f"{name} needs code of its own to run, which is never executed here; choose another."
            ) from None
        raise ModelError(f"The config of {name} cannot be used ({_first_line(error)}); save the model again.") from None


def _check_weights(name: str, folder: Path) -> None:
    """Say clearly what is wrong with the weight files before transformers meets them."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.ckpt")]
        if pickles:
            raise ModelError(
                f"{name} holds only pickled weights ({pickles[0].name}), which can run code when read; convert them "
                "to safetensors with model.save_pretrained(folder)."
            )
        raise ModelError(f"The folder {name} has no weights; put its model.safetensors beside config.json.")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file.name} of {name} is damaged or incomplete ({_first_line(error)}); copy or download it again."
            ) from None


def _network(name: str, source: Path | str, config: Any, dtype: torch.dtype | str, local: bool) -> Any:
    from transformers import AutoModelForCausalLM

    from workbench.cache.attention import NAME

    try:
        network, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=NAME,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=local,
            output_loading_info=True,
        )
    except torch.cuda.OutOfMemoryError:
        raise ModelError(f"{name} does not fit into the device's memory; load it with dtype='bfloat16'.") from None
    except ValueError as error:
        if "AutoModel" in str(error) or "Unrecognized configuration" in str(error):
            raise ModelError(
                f"{name} is of type '{getattr(config, 'model_type', '?')}', which is not a causal language model; "
                "choose one that generates text from left to right."
            ) from None
        raise ModelError(f"{name} cannot be loaded: {_first_line(error)}.") from None
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ModelError(
            f"The weights of {name} do not fit its config.json ({_first_line(error)}); one of the two is wrong or "
            "damaged, so get both again from the same source."
        ) from None
    surplus = [key for key in report["unexpected_keys"] if _is_surplus_layer(key, config.get_text_config())]
    wrong = sorted(
        key if isinstance(key, str) else key[0]
        for key in (*report["missing_keys"], *report["mismatched_keys"], *surplus)
    )
    if wrong:
        raise ModelError(
            f"The weights of {name} do not fit its config.json ({len(wrong)} tensors are missing, too many or of another "
            f"shape, the first is {wrong[0]}); get both again from the same source."
        )
    return network


def _is_surplus_layer(key: str, config: Any) -> bool:
    """Whether a weight belongs to a layer that the config says is not there."""
    found = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", key)
    return found is not None and int(found[1]) >= config.num_hidden_layers


def _tokenizer(name: str, source: Path | str, local: bool) -> Any:
    if isinstance(source, Path) and not any(source.glob("tokenizer*")) and not any(source.glob("vocab*")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"The tokenizer of {name} cannot be read ({_first_line(error)}); copy its tokenizer.json again."
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")[:200]
