"""Classifiers and tokenizers from every source, the loss, and what is wrong with a model or a machine."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_bert
from lightning.pytorch import Trainer
from transformers import AutoModelForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent))
from distributed_worker import loader, make_trainer

from calig.datamodules.tokenization import train_wordpiece
from calig.pipeline.adapters import add_adapters
from calig.pipeline.config import AdapterConfig, ModelConfig, ScratchConfig
from calig.pipeline.devices import require_devices
from calig.pipeline.errors import InputError
from calig.pipeline.explained import NON_FINITE_OUTPUT, SampleFailure
from calig.pipeline.explainer import Explainer, ExplainSettings
from calig.pipeline.models import load_model, load_tokenizer, prepare_training
from calig.pipeline.module import ClassificationModule, LossSettings, loss_settings
from calig.pipeline.tasks import task_of, threshold_of

SCRATCH = ScratchConfig(layers=2, width=16, heads=2, vocab_size=60, max_positions=32)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["a good film", "a bad film", "we liked it"], 60)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return load_model(ModelConfig(scratch=SCRATCH), ["no", "yes"], tokenizer)


def test_from_scratch(model, tokenizer):
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size == len(tokenizer)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert load_tokenizer(ModelConfig()) is None


def test_from_a_local_folder_with_its_tokenizer(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    assert load_tokenizer(config).get_vocab() == tokenizer.get_vocab()
    again = load_model(config, ["no", "yes"], tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    # Another task: a fresh head of the right size on the same encoder.
    other = load_model(config, ["a", "b", "c"], tokenizer)
    assert other.config.num_labels == 3 and other.classifier.out_features == 3
    assert torch.equal(other.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_a_model_that_was_loaded_trains_with_its_dropout(model, tokenizer, tmp_path):
    """transformers loads in evaluation mode, in which gradient checkpointing, too, would do nothing."""
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(name=str(tmp_path)), ["no", "yes"], tokenizer)
    assert not loaded.training
    prepared = prepare_training(loaded, ModelConfig())
    assert all(part.training for part in prepared.modules())
    ids = torch.tensor([[2, 5, 6, 3]])
    assert not torch.equal(prepared(ids).logits, prepared(ids).logits)


def test_from_a_checkpoint_file_or_folder(model, tokenizer, tmp_path):
    module = ClassificationModule(model, ["no", "yes"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    for checkpoint in (tmp_path / "last.ckpt", tmp_path / "folder"):
        torch.manual_seed(1)
        again = load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(checkpoint)), ["no", "yes"], tokenizer)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert load_tokenizer(ModelConfig(checkpoint=str(tmp_path / "folder"))) is not None


def test_a_bf16_checkpoint_comes_up_in_float32(model, tokenizer, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert load_model(ModelConfig(name=str(tmp_path)), ["no", "yes"], tokenizer).dtype == torch.float32


def test_errors_name_the_source(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="'no-such/model' could not be loaded"):
        load_tokenizer(ModelConfig(name="no-such/model"))
    with pytest.raises(InputError, match="'no-such/model' could not be loaded"):
        load_model(ModelConfig(name="no-such/model"), ["no", "yes"], tokenizer)
    with pytest.raises(InputError, match="width=16 is not a multiple of model.scratch.heads=3"):
        load_model(ModelConfig(scratch=ScratchConfig(width=16, heads=3)), ["no", "yes"], tokenizer)
    with pytest.raises(InputError, match="type=berd"):
        load_model(ModelConfig(scratch=ScratchConfig(type="berd")), ["no", "yes"], tokenizer)
    with pytest.raises(InputError, match="does not exist"):
        load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "x.ckpt")), ["no", "yes"], tokenizer)
    (tmp_path / "bad.ckpt").write_text("not a checkpoint")
    with pytest.raises(InputError, match="not a Lightning checkpoint"):
        load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "bad.ckpt")), ["no", "yes"], tokenizer)
    torch.save({"state_dict": {"model.other": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="weights of another model"):
        load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "other.ckpt")), ["no", "yes"], tokenizer)


def test_a_checkpoint_cannot_run_code(tokenizer, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError):
        load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "evil.ckpt")), ["no", "yes"], tokenizer)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------- more sources


@pytest.mark.parametrize("attribute", ["net", "wrapped.model"])
def test_a_checkpoint_of_another_project_or_of_a_compiled_model(model, tokenizer, tmp_path, attribute):
    state = {f"{attribute}._orig_mod.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state | {"metric.total": torch.zeros(1)}, "epoch": 1}, tmp_path / "x.ckpt")
    torch.manual_seed(1)
    config = ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "x.ckpt"))
    again = load_model(config, ["no", "yes"], tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    both = state | {f"teacher.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": both}, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match=r"holds 2 models that fit.*teacher\."):
        load_model(config, ["no", "yes"], tokenizer)


def test_revision_of_a_hub_name(model, tokenizer, tmp_path, monkeypatch):
    """Two revisions in a cache, as the hub's client keeps them; no network."""
    repository = tmp_path / "models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    for name, value in (("main", 0.0), ("v1", 1.0)):
        commit = name.rjust(40, "0")
        (repository / "refs" / name).write_text(commit)
        torch.nn.init.constant_(model.classifier.bias, value)
        model.save_pretrained(repository / "snapshots" / commit)
        tokenizer.save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, value in ((None, 0.0), ("v1", 1.0)):
        config = ModelConfig(name="me/tiny", revision=revision)
        assert load_tokenizer(config).get_vocab() == tokenizer.get_vocab()
        assert load_model(config, ["no", "yes"], tokenizer).classifier.bias.tolist() == [value, value]
    with pytest.raises(InputError, match="'me/tiny' could not be loaded"):
        load_model(ModelConfig(name="me/tiny", revision="v2"), ["no", "yes"], tokenizer)


def test_a_revision_of_a_local_folder_is_a_mistake(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path), revision="v1")
    for load in (lambda: load_model(config, ["no", "yes"], tokenizer), lambda: load_tokenizer(config)):
        with pytest.raises(InputError, match=r"model.revision=v1 means nothing for model.name=.*a local folder"):
            load()


@pytest.fixture
def adapter(model, tokenizer, tmp_path):
    """A base model and an adapter folder that names it."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    wrapped = add_adapters(base, AdapterConfig(r=2))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(tmp_path / "adapter")
    return wrapped.eval(), tmp_path / "adapter"


def test_an_adapter_folder_is_merged_into_its_base(adapter, tokenizer):
    wrapped, folder = adapter
    config = ModelConfig(name=str(folder))
    assert load_tokenizer(config).get_vocab() == tokenizer.get_vocab()
    ids = tokenizer(["a good film"], return_tensors="pt")["input_ids"]
    for given in (config, ModelConfig(checkpoint=str(folder))):
        found = load_model(given, ["no", "yes"], tokenizer).eval()
        assert torch.allclose(found(ids).logits, wrapped(ids).logits, atol=1e-5)
        assert all(parameter.requires_grad for parameter in found.parameters())
        assert "lora" not in " ".join(found.state_dict())
    other = load_model(config, ["a", "b", "c"], tokenizer)
    assert other.classifier.out_features == 3
    with pytest.raises(InputError, match=r"adapter.*could not be loaded"):
        load_model(ModelConfig(checkpoint=str(folder)), ["a", "b", "c"], tokenizer)


def test_errors_of_an_adapter_folder_name_it(adapter, tokenizer, tmp_path):
    _, folder = adapter
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    for change, message in (
        ({"base_model_name_or_path": None}, "does not name its base model"),
        (
            {"base_model_name_or_path": "gone/model"},
            r"'gone/model' could not be loaded \(the base model of model.name=",
        ),
        ({"megatron_config": {"a": 1}}, "Megatron"),
    ):
        path.write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            load_model(ModelConfig(name=str(folder)), ["no", "yes"], tokenizer)
    (folder / "adapter_model.safetensors").unlink()
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"the adapter in .* could not be loaded"):
        load_model(ModelConfig(name=str(folder)), ["no", "yes"], tokenizer)


def test_without_peft_the_message_says_how_to_get_it(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[peft\]'"):
        add_adapters(model, AdapterConfig(r=2))


def test_target_modules_that_do_not_exist(model):
    with pytest.raises(InputError, match=r"target_modules=\['q_proj'\] does not fit 'bert'.*Linear layers: .*query"):
        add_adapters(model, AdapterConfig(r=2, target_modules=["q_proj"]))


def test_adapter_settings_without_a_rank_are_a_mistake(model):
    with pytest.raises(InputError, match=r"model.peft.alpha=4.0 needs model.peft.r"):
        prepare_training(model, ModelConfig(peft=AdapterConfig(alpha=4.0)))


def test_a_family_that_cannot_checkpoint_says_so(model, monkeypatch):
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match=r"model.gradient_checkpointing=true: .*does not support"):
        prepare_training(model, ModelConfig(gradient_checkpointing=True))


# ---------------------------------------------------------------------------------------------- nothing runs code


class Payload:
    """What a malicious pickle does: call a function when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_weights_cannot_run_code(model, adapter, tokenizer, tmp_path):
    _, folder = adapter
    plain = tmp_path / "base"
    ran = tmp_path / "ran"
    for target, name in ((plain, "pytorch_model.bin"), (folder, "adapter_model.bin")):
        for file in target.glob("*.safetensors"):
            file.unlink()
        torch.save({"classifier.bias": Payload(ran)}, target / name)
        if target is folder:  # the base is sound again
            model.save_pretrained(plain)
            (plain / "pytorch_model.bin").unlink()
        with pytest.raises(InputError, match="could not be loaded"):
            load_model(ModelConfig(name=str(target)), ["no", "yes"], tokenizer)
        assert not ran.exists()
    # The same file without the payload loads: it is the code that is refused, not the format.
    (plain / "model.safetensors").unlink()
    torch.save(model.state_dict(), plain / "pytorch_model.bin")
    again = load_model(ModelConfig(name=str(plain)), ["no", "yes"], tokenizer)
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_the_message_on_a_checkpoint_with_objects_says_what_to_do(tokenizer, tmp_path):
    torch.save({"state_dict": {}, "extra": Payload(tmp_path / "ran")}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match=r"could run code.*Save its weights alone"):
        load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "evil.ckpt")), ["no", "yes"], tokenizer)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["name", "checkpoint"])
def test_code_in_a_model_folder_is_never_loaded(model, tokenizer, tmp_path, key):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    (tmp_path / "theirs.py").write_text(code)
    classes = {
        "AutoConfig": "theirs.Config",
        "AutoModelForSequenceClassification": "theirs.Model",
        "AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"],
    }
    for name in ("config.json", "tokenizer_config.json"):
        path = tmp_path / name
        content = json.loads(path.read_text()) | {"auto_map": classes}
        if name == "config.json":
            content["model_type"] = "theirs"  # nothing of the library's own fits
        path.write_text(json.dumps(content))
    config = ModelConfig(**{key: str(tmp_path)})
    with pytest.raises(InputError, match="could not be loaded"):
        load_model(config, ["no", "yes"], tokenizer)
    try:
        load_tokenizer(config)
    except InputError as error:
        assert str(tmp_path) in str(error)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------------------------------------- bad input


def test_a_name_that_is_nothing(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"'no/such' could not be loaded \(model.name\): it is no local folder"):
        load_model(ModelConfig(name="no/such"), ["no", "yes"], tokenizer)
    with pytest.raises(InputError, match="is a local folder but no model"):
        load_model(ModelConfig(name=str(tmp_path)), ["no", "yes"], tokenizer)
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(InputError, match=r"is a file. A Lightning checkpoint goes to model.checkpoint="):
        load_model(ModelConfig(name=str(tmp_path / "last.ckpt")), ["no", "yes"], tokenizer)


@pytest.mark.parametrize("key", ["name", "checkpoint"])
def test_a_folder_without_tokenizer(model, tmp_path, key):
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"model.{key}.* holds no tokenizer .*save_pretrained\(FOLDER\)"):
        load_tokenizer(ModelConfig(**{key: str(tmp_path)}))


def test_a_checkpoint_folder_without_tokenizer_leaves_it_to_the_name(model, tokenizer, tmp_path):
    for folder in ("named", "checkpoint"):
        model.save_pretrained(tmp_path / folder)
    tokenizer.save_pretrained(tmp_path / "named")
    config = ModelConfig(name=str(tmp_path / "named"), checkpoint=str(tmp_path / "checkpoint"))
    assert load_tokenizer(config).get_vocab() == tokenizer.get_vocab()


@pytest.fixture
def distilled(tmp_path):
    config = DistilBertConfig(vocab_size=60, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    folder = tmp_path / "distilled"
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_checkpoint_of_another_architecture(model, tokenizer, distilled, tmp_path):
    model.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    config = ModelConfig(name=str(tmp_path / "bert"), checkpoint=str(distilled))
    with pytest.raises(InputError, match=r"model.checkpoint=.*is a 'distilbert', model.name=.* a 'bert'"):
        load_model(config, ["no", "yes"], tokenizer)
    # The weights of one beside the configuration of the other.
    shutil.copy(distilled / "model.safetensors", tmp_path / "bert")
    with pytest.raises(InputError, match=r"model.checkpoint=.* holds weights of another model: .*'bert'"):
        load_model(ModelConfig(checkpoint=str(tmp_path / "bert")), ["no", "yes"], tokenizer)
    state = {f"model.{key}": value for key, value in make_bert(layers=1).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"another model than this 'bert': .* missing .*there and .* here"):
        load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "other.ckpt")), ["no", "yes"], tokenizer)


def test_a_checkpoint_of_another_number_of_classes(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"could not be loaded \(model.checkpoint\)"):
        load_model(ModelConfig(checkpoint=str(tmp_path)), ["a", "b", "c"], tokenizer)


def test_one_output_is_no_classifier(tokenizer):
    with pytest.raises(InputError, match=r"needs two classes, got \['score'\]. One output is data.task=regression"):
        load_model(ModelConfig(scratch=SCRATCH), ["score"], tokenizer)
    model = load_model(ModelConfig(scratch=SCRATCH, threshold=0.3), ["score"], tokenizer, task="regression")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression") and task_of(model.config) == (
        "regression"
    )
    assert not hasattr(model.config, "label_threshold")
    several = load_model(ModelConfig(scratch=SCRATCH, threshold=0.3), ["a", "b"], tokenizer, task="multi_label")
    assert task_of(several.config) == "multi_label" and threshold_of(several.config) == 0.3
    assert threshold_of(model.config) == 0.5


def test_a_body_without_head_is_refused_where_nothing_trains_it(model, tokenizer, tmp_path):
    model.bert.save_pretrained(tmp_path)
    for config in (ModelConfig(name=str(tmp_path)), ModelConfig(checkpoint=str(tmp_path))):
        load_model(config, ["no", "yes"], tokenizer)
        with pytest.raises(InputError, match=r"no trained classification head \(classifier.bias, classifier.weight"):
            load_model(config, ["no", "yes"], tokenizer, need_head=True)


def test_a_device_that_is_not_there():
    require_devices({"accelerator": "cpu", "devices": 1, "max_epochs": 3})
    require_devices({})
    with pytest.raises(InputError, match=r"trainer.accelerator=warp cannot be had on this machine"):
        require_devices({"accelerator": "warp"})
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match=r"trainer.accelerator=cuda trainer.devices=2 cannot.*accelerator=auto"):
            require_devices({"accelerator": "cuda", "devices": 2})


@pytest.mark.parametrize("strict", [False, True])
def test_a_head_that_returns_nan_names_the_sample(strict):
    model = make_bert()
    batch = make_batch() | {"sample_id": torch.tensor([4, 7, 9])}
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[59] = float("nan")
    for row in (0, 2):
        batch["input_ids"][row][batch["input_ids"][row] == 59] = 5
    batch["input_ids"][1, 2] = 59
    settings = ExplainSettings({"ca_lig": {"steps": 4}, "random": {}}, operators=(), strict=strict)
    explainer = Explainer(model, None, settings)
    if strict:
        with pytest.raises(SampleFailure, match=f"sample 7.*{NON_FINITE_OUTPUT.split('(')[0]}"):
            explainer.explain(batch)
        return
    rows = explainer.explain(batch)
    assert [(row["sample_id"], row["method"], row["reason"]) for row in rows.failures] == [
        (7, "ca_lig", NON_FINITE_OUTPUT),
        (7, "random", NON_FINITE_OUTPUT),
    ]
    assert {row["sample_id"] for row in rows.explanations} == {4, 9}
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    rows = explainer.explain(batch)
    assert not rows.explanations and [row["sample_id"] for row in rows.failures] == [4, 7, 9] * 2


# ---------------------------------------------------------------------------------------------- the loss


def test_loss_settings():
    names = ["no", "yes", "maybe"]
    assert loss_settings(ModelConfig(), names, list) == LossSettings() and LossSettings().is_plain
    found = loss_settings(ModelConfig(class_weights=[1.0, 2.0, 0.5], label_smoothing=0.1), names, list)
    assert found == LossSettings((1.0, 2.0, 0.5), 0.1) and not found.is_plain
    labels = [0, 0, 0, 1, 2, 2]
    weights = loss_settings(ModelConfig(class_weights="balanced"), names, lambda: labels).class_weights
    assert weights == pytest.approx((2 / 3, 2.0, 1.0))
    assert sum(weights[label] for label in labels) == pytest.approx(len(labels))
    with pytest.raises(InputError, match=r"has 2 values for 3 classes.*no, yes, maybe"):
        loss_settings(ModelConfig(class_weights=[1.0, 2.0]), names, list)
    with pytest.raises(InputError, match="positive numbers"):
        loss_settings(ModelConfig(class_weights=[1.0, 2.0, 0.0]), names, list)
    with pytest.raises(InputError, match="no example of maybe"):
        loss_settings(ModelConfig(class_weights="balanced"), names, lambda: [0, 1])


def test_the_loss_of_a_batch():
    model, labels = make_bert(), torch.tensor([2, 0, 0])
    batch = {key: value for key, value in make_batch().items() if key != "special_tokens_mask"}
    log = model(**batch).logits.log_softmax(-1)
    plain = ClassificationModule(model, list("abc"))
    assert torch.equal(plain(batch | {"labels": labels}).loss, model(**batch, labels=labels).loss)
    weights = torch.tensor([1.0, 2.0, 4.0])
    weighted = ClassificationModule(model, list("abc"), loss=LossSettings(tuple(weights.tolist())))
    chosen = weights[labels]
    wanted = -(chosen * log[range(3), labels]).sum() / chosen.sum()
    assert torch.allclose(weighted(batch | {"labels": labels}).loss, wanted, atol=1e-6)
    smooth = ClassificationModule(model, list("abc"), loss=LossSettings(label_smoothing=0.3))
    wanted = -(0.7 * log[range(3), labels] + 0.1 * log.sum(-1)).mean()
    assert torch.allclose(smooth(batch | {"labels": labels}).loss, wanted, atol=1e-6)
    assert "loss" not in smooth(batch)
    assert not any("class_weights" in key for key in weighted.state_dict())


@pytest.mark.parametrize("loss", [LossSettings((1.0, 2.0, 4.0)), LossSettings(label_smoothing=0.2)])
def test_the_loss_trains_and_is_no_matter_to_explanations(loss, tmp_path):
    from calig.callbacks import AttributionCallback

    weights = []
    for callbacks in ([], [AttributionCallback(num_samples=3)]):
        torch.manual_seed(0)
        module = ClassificationModule(make_bert(layers=2).train(), list("abc"), loss=loss)
        trainer = make_trainer(1, tmp_path, callbacks, max_epochs=1)
        trainer.fit(module, loader(6), loader(5))
        weights.append(module.state_dict())
    assert trainer.callback_metrics["val/explain/ca_lig/failed"] == 0
    assert float(trainer.callback_metrics["val/loss"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
