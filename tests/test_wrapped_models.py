"""Compiled, checkpointed and adapted models: trained, explained as if they were plain, and left as they were."""

import copy
import logging
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_bert
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch._dynamo.utils import counters
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent))
from distributed_worker import Classifier, loader, make_trainer

from calig.callbacks import AttributionCallback
from calig.callbacks.target import find_model
from calig.pipeline.adapters import add_adapters
from calig.pipeline.attribution import ExplainableModel, UnsupportedModelError, attribute, available_methods
from calig.pipeline.config import AdapterConfig, ModelConfig
from calig.pipeline.models import finish_training, load_checkpoint, prepare_training
from calig.pipeline.module import ClassificationModule

LORA = AdapterConfig(r=2, dropout=0.1)


def spread(model):
    """Adapters start as zero: give them something to say."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_body(model):
    model.bert = torch.compile(model.bert, backend="eager")
    return model


def compiled_blocks(model):
    blocks = model.bert.encoder.layer
    blocks[0] = torch.compile(blocks[0], backend="eager")  # one alone: the blocks' types differ from outside
    blocks[1].compile(backend="eager")
    return model


def checkpointed(model):
    return prepare_training(model, ModelConfig(gradient_checkpointing=True))


def adapted(model):
    return spread(prepare_training(model, ModelConfig(peft=LORA)))


def all_of_it(model):
    config = ModelConfig(gradient_checkpointing=True, peft=LORA)
    model = spread(prepare_training(model, config))
    model.compile(backend="eager")
    return model


def parallel(model):
    return torch.nn.DataParallel(model)


WRAPPINGS = [
    compiled,
    compiled_in_place,
    compiled_body,
    compiled_blocks,
    checkpointed,
    adapted,
    all_of_it,
    parallel,
]


SLOW = pytest.param(all_of_it, marks=pytest.mark.slow)


def wrapping_of(model):
    """What of the wrapping must be there again afterwards."""
    return [
        (
            name,
            type(module),
            vars(module).get("_compiled_call_impl"),
            vars(module).get("gradient_checkpointing"),
            vars(module).get("forward"),
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]


def plain_of(wrapped):
    """A plain model of the same function, with the wrapping taken off by hand."""
    state = {
        key.replace("_orig_mod.", "").removeprefix("module."): value.clone()
        for key, value in wrapped.state_dict().items()
    }
    if any("lora_" in key for key in state):
        merged = finish_training(copy.deepcopy(wrapped))
        state = merged.state_dict()
    plain = make_bert(seed=9, dtype=next(wrapped.parameters()).dtype)
    plain.load_state_dict(state)
    return plain


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    # Thousands of trace records per graph, which pytest would keep and print.
    trace = logging.getLogger("torch.__trace")
    kept, trace.propagate = trace.propagate, False
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    trace.propagate = kept


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_attributions_are_those_of_the_plain_model_and_the_wrapping_is_back(wrap):
    batch = make_batch()
    # In double precision, in which it makes no difference that merged adapters are added up in another order.
    model = wrap(make_bert(dtype=torch.float64))
    plain = plain_of(model)
    model.train()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    model(**inputs).logits.sum().backward()  # it has run, and compiled, before it is explained
    model.zero_grad()
    before, graphs = wrapping_of(model), counters["stats"]["unique_graphs"]
    for method in available_methods():
        found, wanted = (attribute(one, batch, method, target=1) for one in (model, plain))
        assert torch.allclose(found.scores, wanted.scores, atol=1e-5), method
        if found.layer_scores is not None:
            assert torch.allclose(found.layer_scores, wanted.layer_scores, atol=1e-5), method
    assert wrapping_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    model(**inputs)
    assert counters["stats"]["unique_graphs"] == graphs, "explaining made training compile anew"


@pytest.mark.parametrize("wrap", [compiled_in_place, checkpointed, adapted])
def test_the_wrapping_is_back_after_a_failure(wrap):
    model = wrap(make_bert()).train()
    before = wrapping_of(model)

    def fail(*_):
        raise RuntimeError("a module that raises")

    inner = ExplainableModel(model).structure.blocks[1]
    handle = inner.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a module that raises"):
        attribute(model, make_batch(), target=0)
    handle.remove()
    assert wrapping_of(model) == before


class Wrapped(Classifier):
    """A user's LightningModule around a wrapped model, dropout on."""

    def __init__(self, wrap):
        super().__init__()
        self.net = wrap(self.net).train()


def fit(wrap, folder, callbacks):
    seed_everything(0, verbose=False)
    torch._dynamo.reset()
    module = Wrapped(wrap)
    trainer = make_trainer(1, folder, callbacks, max_epochs=2)
    trainer.fit(module, loader(6, shuffle=True), loader(5))
    return module, trainer


@pytest.mark.parametrize("wrap", [compiled, compiled_in_place, checkpointed, adapted, SLOW])
def test_training_is_bit_identical_with_and_without_the_callback(wrap, tmp_path):
    plain, _ = fit(wrap, tmp_path, [])
    watched, trainer = fit(wrap, tmp_path, [AttributionCallback(num_samples=3)])
    assert trainer.callback_metrics["val/explain/ca_lig/failed"] == 0
    assert "val/explain/ca_lig/completeness_gap" in trainer.callback_metrics
    states = plain.state_dict(), watched.state_dict()
    assert list(states[0]) == list(states[1])
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name


@pytest.mark.slow
def test_the_real_compiler(tmp_path):
    """As `model.compile=true` does it: trained by generated code, explained without it."""
    module = Wrapped(lambda model: prepare_training(model, ModelConfig(compile=True)))
    make_trainer(1, tmp_path, [probe := AttributionCallback(num_samples=2)]).fit(module, loader(3), loader(3))
    assert probe._explainer is not None
    batch = make_batch()
    plain = make_bert(layers=2, seed=9)
    plain.load_state_dict(module.net.state_dict())
    found, wanted = (attribute(model, batch, target=1) for model in (module.net.train(), plain))
    assert torch.allclose(found.scores, wanted.scores, atol=1e-5)
    assert module.net._compiled_call_impl is not None


def test_the_callback_finds_the_model_inside(tmp_path):
    for wrap in (compiled, adapted):
        module = Wrapped(wrap)
        assert ExplainableModel(find_model(module, None)).module is ExplainableModel(module.net).module


def test_prompt_adapters_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = peft.get_peft_model(make_bert(), config)
    with pytest.raises(UnsupportedModelError, match=r"PROMPT_TUNING.*virtual tokens.*LoRA"):
        attribute(model, make_batch())
    holder = torch.nn.ModuleDict({"net": model})
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        find_model(holder, None)


@pytest.mark.parametrize("baseline", ["pad", "mean"])
def test_adapters_on_the_word_embedding(baseline):
    """The baseline's row comes out of the adapted embedding, not of the table below it."""
    wrapped = spread(add_adapters(make_bert(), AdapterConfig(r=2, target_modules=["word_embeddings", "value"])))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_embedding" in name:
                parameter.normal_(std=0.3)
    plain = plain_of(wrapped)
    found, wanted = (attribute(model, make_batch(), target=1, baseline=baseline) for model in (wrapped, plain))
    assert torch.allclose(found.scores, wanted.scores, atol=1e-5)


# ------------------------------------------------------------------------------------ the project's own module


def run_fit(config, folder, **arguments):
    """What the fit stage does: prepare, train, load the best weights, finish, save."""
    seed_everything(0, verbose=False)
    module = ClassificationModule(make_bert(layers=2).train(), ["a", "b", "c"])
    module.model = prepare_training(module.model, config)
    if config.compile:
        module.model.compile(backend="eager")
    checkpoint = ModelCheckpoint(folder / "checkpoints", monitor="val/loss", save_last=True)
    trainer = make_trainer(1, folder, [checkpoint], enable_checkpointing=True, max_epochs=2)
    trainer.fit(module, loader(6, shuffle=True), loader(5), **arguments)
    load_checkpoint(module.model, checkpoint.best_model_path)
    return module, checkpoint


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(gradient_checkpointing=True),
        ModelConfig(compile=True),
        ModelConfig(peft=LORA),
        pytest.param(ModelConfig(gradient_checkpointing=True, peft=LORA, compile=True), marks=pytest.mark.slow),
    ],
    ids=["checkpointing", "compile", "peft", "all"],
)
def test_training_ends_in_a_plain_folder(config, tmp_path):
    module, checkpoint = run_fit(config, tmp_path)
    keys = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert not any("_orig_mod" in key for key in keys)
    batch = {key: value for key, value in make_batch().items() if key != "special_tokens_mask"}
    with torch.no_grad():
        trained = module.model.eval()(**batch).logits
    inner = ExplainableModel(module.model).module
    module.model = finish_training(module.model)
    assert module.model is inner, "what was made for the model before training must stay good: it is the same object"
    module.model.save_pretrained(tmp_path / "model")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.allclose(again(**batch).logits, trained, atol=1e-5)
    assert module.model._compiled_call_impl is None and not any(
        vars(part).get("gradient_checkpointing") for part in module.model.modules()
    )
    assert all(parameter.requires_grad for parameter in module.model.parameters())
    # The checkpoint itself loads into a plain model too: adapters are merged on the way.
    plain = make_bert(layers=2, seed=4)
    load_checkpoint(plain, checkpoint.best_model_path)
    with torch.no_grad():
        assert torch.allclose(plain(**batch).logits, trained, atol=1e-5)
    assert list(plain.state_dict()) == list(make_bert(layers=2).state_dict())


def test_checkpointing_does_not_change_the_training(tmp_path):
    weights = [
        run_fit(config, tmp_path / str(i))[0].state_dict()
        for i, config in enumerate((ModelConfig(), ModelConfig(gradient_checkpointing=True)))
    ]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])


def test_adapters_leave_the_body_alone(tmp_path):
    first = make_bert(layers=2).bert.encoder.layer[0]
    module, _ = run_fit(ModelConfig(peft=LORA), tmp_path)
    trained = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name or "classifier" in name for name in trained)
    base = module.model.get_base_model().bert.encoder.layer[0]
    assert torch.equal(base.attention.self.query.base_layer.weight, first.attention.self.query.weight)
    merged = finish_training(module.model).bert.encoder.layer[0]
    assert not torch.equal(merged.attention.self.query.weight, first.attention.self.query.weight)


def test_training_goes_on_from_a_checkpoint_with_adapters(tmp_path):
    _, checkpoint = run_fit(ModelConfig(peft=LORA), tmp_path)
    module, _ = run_fit(ModelConfig(peft=LORA), tmp_path / "more", ckpt_path=checkpoint.last_model_path)
    assert any("lora_" in name for name in module.state_dict())
