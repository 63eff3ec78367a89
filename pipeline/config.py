"""The configuration schema: one dataclass per section, with type, default, range and a line of help for every key.

Light on purpose (no torch, lightning or transformers), so that ``calig --help`` answers at once. ``compose.py`` fills
the schema from YAML files and the command line, ``validate.py`` holds what a value must satisfy.
"""

# ruff: noqa: RUF009  (_key returns a dataclass field)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from calig.pipeline.metrics.names import DEFAULT_METRICS, PerturbationTarget
from calig.pipeline.tasks import Task

KNOWN_STAGES = ("pretrain", "fit", "test", "calibrate", "explain", "benchmark", "concepts", "report")
"""The stages that ``stages`` may name; ``calibrate`` is passed over where no option asks for it."""

ASKED_STAGES = ("pretrain", "concepts")
"""Stages that run only where ``stages`` names them."""

CALIBRATED: dict[str, dict[str, tuple[str, ...]]] = {"ca_lig": {"lam": ("auto", "per_layer"), "fusion": ("auto",)}}
"""Method -> option -> the words by which ``explain.options`` leaves its value to the stage ``calibrate``."""

CALIBRATION_FILE = "calibration.json"
"""The file of a run directory that keeps what the stage ``calibrate`` has chosen."""

BUILT_IN = {"text": "controlled", "image": "scenes"}
"""Modality -> the ``data.name`` of the data that are generated."""

GROUPS = ("model", "data", "explain", "trainer", "logger")
"""The sections that ``group=option`` fills from a file of ``configs/<group>/``."""

Operator = Literal["mask", "delete", "attention", "blur", "mean", "drop"]
Tokenizer = Literal["wordpiece", "byte_bpe"]
PostPart = Literal["headers", "quotes", "signatures"]


def _key(default: Any, help: str, **limits: float) -> Any:
    """Declare a key. ``limits``: ``low``/``high`` are allowed bounds, ``above``/``below`` are excluded ones."""
    metadata = {"help": help, "limits": limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunConfig:
    """Where the run is kept."""

    dir: str | None = _key(None, "run directory (null: runs/<name>)")
    name: str | None = _key(None, "name of the run, also in Weights & Biases (null: the experiment's name)")
    resume: str | None = _key(None, "run directory to continue")
    overwrite: bool = _key(False, "delete the run directory if it exists")


@dataclass
class ScratchConfig:
    """The model that is trained from scratch where ``model.name`` is null."""

    type: str = _key("bert", "Hugging Face model type; of images vit, deit, beit, dinov2 or vit_mae")
    layers: int = _key(4, "number of blocks", low=1)
    width: int = _key(96, "hidden width, a multiple of heads", low=1)
    heads: int = _key(4, "attention heads per block", low=1)
    intermediate: int | None = _key(None, "width inside the feed-forward part (null: 4 * width)", low=1)
    vocab_size: int = _key(2000, "size of the vocabulary trained on the training split", low=16)
    tokenizer: Tokenizer = _key(
        "wordpiece", "what is trained there: wordpiece (lower-cased), or byte_bpe (any script; decoders)"
    )
    max_positions: int = _key(512, "longest input in tokens", low=2)
    image_size: int = _key(32, "side that images are resized to, a multiple of patch_size", low=2)
    patch_size: int = _key(4, "side of the patches that an image is cut into, in pixels", low=1)
    dropout: float = _key(0.1, "dropout of hidden states and attention", low=0, below=1)
    initializer_range: float = _key(0.02, "standard deviation of the initial weights", above=0)


@dataclass
class AdapterConfig:
    """LoRA adapters (PEFT): small matrices are trained beside frozen weights and merged into them at the end."""

    r: int | None = _key(None, "rank of the adapters; turns them on (null: every weight is trained)", low=1)
    alpha: float | None = _key(None, "scale of the adapters, divided by r (null: 2 * r)", above=0)
    dropout: float = _key(0.0, "dropout in front of the adapters", low=0, below=1)
    target_modules: list[str] | None = _key(
        None, "names of the linear layers that get adapters (null: PEFT's choice for the family, else all)"
    )


@dataclass
class ModelConfig:
    """The classifier and how it is optimised."""

    name: str | None = _key(None, "hub name or local folder, of a model or an adapter (null: model.scratch)")
    checkpoint: str | None = _key(None, "Lightning checkpoint or Hugging Face folder to load weights from")
    revision: str | None = _key(None, "branch, tag or commit on the hub")
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    peft: AdapterConfig = field(default_factory=AdapterConfig)
    class_weights: list[float] | Literal["balanced"] | None = _key(
        None, "weights of the classes in the loss (multi_label: of the positives), or balanced: the rarer, the heavier"
    )
    label_smoothing: float = _key(0.0, "share of the target spread over all classes", low=0, below=1)
    gradient_checkpointing: bool = _key(False, "recompute blocks in the backward pass: less memory, more time")
    compile: bool = _key(False, "torch.compile for training and evaluation; explanations run uncompiled")
    lr: float = _key(5e-5, "peak learning rate of AdamW", above=0)
    weight_decay: float = _key(0.01, "weight decay of AdamW (not on biases and norms)", low=0)
    warmup: float = _key(0.1, "fraction of all steps over which the learning rate rises", low=0, high=1)
    schedule: Literal["linear", "cosine", "constant"] = _key("linear", "course of the learning rate after warm-up")
    early_stopping: int | None = _key(None, "stop after this many validations without progress (null: never)", low=1)
    monitor: str | None = _key(
        None,
        "scalar that picks the best checkpoint and stops early (null: val/accuracy; val/f1_micro of multi_label, "
        "val/pearson of regression)",
    )
    threshold: float | None = _key(
        None,
        "multi_label: probability from which a label is predicted (null: the model's own, else 0.5)",
        above=0,
        below=1,
    )


@dataclass
class ColumnsConfig:
    """Names of the columns (their numbers, from 0, where ``data.header`` is false)."""

    text: str | None = _key(None, "column of the text or of its list of words (null: found by name)")
    text_pair: str | None = _key(None, "column of the second text of a pair")
    label: str | None = _key(None, "column of the label, or conllu comment (null: found by name)")
    indicators: list[str] | None = _key(None, "multi_label: columns of 0 and 1, one per label, in place of label")
    rationale: str | None = _key(
        None, "column of the evidence: 0 or 1 per word, or [start, end) pairs of words (word lists) or characters"
    )
    image: str | None = _key(None, "column of the images, as paths or bytes (null: found by name)")
    mask: str | None = _key(None, "column of masks of the deciding object, as paths, bytes or rows of 0 and 1")
    boxes: str | None = _key(None, "column of boxes around the deciding object: [left, top, right, bottom] in pixels")


@dataclass
class SizeConfig:
    """Sentences (scenes) per split of the generated data."""

    train: int = _key(20000, "training sentences or scenes", low=1)
    val: int = _key(800, "validation sentences or scenes", low=1)
    test: int = _key(1500, "test sentences or scenes", low=1)


@dataclass
class WindowsConfig:
    """Texts longer than ``data.max_length`` in overlapping windows of that length; without them they are truncated."""

    overlap: int | None = _key(
        None, "tokens that a window has in common with the next; turns windows on (null: truncate)", low=0
    )
    pooling: Literal["mean", "max"] = _key("mean", "how the logits of the windows become those of the text, per class")
    limit: int | None = _key(16, "most windows per text; what lies behind them is cut off (null: no end)", low=1)


@dataclass
class DataConfig:
    """The data set, its columns and its batches."""

    modality: Literal["text", "image"] = _key("text", "what is classified")
    name: str | None = _key(
        None, "controlled (sentences with planted evidence), scenes (images of that kind) or a data set of the hub"
    )
    path: str | None = _key(
        None,
        "file, folder with train/val/test files (csv, tsv, json, jsonl, parquet, arrow, conllu, tar.gz, zip), "
        "folder of save_to_disk, or folder of class folders (texts or images)",
    )
    config: str | None = _key(None, "configuration of a hub data set that has several")
    revision: str | None = _key(None, "branch, tag or commit of the hub data set")
    task: Task | None = _key(
        None, "what is learnt of a text (null: that of a model that is trained already, else classification)"
    )
    header: bool = _key(True, "the first line of a csv or tsv names the columns")
    quoted: bool | None = _key(None, "quotes in a csv or tsv enclose a field (null: csv yes, tsv no)")
    strip_quotes: bool = _key(False, "take the quotes off texts that stand in quotes as a whole")
    label_map: dict[str, str] | None = _key(None, "label in the data: class name; merges, renames and orders classes")
    keep_labels: list[str] | None = _key(None, "labels in the data whose rows are used (null: all)")
    remove: list[PostPart] = _key(
        [], "parts taken off posts and mails, which name their class: any of headers, quotes, signatures"
    )
    max_length: int = _key(128, "longest input in tokens", low=4)
    windows: WindowsConfig = field(default_factory=WindowsConfig)
    limit_train: int | None = _key(None, "use this many training examples", low=1)
    limit_val: int | None = _key(None, "use this many validation examples", low=1)
    limit_test: int | None = _key(None, "use this many test examples", low=1)
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    batch_size: int = _key(32, "examples per training batch and process", low=1)
    eval_batch_size: int | None = _key(None, "examples per evaluation batch (null: batch_size)", low=1)
    num_workers: int = _key(0, "loader processes", low=0)
    val_fraction: float = _key(
        0.1, "share cut from the training data where there is no validation split", above=0, below=1
    )
    test_fraction: float = _key(0.1, "share cut from the training data where there is no test split", above=0, below=1)
    size: SizeConfig = field(default_factory=SizeConfig)
    annotations: str | None = _key(None, "COCO file with the deciding objects of images, by file name")
    on_corrupt: Literal["raise", "skip"] = _key("raise", "images that cannot be read: end the run, or leave them out")
    augment: Literal["none", "flip", "crop_flip"] = _key(
        "none", "change training images in every epoch: mirrored at random, and shifted by up to an eighth"
    )


@dataclass
class PretrainConfig:
    """The stage pretrain: a masked autoencoder on the training images, whose encoder fit starts from."""

    epochs: int = _key(100, "epochs over the training images", low=1)
    mask_ratio: float = _key(0.75, "share of the patches that is hidden", above=0, below=1)
    norm_pix_loss: bool = _key(True, "reconstruct each patch relative to its own mean and deviation")
    decoder_layers: int = _key(4, "blocks of the decoder, which is thrown away", low=1)
    decoder_width: int = _key(192, "hidden width of the decoder, a multiple of decoder_heads", low=1)
    decoder_heads: int = _key(4, "attention heads per block of the decoder", low=1)
    lr: float = _key(1.5e-3, "peak learning rate of AdamW", above=0)
    weight_decay: float = _key(0.05, "weight decay of AdamW (not on biases and norms)", low=0)
    warmup: float = _key(0.1, "fraction of all steps over which the learning rate rises", low=0, high=1)


@dataclass
class ExplainConfig:
    """What the explain stage computes."""

    methods: list[str] = _key(
        ["ca_lig", "integrated_gradients", "generic_attention", "attention_rollout", "input_x_gradient", "random"],
        "attribution methods; the first is the primary one",
    )
    split: Literal["train", "val", "test"] = _key("test", "split that is explained")
    num_samples: int | None = _key(300, "seeded sample of the split (null: all of it)", low=1)
    batch_size: int = _key(16, "examples per batch", low=1)
    batches_per_shard: int = _key(20, "batches between two files of results: what a crash can lose", low=1)
    steps: int | Literal["auto"] = _key("auto", "quadrature nodes; auto refines until tolerance", low=2)
    tolerance: float = _key(0.02, "allowed completeness error of steps=auto, relative to the output change", above=0)
    max_steps: int = _key(129, "most nodes of steps=auto, which starts with 9", low=9)
    max_tokens_per_pass: int | Literal["auto"] = _key(
        "auto", "memory budget, rows times tokens; auto halves where memory runs out", low=1
    )
    target: int | Literal["predicted", "label"] = _key(
        "predicted", "class that is explained; of several labels per text each that is predicted or given", low=0
    )
    operator: list[Operator] | Operator = _key(
        "mask",
        "how the metrics remove tokens or patches; one or a list (images: blur too; mean is mask, drop is delete)",
    )
    metrics: list[str] = _key(
        list(DEFAULT_METRICS),
        "metrics of perturbed inputs and repeated explanations; those of rationales are always on",
    )
    limits: dict[str, int | None] = _key(
        {"infidelity": 50, "sensitivity_max": 50, "randomisation": 50},
        "metric, operator, method or method/metric (sensitivity_max, randomisation): how many of the samples it is "
        "used on, a seeded choice (null: all)",
    )
    flows: int | None = _key(
        0, "samples whose flow from token to token is kept, by methods that know one (lig); a seeded choice", low=0
    )
    perturbation_target: PerturbationTarget = _key(
        "prediction", "class whose accuracy positive_auc and negative_auc follow"
    )
    strict: bool = _key(False, "end the stage at the first sample that fails")
    options: dict[str, dict[str, Any]] = _key({}, "explain.options.<method>.<option>; see `calig methods`")


@dataclass
class CalibrateConfig:
    """How the stage calibrate chooses what ``explain.options`` leaves to it (``lam: auto``)."""

    split: Literal["train", "val", "test"] = _key("val", "split to choose on; never the one that is explained")
    num_samples: int | None = _key(200, "seeded sample of the split (null: all of it)", low=1)
    objective: Literal["comprehensiveness - sufficiency", "comprehensiveness", "sufficiency", "token_f1", "auprc"] = (
        _key("comprehensiveness - sufficiency", "what the choice makes best on average; the last two need rationales")
    )
    operator: Operator = _key("delete", "how the objective removes tokens; never the only one of explain.operator")
    grid: list[float] = _key([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], "values of lam to try")


@dataclass
class ConceptsConfig:
    """What the stage concepts tests: how the output of a class depends on concepts, over many inputs."""

    sets: dict[str, str | dict[str, str]] = _key(
        {}, "name: FILE of example texts (a line each, or a table), or {column: value} of the data set"
    )
    random_sets: int = _key(10, "sets of random examples beside each concept", low=10)
    set_size: int = _key(50, "examples of a set; all sets have as many, at most what the smallest concept has", low=10)
    split: Literal["train", "val", "test"] = _key("test", "split whose inputs are analysed")
    num_samples: int | None = _key(300, "seeded sample of the split (null: all of it)", low=1)
    target: int | Literal["all"] = _key("all", "class whose inputs are analysed, as they are predicted", low=0)
    weights: Literal["attention", "rollout", "mean"] = _key(
        "attention", "how the tokens of an input are weighted; mean is plain TCAV and needs no attention maps"
    )
    layers: list[int] | None = _key(None, "layers to test, from 0, the embedding output (null: all)")


@dataclass
class ProbeConfig:
    """The attribution probe that runs during training."""

    enabled: bool = _key(True, "explain a fixed set of validation samples during training")
    method: str = _key("ca_lig", "attribution method")
    num_samples: int = _key(64, "validation samples", low=1)
    every_n_epochs: int = _key(1, "epochs between two probes", low=1)
    steps: int = _key(16, "quadrature nodes", low=2)


@dataclass
class CheckpointConfig:
    """What a training that is broken off can lose; the end of every epoch is kept in any case."""

    every_n_minutes: float | None = _key(15.0, "minutes between two checkpoints within an epoch (null: none)", above=0)
    every_n_steps: int | None = _key(None, "optimiser steps between two checkpoints within an epoch", low=1)


ARTIFACTS = ("explanations", "model", "report")


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = _key("offline", "offline writes to the run directory only")
    project: str = _key("calig", "project")
    entity: str | None = _key(None, "user or team (null: the account's default)")
    tags: list[str] = _key([], "tags of the run")
    group: str | None = _key(None, "runs of one group are compared together (null: WANDB_RUN_GROUP, else none)")
    job_type: str | None = _key(None, "kind of run within its group (null: train with the stage fit, else evaluate)")
    artifacts: list[str] = _key(
        list(ARTIFACTS), f"what is logged as artifacts at the end: any of {', '.join(ARTIFACTS)}"
    )


@dataclass
class LoggerConfig:
    """Loggers beside metrics.csv, which is always written."""

    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class Config:
    """The whole configuration of a run."""

    seed: int = _key(0, "seed of weights, data order, samples and random attributions", low=0, high=2**32 - 1)
    stages: list[str] = _key([stage for stage in KNOWN_STAGES if stage not in ASKED_STAGES], "stages in order")
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    explain: ExplainConfig = field(default_factory=ExplainConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    concepts: ConceptsConfig = field(default_factory=ConceptsConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    # Lightning's own default is 1000 epochs; 3 and clipping at 1 are what fine-tuning a BERT usually takes.
    trainer: dict[str, Any] = _key(
        {"max_epochs": 3, "gradient_clip_val": 1.0}, "trainer.<argument of lightning.Trainer>"
    )
    logger: LoggerConfig = field(default_factory=LoggerConfig)


def asked_options(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Find what ``explain.options`` leaves to the stage calibrate: method -> option -> word."""
    found = {
        method: {name: given[name] for name, words in names.items() if given.get(name) in words}
        for method, names in CALIBRATED.items()
        if (given := options.get(method))
    }
    return {method: names for method, names in found.items() if names}


def shared_options(config: ExplainConfig) -> dict[str, Any]:
    """The options that the section gives to every method that takes them."""
    return {"steps": config.steps, "tolerance": config.tolerance, "max_steps": config.max_steps}


def without_asked(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Leave out what the stage calibrate is to choose: the method's defaults stand in its place."""
    asked = asked_options(options)
    return {
        method: {name: value for name, value in given.items() if name not in asked.get(method, {})}
        for method, given in options.items()
    }


class KeyHelp(NamedTuple):
    """One key of the schema, in words."""

    key: str
    type: str
    default: str
    help: str


@cache
def hints(section: type) -> dict[str, Any]:
    """Return the resolved type of every key of a section."""
    return get_type_hints(section)


def describe_schema(section: type = Config, prefix: str = "") -> list[KeyHelp]:
    """List every key with its type, default (as one would type it) and help, in the schema's order."""
    rows: list[KeyHelp] = []
    defaults = section()
    for item in fields(section):
        key, hint = f"{prefix}{item.name}", hints(section)[item.name]
        if is_dataclass(hint):
            rows += describe_schema(hint, f"{key}.")  # type: ignore[arg-type]  # a class, not an instance
        else:
            rows.append(KeyHelp(key, type_name(hint), show(getattr(defaults, item.name)), item.metadata["help"]))
    return rows


def type_name(hint: Any) -> str:
    """Spell a type as a user reads it: ``int | auto``, ``list[str]``, ``str | null``.

    Classes that no YAML value can have are left out of unions.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        names = [type_name(arg) for arg in args if arg is NoneType or get_origin(arg) or arg in _PLAIN]
        return " | ".join(dict.fromkeys(name for name in names if name))
    if origin is Literal:
        return " | ".join(str(arg) for arg in args)
    if origin in (list, tuple, dict):
        inner = ", ".join(type_name(arg) for arg in args if arg is not Ellipsis)
        return f"{'dict' if origin is dict else 'list'}[{inner}]"
    if origin is not None:
        return ""
    return str({NoneType: "null", Any: "any"}.get(hint) or getattr(hint, "__name__", hint))


def show(value: Any) -> str:
    """Spell a value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(show, value)) + "]"
    return str(value)


_PLAIN = (bool, int, float, str, list, dict, Any)
