"""From a target on the command line to a model with example inputs."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from parasym.core.checkpoint import apply_weights, check_safetensors_header, load_exported, load_weights
from parasym.core.errors import CheckpointError, InputError, MissingExtraError

__all__ = ["Loaded", "check_safetensors_header", "load_target", "require_inputs"]

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
FORMS = (
    "file.py:callable, package.module:callable, a Hugging Face folder, hf:GPT2Config?n_layer=2, a .pt2 program, "
    "or a weights file with --model"
)


@dataclass(frozen=True)
class Loaded:
    """A model ready to be audited.

    Attributes:
        model: the module, in the mode it came in.
        args: positional example inputs of its forward; may be empty.
        kwargs: keyword example inputs.
        name: what to call it.
        notes: what the user should know about how it was loaded.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name: str
    notes: tuple[str, ...] = field(default=())

    @property
    def hollow(self) -> bool:
        """Whether there are shapes without weights only: an ``hf:`` network that would take more than half the memory."""
        return any(p.device.type == "meta" for p in self.model.parameters())


def load_target(target: str, weights: Path | None = None, model: str | None = None) -> Loaded:
    """Load what ``target`` names, with its example inputs, and put ``weights`` into it.

    Args:
        target: one of
            ``path/to/file.py:callable`` or ``dotted.module:callable``, where the callable takes nothing and returns a model, or
            (model, args), or (model, args, kwargs); a module instance also serves;
            a folder with a Hugging Face ``config.json`` and safetensors weights;
            ``hf:Class``, a Transformers config or model class, with options such as ``hf:GPT2Config?n_layer=2&n_embd=64``;
            a ``.pt2`` file written by ``torch.export.save``;
            a weights file, when ``model`` is given.
        weights: a weights file to load into the model: safetensors, or a torch file of plain tensors.
        model: the target that builds the model, when ``target`` is a weights file.

    Returns:
        The model with its inputs.

    Raises:
        InputError: the target names nothing that can be used.
        CheckpointError: a file is missing, damaged, refused, or does not fit the model.
        MissingExtraError: Transformers is needed and absent.
    """
    path = Path(target)
    if path.suffix in WEIGHT_SUFFIXES and ":" not in target:
        if model is None:
            raise InputError(
                f"{target} is a weights file and says nothing about the network. Add --model TARGET, the network that it belongs to."
            )
        if weights is not None:
            raise InputError(f"Both {target} and {weights} are weights. Give one of them.")
        target, weights, path = model, path, Path(model)
    elif model is not None:
        raise InputError(f"--model is for weights files, and {target} is none. Drop --model, or give the weights file as the target.")

    if target.startswith("hf:"):
        loaded = _from_class(target.removeprefix("hf:"))
    elif path.suffix == ".pt2":
        loaded = _from_exported(path)
    elif path.is_dir():
        loaded = _from_folder(path)
    elif ":" in target:
        loaded = _from_callable(target)
    elif path.is_file():
        raise InputError(
            f"{target} is a file, but which model in it? Write {target}:callable, where callable returns the model and its inputs."
        )
    else:
        raise InputError(f"No such target: {target}. A target is {FORMS}.")

    if weights is not None and loaded.hollow:
        raise InputError(f"{target} is too large to be held here. Stream its weights: parasym audit {weights} --stream --model '{target}'.")
    if weights is not None:
        apply_weights(loaded.model, load_weights(Path(weights)), str(weights))
    return loaded


def load_on_meta(target: str, model: str | None) -> Loaded:
    """Build the network of a safetensors checkpoint on the meta device: shapes without memory.

    Args:
        target: a safetensors file, the index of its shards, or a folder that holds them; a Hugging Face folder says itself what
            its network is.
        model: the target that builds the network.

    Raises:
        InputError: ``target`` is no such checkpoint, or ``model`` is missing or cannot be built on the meta device.
        CheckpointError: there is nothing at ``target``.
    """
    path = Path(target)
    if not path.exists() and path.suffix in (".safetensors", ".json"):
        raise CheckpointError(f"No such file: {target}.")
    own = model is None and path.is_dir() and (path / "config.json").is_file()
    if not (
        own or (model is not None and (path.is_dir() or path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")))
    ):
        raise InputError(
            "Streaming reads a .safetensors file, the .index.json of its shards, or a folder of them: give it as TARGET, and the network "
            "that it belongs to as --model TARGET (a folder with a config.json needs none)."
        )
    try:
        with torch.device("meta"):
            built = _from_config(path) if model is None else load_target(model)
            return replace(built, notes=())  # no weights are made, so none are random
    except NotImplementedError as error:
        raise InputError(
            f"{model or target} cannot be built without memory: {error}. It reads values while it is made; leave --stream out."
        ) from error


def _from_callable(target: str) -> Loaded:
    found = load_object(target, "it must be a callable that returns a model, (model, args) or (model, args, kwargs)", nn.Module)
    parts = found if isinstance(found, tuple) else (found,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise InputError(f"{target}() returned ({kinds}). It must return a model, or (model, args), or (model, args, kwargs).")
    args = parts[1] if len(parts) > 1 else ()
    args = (args,) if isinstance(args, Tensor) else tuple(args) if isinstance(args, list) else args
    kwargs = parts[2] if len(parts) > 2 else {}
    if isinstance(args, Mapping) and len(parts) == 2:
        args, kwargs = (), args
    if not isinstance(args, tuple) or not isinstance(kwargs, Mapping):
        raise InputError(
            f"{target}() returned args of type {type(args).__name__} and kwargs of type {type(kwargs).__name__}. "
            "They must be a tuple and a dict."
        )
    return Loaded(parts[0], args, dict(kwargs), type(parts[0]).__name__)


def load_object(target: str, what: str, done: type | None = None) -> Any:
    """What the callable of ``file.py:callable`` or ``package.module:callable`` returns; an instance of ``done`` is not called.

    Args:
        what: it must be, for the error.

    Raises:
        InputError: there is none, it cannot be called, or it fails.
    """
    place, _, name = target.rpartition(":")
    found: Any = _import(place)
    for part in name.split("."):
        if not hasattr(found, part):
            raise InputError(f"{place} has no {name!r}.{_guess(part, dir(found))} Name a callable that it defines.")
        found = getattr(found, part)
    if done is not None and isinstance(found, done):
        return found
    if not callable(found):
        raise InputError(f"{target} is a {type(found).__name__}; {what}.")
    try:
        return found()
    except Exception as error:
        raise InputError(f"Calling {target}() failed: {type(error).__name__}: {error}. It is called without arguments; {what}.") from error


def _import(place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            if "" not in sys.path:
                sys.path.insert(0, "")
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.is_file():
            raise InputError(f"No file at {place}. Check the path in front of the colon.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
        return module
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"Importing {place} failed: {type(error).__name__}: {error}. A target is {FORMS}.") from error


def _from_exported(path: Path) -> Loaded:
    program = load_exported(path)
    if program.example_inputs is None:
        raise InputError(
            f"{path} was saved without example inputs. Export it again with torch.export.export(model, args) and torch.export.save."
        )
    args, kwargs = program.example_inputs
    return Loaded(
        program.module(), tuple(args), dict(kwargs), path.stem, ("an exported program is audited in the mode it was exported in",)
    )


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise MissingExtraError(
            "This target needs Hugging Face Transformers. Install it with: pip install 'parasym[transformers]'"
        ) from None


def _from_folder(path: Path) -> Loaded:
    if not (path / "config.json").is_file():
        raise InputError(f"{path} has no config.json, so it is no Hugging Face model folder. A target is {FORMS}.")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path} has no .safetensors file. parasym does not unpickle model.bin; convert it with model.save_pretrained(folder)."
        )
    for file in files:
        check_safetensors_header(file)
    _, config, build = _configured(path)
    try:
        model, info = build.from_pretrained(
            path,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype="auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise CheckpointError(f"Transformers could not load {path}: {type(error).__name__}: {error}") from error
    misfits = [f"{name}: file {tuple(theirs)}, model {tuple(ours)}" for name, theirs, ours in info["mismatched_keys"]]
    problems = [
        f"{len(found)} {what}: {', '.join(found[:8])}"
        for what, found in (("missing", sorted(info["missing_keys"])), ("of another shape", misfits))
        if found
    ]
    if problems:
        raise CheckpointError(
            f"The weights in {path} do not fit {type(model).__name__}: {'; '.join(problems)}. Check config.json against the weights."
        )
    unused = sorted(info["unexpected_keys"])
    notes = (f"{len(unused)} tensors in the folder are not used by {type(model).__name__}: {', '.join(unused[:4])}",) if unused else ()
    return Loaded(model.eval(), (), example_inputs(model), type(model).__name__, notes)


def _configured(path: Path) -> tuple[Any, Any, Any]:
    """(Transformers, the configuration of a folder, the class it names or the one for its kind)."""
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{path / 'config.json'} is not a model configuration that Transformers {transformers.__version__} knows: {error}"
        ) from error
    config.use_cache = False
    named = [getattr(transformers, name) for name in (config.architectures or []) if hasattr(transformers, name)]
    return transformers, config, named[0] if named else transformers.AutoModel


def _from_config(path: Path) -> Loaded:
    """The network of a Hugging Face folder without its weights."""
    _, config, build = _configured(path)
    model = build.from_config(config) if hasattr(build, "_model_mapping") else build(config)
    return Loaded(model.eval(), (), example_inputs(model), type(model).__name__)


def _from_class(spec: str) -> Loaded:
    """Build a Transformers model with random weights (seed 0) from ``Class?option=value&...``; the global RNG is left as it was."""
    name, _, query = spec.partition("?")
    transformers = _transformers()
    cls = getattr(transformers, name, None)
    if cls is None:
        raise InputError(f"Transformers {transformers.__version__} has no {name!r}.{_guess(name, dir(transformers))}")
    is_config = isinstance(cls, type) and issubclass(cls, transformers.PretrainedConfig)
    config_class = cls if is_config else getattr(cls, "config_class", None)
    if config_class is None:
        raise InputError(f"hf:{name} is neither a config nor a model class. Name one, such as hf:GPT2Config or hf:LlamaForCausalLM.")
    options = {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    default = config_class()
    known = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    for key in options:
        if key not in known:
            raise InputError(f"{config_class.__name__} has no option {key!r}.{_guess(key, known)}")
    try:
        config = config_class(**options)
        config.use_cache = False
        build = _auto_class(transformers, config).from_config if is_config else cls
        with torch.device("meta"):
            model = build(config)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if size > _memory() / 2:
            return Loaded(model.eval(), (), example_inputs(model), type(model).__name__, (_HOLLOW.format(size / 2**30),))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(config)
    except Exception as error:
        raise InputError(f"Building hf:{spec} failed: {type(error).__name__}: {error}") from error
    return Loaded(
        model.eval(),
        (),
        example_inputs(model),
        type(model).__name__,
        ("the weights are random (seed 0); give --weights to audit trained ones",),
    )


_HOLLOW = "the weights would take {:.0f} GiB: this is the architecture without weights, nothing is said of collapse"


def _memory() -> float:
    """Bytes of memory of this machine; infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


def _auto_class(transformers: Any, config: Any) -> Any:
    """Return the language-model head for decoders, else the bare model."""
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    alone = not (masked or getattr(config, "is_encoder_decoder", False))
    return transformers.AutoModelForCausalLM if causal and alone else transformers.AutoModel


def _guess(word: str, known: Iterable[str]) -> str:
    """Suggest what the user may have meant, as a sentence to append."""
    close = difflib.get_close_matches(word, sorted(known), 3)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def example_inputs(model: Any, batch: int = 4, length: int = 16) -> dict[str, Tensor]:
    """Draw inputs for a Transformers model from its configuration, with a seed of their own.

    Args:
        model: a ``transformers.PreTrainedModel``.
        batch: number of samples.
        length: tokens in a sequence, at most what the model has positions for.

    Returns:
        ``input_ids`` (batch, length), ``pixel_values`` (batch, channels, height, width), ``input_values`` (batch, 4000 samples of sound),
        ``input_features`` (batch, mel bins, frames), with ``decoder_input_ids`` (batch, length) where the model has a decoder.

    Raises:
        InputError: the model reads something this function cannot make.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    config = model.config
    inputs: dict[str, Tensor] = {}
    main = model.main_input_name
    if main == "input_ids":
        text = config.get_text_config()
        length = min(length, getattr(text, "max_position_embeddings", None) or length)
        inputs["input_ids"] = _tokens(text, batch, length, generator)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = _tokens(text, batch, length, generator)
    if main == "pixel_values" or hasattr(config, "vision_config"):
        vision = getattr(config, "vision_config", config)
        side = getattr(vision, "image_size", None) or 224
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        inputs["pixel_values"] = torch.randn(batch, getattr(vision, "num_channels", 3), height, width, generator=generator)
    if main == "input_values":
        inputs[main] = torch.randn(batch, 4000, generator=generator)
    if main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * getattr(config, "max_source_positions", 64)
        inputs[main] = torch.randn(batch, config.num_mel_bins, frames, generator=generator)
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = _tokens(config, batch, length, generator)
    if not inputs:
        raise InputError(
            f"{type(model).__name__} reads {main!r}, which cannot be drawn from its configuration. "
            "Write a function that returns (model, args, kwargs) and give it as file.py:function."
        )
    return inputs


def _tokens(config: Any, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Token ids (batch, length), none of them padding."""
    size, pad = int(config.vocab_size), getattr(config, "pad_token_id", None)
    if pad is None or not 0 <= pad < size or size < 2:
        return torch.randint(size, (batch, length), generator=generator)
    tokens = torch.randint(size - 1, (batch, length), generator=generator)
    return tokens + (tokens >= pad)


def require_inputs(loaded: Loaded) -> None:
    """Check that the example inputs fit the model's ``forward``.

    Raises:
        InputError: an input that ``forward`` needs is not there, or one is there that it does not take.
    """
    try:
        inspect.signature(loaded.model.forward).bind(*loaded.args, **loaded.kwargs)
    except TypeError as error:
        raise InputError(
            f"The example inputs do not fit {loaded.name}.forward: {error}. "
            "Let the target return (model, args) or (model, args, kwargs) with inputs such as the network sees in use."
        ) from None
