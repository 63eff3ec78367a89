"""Classifiers of images: from scratch, from folders, from masked autoencoders, saved and loaded again; pre-training."""

import shutil
from dataclasses import replace

import pytest
import torch
from families import IMAGE
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from calig.datamodules.image_processor import ImageProcessor
from calig.pipeline.attribution import attribute
from calig.pipeline.config import AdapterConfig, ModelConfig, PretrainConfig, ScratchConfig
from calig.pipeline.errors import InputError
from calig.pipeline.image_models import load_autoencoder
from calig.pipeline.models import finish_training, load_model, load_processor, prepare_training
from calig.pipeline.module import ClassificationModule
from calig.pipeline.pretraining import PretrainingModule
from calig.pipeline.stages.fit import save_model

FAMILIES = ("vit", "deit", "beit", "dinov2", "vit_mae")
NAMES = ["cat", "dog", "owl"]
PROCESSOR = ImageProcessor.plain(16, [0.4] * 3, [0.2] * 3)
SCRATCH = ScratchConfig(layers=2, width=24, heads=3, intermediate=48, dropout=0.0, initializer_range=0.2, image_size=16)


def scratch(family):
    torch.manual_seed(0)
    return load_model(ModelConfig(scratch=replace(SCRATCH, type=family)), NAMES, None, processor=PROCESSOR).eval()


def pixels(count=2, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(pixel_values=pixels()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_from_scratch_is_saved_loaded_trained_and_explained(family, tmp_path):
    model = scratch(family)
    assert model.config.model_type == ("vit" if family == "vit_mae" else family)
    assert (model.config.image_size, model.config.patch_size, model.config.num_labels) == (16, 4, 3)
    save_model(model, PROCESSOR, tmp_path / "model")
    # A plain Hugging Face folder ...
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(plain), logits(model)) and plain.config.id2label == dict(enumerate(NAMES))
    # ... that comes back here by its name and as a checkpoint, with its processor.
    for settings in ({"name": str(tmp_path / "model")}, {"checkpoint": str(tmp_path / "model")}):
        config = ModelConfig(**settings)
        assert load_processor(config) == PROCESSOR
        again = load_model(config, NAMES, None, need_head=True, processor=PROCESSOR).eval()
        assert torch.equal(logits(again), logits(model))
    # Another task: a fresh head on the same encoder.
    other = load_model(ModelConfig(name=str(tmp_path / "model")), ["a", "b"], None, processor=PROCESSOR)
    assert other.config.num_labels == 2 and other(pixel_values=pixels()).logits.shape == (2, 2)
    model.train()(pixel_values=pixels(), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "mask_token" not in name)
    result = attribute(model.eval(), {"pixel_values": pixels()}, tokenizer=PROCESSOR, target=1)
    assert result.scores.shape == (2, 16 + (2 if family == "deit" else 1)) and torch.isfinite(result.scores).all()


def test_a_classifier_takes_the_encoder_of_a_masked_autoencoder(tmp_path):
    torch.manual_seed(0)
    autoencoder = load_autoencoder(
        ModelConfig(scratch=ScratchConfig(**vars(SCRATCH) | {"type": "vit_mae"})),
        PretrainConfig(decoder_layers=1, decoder_width=12, decoder_heads=3, mask_ratio=0.5),
        PROCESSOR,
    ).eval()
    assert autoencoder.config.mask_ratio == 0.5 and autoencoder.config.decoder_hidden_size == 12
    save_model(autoencoder, PROCESSOR, tmp_path / "pretrained")
    model = load_model(ModelConfig(name=str(tmp_path / "pretrained")), NAMES, None, processor=PROCESSOR).eval()
    # The independent reference: the encoder itself with nothing hidden and patches in their order.
    encoder = ViTMAEModel.from_pretrained(tmp_path / "pretrained", mask_ratio=0.0).eval()
    with torch.no_grad():
        wanted = encoder(pixels(), noise=torch.arange(16).expand(2, -1)).last_hidden_state
        found = model.vit(pixels()).last_hidden_state
        assert torch.allclose(found, wanted, atol=1e-5)
        assert torch.allclose(logits(model), model.classifier(wanted[:, 0]), atol=1e-5)
    # Fine-tuned, saved and continued: the folder is a ViT, the name that of the autoencoder.
    save_model(model, PROCESSOR, tmp_path / "model")
    both = ModelConfig(name=str(tmp_path / "pretrained"), checkpoint=str(tmp_path / "model"))
    again = load_model(both, NAMES, None, need_head=True, processor=PROCESSOR).eval()
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(InputError, match="has no trained classification head"):
        load_model(ModelConfig(name=str(tmp_path / "pretrained")), NAMES, None, need_head=True, processor=PROCESSOR)
    # Pre-training goes on from a folder, too.
    further = load_autoencoder(
        ModelConfig(name=str(tmp_path / "pretrained")), PretrainConfig(mask_ratio=0.25), PROCESSOR
    )
    assert further.config.mask_ratio == 0.25
    assert torch.equal(further.vit.layers[0].layernorm_before.weight, autoencoder.vit.layers[0].layernorm_before.weight)


def test_what_does_not_fit_says_so(tmp_path):
    save_model(scratch("vit"), PROCESSOR, tmp_path / "model")
    large = ImageProcessor.plain(32, [0.5] * 3, [0.5] * 3)
    with pytest.raises(InputError, match=r"images of 32 x 32 pixels, and the model \('vit'\) does not take them"):
        load_model(ModelConfig(name=str(tmp_path / "model")), NAMES, None, processor=large)
    with pytest.raises(InputError, match=r"model.scratch.type=bart cannot be made as a classifier of images.*Take vit"):
        scratch("bart")
    with pytest.raises(InputError, match=r"model.scratch.type=vit is none. Take model=mae_tiny"):
        load_autoencoder(ModelConfig(scratch=ScratchConfig(type="vit")), PretrainConfig(), PROCESSOR)
    with pytest.raises(InputError, match=r"model.name=.*model is a 'vit'. Name a ViT-MAE"):
        load_autoencoder(ModelConfig(name=str(tmp_path / "model")), PretrainConfig(), PROCESSOR)
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    assert load_processor(ModelConfig(name=str(tmp_path / "model"))) is None
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(InputError, match="could not be loaded"):
        load_autoencoder(ModelConfig(name="no/such-model"), PretrainConfig(), PROCESSOR)


def test_adapters_are_trained_alone_and_merged():
    model = scratch("vit")
    before = {name: value.clone() for name, value in model.named_parameters()}
    module = ClassificationModule(prepare_training(model, ModelConfig(peft=AdapterConfig(r=2))), NAMES)
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    assert trained and all("lora_" in name or "classifier" in name for name in trained)
    optimizer = torch.optim.SGD([value for value in module.parameters() if value.requires_grad], lr=0.5)
    batch = {"pixel_values": pixels(), "labels": torch.tensor([0, 2])}
    for _ in range(2):
        optimizer.zero_grad()
        module(batch).loss.backward()
        optimizer.step()
    wanted = module.eval()(batch).logits
    plain = finish_training(module.model)
    assert torch.allclose(plain(pixel_values=pixels()).logits, wanted, atol=1e-5)
    changed = {name for name, value in plain.named_parameters() if not torch.equal(value, before[name])}
    assert {"classifier.weight", "classifier.bias"} < changed < set(before)


def test_images_of_another_size_are_no_trouble_to_a_family_that_interpolates():
    settings = {**IMAGE, "num_labels": 3, "image_size": 28}
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model("dinov2", **settings))
    assert model(pixel_values=pixels()).logits.shape == (2, 3)


def test_the_pretraining_loss_is_that_of_the_library():
    torch.manual_seed(0)
    config = ViTMAEConfig(**IMAGE, decoder_hidden_size=12, decoder_num_attention_heads=3, decoder_num_hidden_layers=1)
    model = ViTMAEForPreTraining(config).eval()
    module = PretrainingModule(model, None)
    logged = {}
    module.log = lambda key, value, **_: logged.update({key: value})
    batch = {"pixel_values": pixels(3), "sample_id": torch.tensor([4, 9, 2])}
    module.validation_step(batch, 0)
    together = module.val_loss.compute()
    module.val_loss.reset()
    for row in range(3):  # what is hidden depends on the example and not on its batch
        module.validation_step({key: value[row : row + 1] for key, value in batch.items()}, row)
    assert torch.allclose(module.val_loss.compute(), together, atol=1e-6)
    noise = torch.stack([torch.rand(16, generator=torch.Generator().manual_seed(i)) for i in (4, 9, 2)])
    assert torch.allclose(model(batch["pixel_values"], noise=noise).loss, together, atol=1e-6)
    torch.manual_seed(3)
    loss = module.training_step(batch, 0)
    torch.manual_seed(3)
    assert torch.equal(loss, model(batch["pixel_values"]).loss) and torch.equal(logged["pretrain/loss"], loss)
