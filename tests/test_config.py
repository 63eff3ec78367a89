"""Configuration: every YAML composes, the order of the layers, and one clear error for everything that can be wrong."""

import re
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import pytest

from calig.pipeline.compose import CONFIG_FILE, compose, load, options, save, to_yaml
from calig.pipeline.config import ASKED_STAGES, GROUPS, KNOWN_STAGES, Config, ExplainConfig, describe_schema
from calig.pipeline.errors import InputError

NEEDS_PATH = (("data", "files"), ("data", "image_files"))
OF_IMAGES = {
    "data": {"scenes", "cifar10", "mnist", "image_files"},
    "model": {"vit_tiny", "mae_tiny", "mae_small_patch4"},
}
KEYS = {
    "": "seed stages trainer",
    "run.": "dir name resume overwrite",
    "model.": "name checkpoint revision class_weights label_smoothing gradient_checkpointing compile "
    "lr weight_decay warmup schedule early_stopping monitor threshold",
    "model.peft.": "r alpha dropout target_modules",
    "model.scratch.": "type layers width heads intermediate vocab_size tokenizer max_positions image_size patch_size "
    "dropout initializer_range",
    "data.": "modality name path config revision task header quoted strip_quotes label_map keep_labels remove "
    "max_length limit_train limit_val limit_test batch_size eval_batch_size num_workers val_fraction test_fraction "
    "annotations on_corrupt augment",
    "pretrain.": "epochs mask_ratio norm_pix_loss decoder_layers decoder_width decoder_heads lr weight_decay warmup",
    "data.columns.": "text text_pair label indicators rationale image mask boxes",
    "data.windows.": "overlap pooling limit",
    "data.size.": "train val test",
    "explain.": "methods split num_samples batch_size batches_per_shard steps tolerance max_steps max_tokens_per_pass "
    "target operator metrics limits flows perturbation_target strict options",
    "calibrate.": "split num_samples objective operator grid",
    "concepts.": "sets random_sets set_size split num_samples target weights layers",
    "probe.": "enabled method num_samples every_n_epochs steps",
    "checkpoint.": "every_n_minutes every_n_steps",
    "logger.wandb.": "mode project entity tags group job_type artifacts",
}


def put(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(*overrides, check=False):
    with pytest.raises(InputError) as caught:
        compose(overrides, check=check)
    return str(caught.value)


# --- every YAML of the folder


def test_every_yaml_is_an_option():
    root = Path(__file__).parents[1] / "configs"
    on_disk = {(path.parent.name, path.stem) for path in root.glob("*/*.yaml")}
    offered = {(group, name) for group in (*GROUPS, "experiment", "debug") for name in options(group)}
    assert on_disk == offered
    assert not list(root.rglob("*.yml"))


@pytest.mark.parametrize(
    ("group", "option"),
    [(group, option) for group in (*GROUPS, "experiment", "debug") for option in options(group)],
)
def test_every_yaml_composes(group, option):
    extra = ["data.path=somewhere.csv"] if (group, option) in NEEDS_PATH else []
    if group == "data":  # the default model takes shorter texts than some data sets have
        extra.append("model.scratch.max_positions=512")
    if option in OF_IMAGES.get(group, ()):
        extra.append("data=scenes" if group == "model" else "model=vit_tiny")
    config = compose([f"{group}={option}", *extra], check=True)
    assert isinstance(config, Config)
    assert set(config.trainer) >= {"max_epochs"}


@pytest.mark.parametrize("experiment", options("experiment"))
@pytest.mark.parametrize("debug", options("debug"))
def test_every_experiment_debugs(experiment, debug):
    compose([f"experiment={experiment}", f"debug={debug}"], check=False)


def test_no_yaml_names_a_path_of_a_machine():
    for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml"):
        assert not re.search(r"(?:^|\s)/\w+/", path.read_text(encoding="utf-8")), path


def test_explain_default_repeats_the_schema():
    config = compose(["experiment=sst2", "explain=default"], check=False)
    assert config.explain == ExplainConfig()


def test_options_that_the_experiments_rest_on():
    hatexplain = compose(["experiment=hatexplain"], check=False)
    assert hatexplain.data.label_map == {"hatespeech": "toxic", "offensive": "toxic", "normal": "normal"}
    assert (hatexplain.data.columns.text, hatexplain.data.columns.rationale) == ("tokens", "rationale")
    sst2 = compose(["experiment=sst2"], check=False).data
    assert (sst2.header, sst2.quoted, sst2.columns.text, sst2.columns.label) == (False, False, "0", "1")
    assert sst2.label_map == {"0": "negative", "1": "positive"}


# --- what comes out


def test_quickstart_is_the_default_and_has_every_key():
    config = compose([], check=False)
    assert config == compose(["experiment=quickstart"], check=False)
    assert (config.run.name, config.run.dir) == ("quickstart", str(Path("runs", "quickstart")))
    assert config.stages == [stage for stage in KNOWN_STAGES if stage not in ASKED_STAGES]
    assert (config.data.name, config.data.path) == ("controlled", None)
    assert (config.model.name, config.model.scratch.layers, config.model.scratch.width) == (None, 4, 96)
    assert config.model.lr == 1e-3
    assert config.explain.methods == [
        "ca_lig",
        "integrated_gradients",
        "generic_attention",
        "attention_rollout",
        "input_x_gradient",
        "random",
    ]
    assert (config.explain.num_samples, config.explain.tolerance) == (None, 0.05)
    assert config.trainer["accelerator"] == "cpu"
    assert {row.key for row in describe_schema()} == {
        f"{section}{key}" for section, keys in KEYS.items() for key in keys.split()
    }


def test_plain_values_come_out():
    def walk(value):
        assert is_dataclass(value) or type(value) in (dict, list, str, int, float, bool, type(None)), type(value)
        if is_dataclass(value):
            for item in fields(value):
                walk(getattr(value, item.name))
        elif isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                walk(item)

    walk(compose(["trainer.devices=[0,1]", "explain.options.ca_lig.lam=1", "explain.operator=[mask]"], check=True))


def test_two_compositions_share_nothing():
    first, second = compose([], check=False), compose([], check=False)
    first.trainer["max_epochs"] = 99
    first.explain.methods.clear()
    assert second == compose([], check=False)


def test_order_of_the_layers(tmp_path):
    group = put(tmp_path, "model.yaml", "lr: 2.0\nwarmup: 0.2\nweight_decay: 0.2\nschedule: cosine\n")
    experiment = put(
        tmp_path,
        "mine.yaml",
        "defaults: {data: controlled, model: model.yaml}\n"
        "model: {warmup: 0.3, weight_decay: 0.3, schedule: constant}\n",
    )
    debug = put(tmp_path, "debug.yaml", "model: {weight_decay: 0.4, schedule: linear}\n")
    schema = Config().model
    composed = compose([f"experiment={experiment}", f"debug={debug}", "model.schedule=cosine"], check=False).model
    assert composed.early_stopping == schema.early_stopping
    assert composed.lr == 2.0 != schema.lr
    assert composed.warmup == 0.3
    assert composed.weight_decay == 0.4
    assert composed.schedule == "cosine"

    # one key, set at every level: each level beats the one before
    levels = [f"experiment={experiment}", f"model={group}", f"debug={debug}", "model.weight_decay=0.5"]
    empty = put(tmp_path, "empty.yaml", "defaults: {data: controlled}\n")
    assert compose([f"experiment={empty}"], check=False).model.weight_decay == schema.weight_decay == 0.01
    assert compose([f"experiment={empty}", levels[1]], check=False).model.weight_decay == 0.2
    assert [compose(levels[:n], check=False).model.weight_decay for n in (2, 3, 4)] == [0.3, 0.4, 0.5]
    assert compose(levels[::-1], check=False).model.weight_decay == 0.5  # the order they are typed in is of no account


def test_a_group_on_the_command_line_replaces_the_experiments(tmp_path):
    config = compose(["data=files", "data.path=x.csv", "trainer=gpu"], check=False)
    assert (config.data.name, config.data.path, config.data.batch_size) == (None, "x.csv", 32)
    assert config.trainer["accelerator"] == "gpu"
    assert config.trainer["max_epochs"] == compose([], check=False).trainer["max_epochs"]


def test_files_of_the_user(tmp_path, monkeypatch):
    put(tmp_path, "wide.yaml", "scratch: {width: 128, heads: 8}\n")
    put(tmp_path, "mine.yaml", "defaults: {model: wide.yaml, data: controlled}\nseed: 7\n")
    monkeypatch.chdir(tmp_path)
    config = compose(["experiment=mine.yaml"], check=False)
    assert (config.model.scratch.width, config.seed, config.run.name) == (128, 7, "mine")
    monkeypatch.chdir("/")  # files that an experiment names lie beside it
    assert compose([f"experiment={tmp_path / 'mine.yaml'}"], check=False) == config
    assert compose([f"model={tmp_path / 'wide.yaml'}"], check=False).model.scratch.width == 128


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("seed=3", lambda c: c.seed, 3),
        ("model.lr=2e-5", lambda c: c.model.lr, 2e-5),
        ("model.lr=1", lambda c: c.model.lr, 1.0),
        ("explain.num_samples=null", lambda c: c.explain.num_samples, None),
        ("explain.methods=[ca_lig,random]", lambda c: c.explain.methods, ["ca_lig", "random"]),
        ("explain.steps=32", lambda c: c.explain.steps, 32),
        ("explain.steps=auto", lambda c: c.explain.steps, "auto"),
        ("explain.target=1", lambda c: c.explain.target, 1),
        ("explain.operator=delete", lambda c: c.explain.operator, "delete"),
        ("explain.operator=[mask, delete]", lambda c: c.explain.operator, ["mask", "delete"]),
        ("explain.options.ca_lig.lam=1", lambda c: c.explain.options, {"ca_lig": {"lam": 1.0}}),
        ("explain.options={random: {}}", lambda c: c.explain.options, {"random": {}}),
        ("data.label_map={0: neg, 1: pos}", lambda c: c.data.label_map, {"0": "neg", "1": "pos"}),
        ("data.label_map.a=b", lambda c: c.data.label_map, {"a": "b"}),
        ("data.header=false", lambda c: c.data.header, False),
        ("data.quoted=null", lambda c: c.data.quoted, None),
        ("data.columns.text=0", lambda c: c.data.columns.text, "0"),
        ("run.name=001", lambda c: c.run.name, "001"),  # a name, not the number 1
        ("run.name=1e5", lambda c: c.run.name, "1e5"),
        ("run.name='a, b'", lambda c: c.run.name, "a, b"),
        ("run.name=x=y", lambda c: c.run.name, "x=y"),
        ("run.name=seed-${seed}", lambda c: c.run.dir, str(Path("runs", "seed-0"))),
        ("run.dir=out", lambda c: (c.run.dir, c.run.name), ("out", "quickstart")),
        ("model.scratch={layers: 2}", lambda c: (c.model.scratch.layers, c.model.scratch.width), (2, 96)),
        ("trainer.max_time={hours: 1}", lambda c: c.trainer["max_time"], {"hours": 1}),
        ("model.warmup=${model.weight_decay}", lambda c: c.model.warmup, 0.01),
    ],
)
def test_values_are_typed(override, get, expected):
    value = get(compose([override], check=False))
    assert value == expected and type(value) is type(expected)


# --- what is refused: (what is typed, what the message must contain)

STEPS = ("'explain.steps'", "methods", "num_samples", "max_steps", "options")
ERRORS = {
    "key": ("explain.stepz=3", "unknown key 'explain.stepz'. Did you mean 'explain.steps'?", *STEPS),
    "deep key": ("model.scratch.layer=3", "'model.scratch.layer'", "'model.scratch.layers'", "width, heads"),
    "section": ("explian.steps=3", "'explian.steps'", "'explain.steps'", "seed, stages, run"),
    "section and key": ("explian.stepz=3", "'explian.stepz'", "'explain.steps'"),
    "no section": ("lr=3", "'lr'", "'model.lr'", "seed, stages, run"),
    "two sections": ("steps=3", "'steps'", "'explain.steps' or 'probe.steps'"),
    "nothing near": ("qqq=3", "unknown key 'qqq'. Options at the top: seed, stages"),
    "dashes": ("--seed=3", "'--seed'", "'seed'"),
    "below a value": ("model.lr.x=3", "'model.lr.x'", "model.lr is a value (float), not a section"),
    "section as value": ("run=foo", "run=foo: run is a section", "dir, name, resume, overwrite"),
    "section as null": ("run=null", "run=null: run is a section"),
    "empty key": ("=3", "'=3' has an empty key"),
    "empty part": ("model..lr=3", "'model..lr=3' has an empty key"),
    "no sign": ("seed", "'seed' is not of the form key=value", "experiment=NAME"),
    "bad yaml": ("explain.methods=[ca_lig", "explain.methods: cannot read the value [ca_lig", "quotes"),
    "int": ("seed=one", "seed: expected int", "got 'one'"),
    "bool as int": ("seed=true", "seed: expected int", "got true"),
    "float as int": ("data.limit_train=2.5", "data.limit_train: expected int >= 1 | null, got 2.5"),
    "bool as float": ("model.lr=true", "model.lr: expected float > 0, got true"),
    "int as bool": ("data.header=1", "data.header: expected bool, got 1"),
    "null": ("seed=null", "seed: expected int", "got null"),
    "infinite": ("model.lr=.inf", "model.lr: expected float > 0, got inf"),
    "negative seed": ("seed=-1", "seed: expected int >= 0 and <= 4294967295, got -1"),
    "zero": ("model.lr=0", "model.lr: expected float > 0, got 0"),
    "probability": ("model.scratch.dropout=1.0", "model.scratch.dropout: expected float >= 0 and < 1, got 1.0"),
    "warmup": ("model.warmup=1.5", "model.warmup: expected float >= 0 and <= 1, got 1.5"),
    "zero batch": ("data.batch_size=0", "data.batch_size: expected int >= 1, got 0"),
    "literal": (
        "model.schedule=linnear",
        "model.schedule: expected linear | cosine | constant",
        "Did you mean 'linear'?",
    ),
    "steps text": ("explain.steps=fast", "explain.steps: expected int >= 2 | auto, got 'fast'"),
    "steps range": ("explain.steps=1", "explain.steps: expected int >= 2 | auto, got 1"),
    "target": ("explain.target=predictd", "explain.target", "Did you mean 'predicted'?"),
    "target range": ("explain.target=-1", "explain.target: expected int >= 0 | predicted | label, got -1"),
    "operator": ("explain.operator=delet", "explain.operator: expected", "Did you mean 'delete'?"),
    "operators": (
        "explain.operator=[mask,delet]",
        "explain.operator[1]: expected mask | delete | attention | blur | mean | drop, got 'delet'",
    ),
    "no operator": ("explain.operator=[]", "explain.operator: expected at least one, got []"),
    "list": ("explain.methods=ca_lig", "explain.methods: expected list[str]", "explain.methods=[ca_lig]"),
    "index": ("explain.methods[0]=random", "'explain.methods[0]'", "'explain.methods'"),
    "no stage": ("stages=[]", "stages: expected at least one, got []"),
    "stage": (
        "stages=[fit,tst]",
        "stages: unknown stage 'tst'. Did you mean 'test'?",
        "pretrain, fit, test, calibrate, explain, benchmark, concepts, report",
    ),
    "stage twice": ("stages=[fit,fit]", "stages: 'fit' is listed 2 times"),
    "method": (
        "explain.methods=[ca_lgi]",
        "explain.methods: unknown method 'ca_lgi'. Did you mean 'ca_lig'?",
        "random",
    ),
    "method twice": ("explain.methods=[ca_lig,ca_lig]", "explain.methods: 'ca_lig' is listed 2 times"),
    "probe method": ("probe.method=ranom", "probe.method: unknown method 'ranom'. Did you mean 'random'?", "ca_lig"),
    "option's method": (
        "explain.options.ca_ligg.lam=1",
        "'explain.options.ca_ligg'",
        "'explain.options.ca_lig'",
        "random",
    ),
    "option": (
        "explain.options.ca_lig.lamb=1",
        "'explain.options.ca_lig.lamb'",
        "'explain.options.ca_lig.lam'",
        "fusion",
    ),
    "option type": ("explain.options.ca_lig.fusion=3", "explain.options.ca_lig.fusion: expected", "column", "got 3"),
    "option word": ("explain.options.ca_lig.fusion=colum", "Did you mean 'column'?"),
    "option as value": ("explain.options.ca_lig=3", "explain.options.ca_lig: expected dict", "got 3"),
    "own trainer argument": ("trainer.logger=false", "trainer.logger is not free", "logger.wandb.mode"),
    "artifact": ("logger.wandb.artifacts=[modell]", "logger.wandb.artifacts: unknown artifact 'modell'", "'model'"),
    "callbacks": ("trainer.callbacks=[]", "trainer.callbacks is not free"),
    "yaml boolean as label": ("data.label_map={no: negative}", "data.label_map.false", "quotes"),
    "no data": ("data.name=null", "data.name and data.path are both null", "data.path=", "data.name=controlled"),
    "two data": ("data.path=x", "data.name=controlled (in configs/data/controlled.yaml)", "data.path=x", "data=files"),
    "hub keys without hub": (
        ("data.config=sst2",),
        "data.config: expected null with data.name=controlled",
        "belongs to a data set of the hub",
    ),
    "one column twice": (
        ("data.columns.text=a", "data.columns.label=a"),
        "data.columns.label: expected another column than data.columns.text, got 'a'",
    ),
    "empty label map": ("data.label_map={}", "data.label_map: expected at least one label"),
    "too long": ("data.max_length=600", "data.max_length", "at most model.scratch.max_positions=128", "got 600"),
    "heads": ("model.scratch.width=97", "model.scratch.width", "multiple of model.scratch.heads=4", "got 97"),
    "fractions": (("data.val_fraction=0.6", "data.test_fraction=0.4"), "data.val_fraction", "less than 1"),
    "twice": (("seed=1", "seed=2"), "'seed' is given twice"),
    "group twice": (("model=tiny", "model=small"), "'model' is given twice"),
    "resume and overwrite": (
        ("experiment=quickstart", "run.resume=runs/x", "run.overwrite=true"),
        "run.resume and run.overwrite=true exclude each other",
    ),
    "resume and dir": (
        ("experiment=quickstart", "run.resume=runs/x", "run.dir=runs/y"),
        "run.dir",
        "runs/x",
        "'runs/y'",
    ),
    "resume nothing": ("run.resume=no/such/run", "no/such/run: no config.yaml there"),
    "interpolation": ("run.name=${seeed}", "run.name", "seeed"),
    "open interpolation": ("run.name=${", "run.name: "),
    "circle": ("model.lr=${model.lr}", "model.lr: "),
    "interpolated type": (
        "trainer.max_epochs=${data.name}",
        "trainer.max_epochs: expected int | null, got 'controlled'",
    ),
    "question marks": ("data.path=???", "data.path: expected str | null, got '???'"),
    "option of a group": (
        "model=tinny",
        "unknown model option 'tinny'. Did you mean 'tiny'?",
        "bert_base, bert_base_lora",
    ),
    "no option": ("model=", "unknown model option ''", "tiny"),
    "experiment": (
        "experiment=quick",
        "'quick'. Did you mean 'quickstart'?",
        "hatexplain, hatexplain_bert",
        "FILE.yaml",
    ),
    "debug": ("debug=limits", "unknown debug option 'limits'. Did you mean 'limit'?", "fast_dev_run"),
    "image key of texts": ("data.augment=flip", "data.augment=flip is for images: set data.modality=image"),
    "mistyped image key": ("data.augmnt=flip", "unknown key 'data.augmnt'. Did you mean 'data.augment'?"),
    "mistyped image value": ("data.on_corrupt=skp", "data.on_corrupt: expected raise | skip", "Did you mean 'skip'?"),
    "image column of texts": (
        "data.columns.mask=m",
        "data.columns.mask=m means nothing to data.modality=text",
        "data.modality=image",
    ),
    "text column of images": (
        ("experiment=vision_quickstart", "data.columns.rationale=r"),
        "data.columns.rationale=r means nothing to data.modality=image",
    ),
    "modality": ("data.modality=images", "data.modality: expected text | image", "Did you mean 'image'?"),
    "scenes as texts": (
        "data.name=scenes",
        "data.modality: expected image, which data.name=scenes is, got 'text'",
    ),
    "texts for an image model": (
        "model=vit_tiny",
        "model.scratch.type: expected a type for texts, as data.modality=text says, got 'vit' (in configs/model/",
        "model=tiny",
    ),
    "images for a text model": (
        "data=scenes",
        "model.scratch.type: expected a type for images, as data.modality=image says, got 'bert'",
        "model=vit_tiny",
    ),
    "patches": (
        ("experiment=vision_quickstart", "model.scratch.image_size=30"),
        "model.scratch.image_size: expected a multiple of model.scratch.patch_size=4, got 30",
    ),
    "two kinds of masks": (
        ("experiment=vision_quickstart", "data.columns.mask=m", "data.annotations=a.json"),
        "data.columns.mask and data.annotations all say where the deciding object is",
    ),
    "concepts of images": (
        ("experiment=vision_quickstart", "stages=[fit,concepts]", "concepts.sets={a: b.txt}"),
        "concepts are sets of texts",
    ),
    "pretrain texts": ("stages=[pretrain,fit]", "pretrain is a masked autoencoder of images"),
    "pretrain late": (
        ("experiment=cifar10_mae_tiny", "stages=[fit,pretrain]"),
        "stages=[fit, pretrain]: pretrain comes first, before fit.",
    ),
    "pretrain without fit": (
        ("experiment=cifar10_mae_tiny", "stages=[pretrain,test]"),
        "pretrain leaves an encoder without a head for test. Put fit between.",
    ),
    "decoder heads": (
        ("experiment=cifar10_mae_tiny", "pretrain.decoder_width=50"),
        "pretrain.decoder_width: expected a multiple of pretrain.decoder_heads=4, got 50",
    ),
    "no file": ("model=no/such.yaml", "model=no/such.yaml: no such file", "bert_base, bert_base_lora"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    given, *parts = ERRORS[case]
    text = message(*([given] if isinstance(given, str) else given), check=case == "interpolated type")
    assert [part for part in parts if part not in text] == [], text
    assert "\n" not in text


FILE_ERRORS = {
    "key": ("explain: {stepz: 3}", "unknown key 'explain.stepz' in ", "mine.yaml", "'explain.steps'"),
    "dotted": ("explain.steps: 3", "'explain.steps'", "mine.yaml", "nested"),
    "type": ("seed: one", "seed: expected int", "'one' (in ", "mine.yaml"),
    "section": ("run: foo", "run=foo (in ", "mine.yaml", "section"),
    "boolean as text": ("run: {name: no}", "run.name: expected str | null, got false (in ", "mine.yaml", "quotes"),
    "syntax": ("seed: 1\nrun: {name: [\n", "mine.yaml, line 3: not valid YAML"),
    "same key twice": ("seed: 1\nseed: 2\n", "mine.yaml, line 2: not valid YAML", "seed"),
    "list": ("- seed", "mine.yaml: expected a mapping"),
    "scalar": ("seed", "mine.yaml"),
    "method": ("data: {name: controlled}\nexplain: {methods: [ca_lgi]}", "'ca_lgi' (in ", "mine.yaml"),
    "option": (
        "data: {name: controlled}\nexplain: {options: {ca_lig: {lamb: 1}}}",
        "'explain.options.ca_lig.lamb' in ",
        "mine.yaml",
    ),
    "default group": ("defaults: {modle: tiny}", "'defaults.modle' in ", "mine.yaml", "'defaults.model'"),
    "default option": ("defaults: {model: tinny}", "'tinny'", "'tiny'", "mine.yaml"),
    "default file": ("defaults: {model: absent.yaml}", "absent.yaml", "mine.yaml"),
    "default list": ("defaults: [tiny]", "mine.yaml: defaults: expected a mapping"),
    "default null": ("defaults: {model: null}", "mine.yaml: defaults.model: expected the name of an option"),
}


@pytest.mark.parametrize("case", FILE_ERRORS)
def test_errors_name_the_file(case, tmp_path):
    content, *parts = FILE_ERRORS[case]
    text = message(f"experiment={put(tmp_path, 'mine.yaml', content)}")
    assert [part for part in parts if part not in text] == [], text


def test_a_mistake_in_a_group_file_names_it(tmp_path):
    assert "'model.layers' in " in message(f"model={put(tmp_path, 'm.yaml', 'layers: 3')}")
    assert "m.yaml" in message(f"model={put(tmp_path, 'm.yaml', 'layers: 3')}")
    assert "t.yaml" in message(f"trainer={put(tmp_path, 't.yaml', 'max_epoch: 3')}", check=True)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "trainer.max_epoch=3",
            ("'trainer.max_epoch'", "'trainer.max_epochs'", "accelerator, accumulate_grad_batches"),
        ),
        ("trainer.max_epochs=three", ("trainer.max_epochs: expected int | null, got 'three'",)),
        ("trainer.deterministic=wran", ("trainer.deterministic", "Did you mean 'warn'?")),
    ],
)
def test_trainer_arguments(override, parts):
    text = message(override, check=True)
    assert [part for part in parts if part not in text] == [], text


def test_any_registry_will_do(monkeypatch):
    """Methods and options come from the registry alone: what it offers is what the configuration takes."""
    from dataclasses import dataclass

    import calig.pipeline.attribution.methods as registry

    @dataclass
    class Options:
        layers: tuple[int, ...] = ()
        scale: float | str = 1.0

        def __post_init__(self):
            if self.scale == 0:
                raise InputError("scale takes no 0.")

    monkeypatch.setattr(registry, "available_methods", lambda: ("other",), raising=False)
    monkeypatch.setattr(registry, "method_options", lambda name: Options, raising=False)
    base = ["explain.methods=[other]", "probe.method=other"]
    config = compose([*base, "explain.options.other={layers: [1, 2], scale: auto}"], check=False)
    assert config.explain.options == {"other": {"layers": (1, 2), "scale": "auto"}}
    assert "layers:" in to_yaml(config)
    assert "unknown method 'ca_lig'" in message("explain.methods=[ca_lig]")
    assert "explain.options.other: scale takes no 0." in message(*base, "explain.options.other.scale=0")
    assert "explain.options.other.layers[1]: expected int" in message(*base, "explain.options.other.layers=[1,x]")
    assert compose([base[0], "probe.enabled=false"], check=False).probe.method == "ca_lig"  # unused, so unchecked


# --- saving, loading, resuming


@pytest.mark.parametrize("experiment", options("experiment"))
def test_round_trip(experiment, tmp_path):
    config = compose([f"experiment={experiment}", "explain.options.ca_lig.lam=0.3", "logger.wandb.tags=[a, '1']"])
    save(config, tmp_path)
    assert load(tmp_path) == config == load(tmp_path / CONFIG_FILE)


def test_text_that_looks_like_yaml_survives(tmp_path):
    config = compose([], check=False)
    config.run.name, config.data.label_map = "a${b}: #1", {"0": "no", "1": "null"}
    save(config, tmp_path)
    assert load(tmp_path, check=False) == config


def test_load_is_as_strict(tmp_path):
    save(compose([], check=False), tmp_path)
    file = tmp_path / CONFIG_FILE
    file.write_text(file.read_text(encoding="utf-8").replace("seed:", "sead:"), encoding="utf-8")
    with pytest.raises(InputError, match=r"unknown key 'sead' in .*config.yaml. Did you mean 'seed'"):
        load(tmp_path)
    with pytest.raises(InputError, match=r"no config.yaml there"):
        load(tmp_path / "nowhere")


def test_load_takes_settings_but_no_groups(tmp_path):
    save(compose(["seed=5"], check=False), tmp_path)
    assert load(tmp_path, ["trainer.max_epochs=20"], check=False).trainer["max_epochs"] == 20
    with pytest.raises(InputError, match="model=small cannot be put on top"):
        load(tmp_path, ["model=small"])


def test_resume_takes_the_runs_own_configuration(tmp_path):
    first = compose(["experiment=sst2", "seed=5", "run.name=mine", "run.overwrite=true"], check=False)
    save(first, tmp_path)
    again = compose([f"run.resume={tmp_path}", "trainer.max_epochs=20"], check=False)
    assert again.run == replace(first.run, resume=str(tmp_path), dir=str(tmp_path), overwrite=False)
    assert again.trainer == {**first.trainer, "max_epochs": 20}
    assert {**asdict(again), "run": 0, "trainer": 0} == {**asdict(first), "run": 0, "trainer": 0}
    assert "model=small says nothing" in message(f"run.resume={tmp_path}", "model=small")
    # the first command line, repeated with run.resume
    typed = compose(["experiment=sst2", "model=minilm", f"run.resume={tmp_path}"], check=False)
    assert typed.run.dir == str(tmp_path)


# --- help without the heavy packages


def test_light_import():
    code = (
        "import sys, calig.pipeline.config, calig.pipeline.compose as c; c.compose([], check=False);"
        "print([m for m in ('torch', 'lightning', 'pytorch_lightning', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_key_is_described():
    rows = describe_schema()
    assert all(row.help and row.type and row.default for row in rows)
    assert next(row for row in rows if row.key == "explain.steps")[:3] == ("explain.steps", "int | auto", "auto")
    for row in rows:  # a default can be typed as it is printed
        if row.key not in ("data.name", "trainer"):
            compose([f"{row.key}={row.default}"], check=False)
