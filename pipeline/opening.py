"""Opening what a user wants explained: a run directory, a Hugging Face folder, a Lightning checkpoint, a live model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calig.pipeline.calibration import calibrated_options
from calig.pipeline.compose import CONFIG_FILE, load
from calig.pipeline.config import Config, shared_options, without_asked
from calig.pipeline.errors import InputError
from calig.pipeline.image_opening import load_image_folder, picture_processor, takes_pictures
from calig.pipeline.records import shards, table_metadata
from calig.pipeline.render.tokens import SEGMENTS, named_segments

if TYPE_CHECKING:
    from torch import nn

    from calig.datamodules.windows import WindowSettings

_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.bpe", "*.tiktoken")
# Some tokenizers have no limit and state a number that no list could be as long as.
_LONGEST = 1_000_000


@dataclass(frozen=True)
class Opened:
    """A model that is ready to be explained.

    Attributes:
        model: In evaluation mode unless it was given live.
        tokenizer: Of the model, with a pad token; of images the processor.
        label_names: Class names in the order of their indices.
        max_length: Tokens per text, or per window of a text; 0 for a model of images.
        windows: How longer texts are read; None: they are truncated.
        options: Method -> the options that its run explained with; none for what is not of a run.
        segments: What the two texts of pairs are called.
    """

    model: nn.Module
    tokenizer: Any
    label_names: list[str]
    max_length: int
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    segments: tuple[str, str] = SEGMENTS
    windows: WindowSettings | None = None

    @property
    def images(self) -> bool:
        """Whether the model takes images."""
        return self.max_length == 0


def source_kind(path: Path) -> str:
    """Tell what a path is: `run`, `folder` or `checkpoint`; looks only, loads nothing.

    Raises:
        InputError: It is none of these.
    """
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            return "run"
        if (path / "config.json").is_file():
            return "folder"
        problem = f"is a folder with neither {CONFIG_FILE} nor config.json"
        if (path / "adapter_config.json").is_file():
            problem = "holds a PEFT adapter alone; merge it into its model (merge_and_unload) and save the whole"
    elif path.is_file():
        if path.suffix == ".ckpt":
            return "checkpoint"
        problem = "is a file that does not end in .ckpt"
    else:
        problem = "does not exist"
    raise InputError(
        f"'{path}' {problem}. Expected a run directory of calig, a Hugging Face folder (with config.json) "
        "or a Lightning checkpoint (.ckpt) of a calig run."
    )


def open_source(source: Any, tokenizer: Any = None) -> Opened:
    """Load the model, its tokenizer and what its run knows.

    Args:
        source: A path (see `source_kind`) or a live model.
        tokenizer: Needed with a live model; elsewhere it stands in for the saved one.

    Raises:
        InputError: The source is none of these, lacks something, or holds other weights than it says.
    """
    from torch import nn

    if isinstance(source, nn.Module):
        if tokenizer is None:
            raise InputError("a live model needs its tokenizer: explain(model, texts, tokenizer=tokenizer).")
        if takes_pictures(source):
            tokenizer = picture_processor(tokenizer)
        return _opened(source, tokenizer)  # as it is: the caller's model is not changed
    if not isinstance(source, (str, Path)):
        raise InputError(f"a source is a path or a live model, got {type(source).__name__}.")
    path = Path(source)
    kind = source_kind(path)
    if kind == "folder":
        opened = _opened(*_load_folder(path, tokenizer))
    elif kind == "run":
        if not (path / "model" / "config.json").is_file():
            raise InputError(
                f"{path} has no model yet: expected {path / 'model'}, which the fit stage writes at its end. "
                f"Continue with `calig run run.resume={path}`, or name one of its checkpoints."
            )
        opened = _opened(*_load_folder(path / "model", tokenizer), run=path)
    else:
        opened = _open_checkpoint(path, tokenizer)
    return _ready(opened)


def _ready(opened: Opened) -> Opened:
    """A loaded model in evaluation mode, with a pad token in its config, on the GPU if there is one."""
    import torch

    opened.model.eval()
    config: Any = opened.model.config
    if not opened.images and config.pad_token_id is None:  # decoders refuse batches without one
        config.pad_token_id = opened.tokenizer.pad_token_id
    opened.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return opened


def open_language_model(source: Any, tokenizer: Any = None) -> Opened:
    """Load a causal language model with its tokenizer; its label names are left empty.

    Args:
        source: A Hugging Face folder or a live model.
        tokenizer: As in `open_source`.

    Raises:
        InputError: The source is neither, or holds another kind of model.
    """
    from torch import nn

    if isinstance(source, nn.Module):
        return replace(open_source(source, tokenizer), label_names=[])
    if not isinstance(source, (str, Path)):
        raise InputError(f"a source is a path or a live model, got {type(source).__name__}.")
    path = Path(source)
    if (kind := source_kind(path)) != "folder":
        what = "run directory" if kind == "run" else "checkpoint"
        raise InputError(
            f"'{path}' is the {what} of a classifier, which writes no next token. Next tokens are explained of causal "
            "language models, from a Hugging Face folder; the classifier's decision is explained without --next-token."
        )
    check_language_model(path)
    return replace(_ready(_opened(*_load_folder(path, tokenizer, causal=True))), label_names=[])


def check_language_model(path: Path) -> None:
    """Refuse a Hugging Face folder whose config says that it holds something else than a causal language model.

    Raises:
        InputError: Names what it holds.
    """
    named = _architectures(path)
    if named and not any(map(_is_causal, named)):
        hint = " Its decision is explained without --next-token." if "SequenceClassification" in named[0] else ""
        raise InputError(
            f"'{path}' holds a {', '.join(named)}, no causal language model (such as GPT2LMHeadModel, "
            f"LlamaForCausalLM), so it writes no next token.{hint}"
        )


def _architectures(path: Path) -> list[str]:
    """The class names in the config.json of a folder; none where it says none or cannot be read."""
    try:
        return list(json.loads((path / "config.json").read_text(encoding="utf8")).get("architectures") or [])
    except (OSError, ValueError, AttributeError):  # whoever loads the model says what is wrong with the file
        return []


def _is_causal(architecture: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    return architecture in KNOWN.values()


def _open_checkpoint(path: Path, tokenizer: Any) -> Opened:
    from calig.pipeline.models import load_checkpoint, load_model, load_tokenizer

    run = next((folder for folder in (path.parent.parent, path.parent) if (folder / CONFIG_FILE).is_file()), None)
    if run is None:
        raise InputError(
            f"{path} says nothing of the model's kind, and no run of calig lies around it: expected {CONFIG_FILE} in "
            f"{path.parent.parent}. Give the checkpoint of a run directory, or a Hugging Face folder."
        )
    if (run / "model" / "config.json").is_file():
        model, tokenizer = _load_folder(run / "model", tokenizer)
    elif load(run, check=False).data.modality == "image":
        raise InputError(f"{path} is of a training of images that has not ended: wait for {run / 'model'}.")
    else:  # the fit stage has not ended: what it would have written is made again from the configuration
        from calig.datamodules.text import TextDataModule
        from calig.datamodules.windows import remember_windows

        config = load(run, check=False)
        task = config.data.task or "classification"
        data = TextDataModule(
            config.data,
            tokenizer or load_tokenizer(config.model),
            vocab_size=config.model.scratch.vocab_size,
            train_kind=config.model.scratch.tokenizer,
            seed=config.seed,
            task=task,
        )
        data.setup()
        tokenizer = data.tokenizer
        model = load_model(config.model, data.label_names, tokenizer, task=task)
        remember_windows(model, data.windows)
    try:
        load_checkpoint(model, str(path))
    except InputError as error:
        raise InputError(str(error).removeprefix("model.checkpoint=")) from error
    return _opened(model, tokenizer, run=run)


def _load_folder(path: Path, tokenizer: Any, *, causal: bool = False) -> tuple[Any, Any]:
    if takes_pictures(path) and not causal:
        return load_image_folder(path, tokenizer)
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from calig.pipeline.folders import lacking, loading

    if tokenizer is None and not any(file for name in _VOCABULARIES for file in path.glob(name)):
        raise InputError(  # transformers would make a tokenizer that knows no word
            f"{path} holds no tokenizer: expected tokenizer.json or another vocabulary file. Save it there with "
            "tokenizer.save_pretrained(...), or pass tokenizer= in Python."
        )
    head: Any = AutoModelForCausalLM if causal else AutoModelForSequenceClassification
    with loading(path, "a causal language model" if causal else "a text classifier"):
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model, report = head.from_pretrained(path, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    if lacks := lacking(report):
        if causal:
            raise InputError(f"'{path}' is not a whole language model: {lacks}, so its words would be random.")
        next_token = " What it would write next is explained by --next-token."
        raise InputError(
            f"'{path}' is not a whole classifier: {lacks}, so its decisions would be random. Fine-tune it first: "
            f"calig run model.name={path} ...{next_token if any(map(_is_causal, _architectures(path))) else ''}"
        )
    return model, tokenizer


def _opened(model: Any, tokenizer: Any, run: Path | None = None) -> Opened:
    from calig.datamodules.tokenization import ensure_pad_token
    from calig.datamodules.windows import WindowSettings

    images = takes_pictures(model)
    if not images and tokenizer.pad_token_id is None:
        import copy

        tokenizer = copy.deepcopy(tokenizer)  # the caller's own stays what it is
        ensure_pad_token(tokenizer)
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    limits = [] if images else [_LONGEST, tokenizer.model_max_length, _positions(model)]
    options: Mapping[str, Mapping[str, Any]] = {}
    segments = SEGMENTS
    if run is not None:
        config = load(run, check=False)
        limits.append(config.data.max_length)
        options = _run_options(run, config)
        segments = named_segments(config.data.columns.text, config.data.columns.text_pair)
    windows = WindowSettings.of_model(getattr(model, "config", None))
    if windows is not None:
        limits.append(windows.length)
    length = 0 if images else min(limit for limit in limits if limit)
    return Opened(model, tokenizer, [str(names[i]) for i in sorted(names)], int(length), options, segments, windows)


def _positions(model: Any) -> int | None:
    """How many tokens the model has positions for; None where it states no limit."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding index.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - module.padding_idx - 1
    return limit


def _run_options(run: Path, config: Config) -> dict[str, Mapping[str, Any]]:
    """What the run explained with; where it has not yet, what its configuration says."""
    explain = config.explain
    from calig.pipeline.attribution.methods import available_methods
    from calig.pipeline.explainer import settings_for

    try:
        options = calibrated_options(explain.options, run)
    except InputError as error:  # explained all the same: a run that is still training has not got there yet
        warnings.warn(f"{error} Explained with the defaults.", stacklevel=2)
        options = without_asked(explain.options)
    found: dict[str, Mapping[str, Any]] = dict(settings_for(available_methods(), options, shared_options(explain)))
    for file in shards(run / "explanations"):
        found |= table_metadata(file).get("methods", {})
    return found
