"""Images in the engine: patches and special tokens found at run time, baselines of pixels, patches hidden as keys."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch, make_bert
from families import IMAGE, MAEClassifier, build, images
from families import VISION as FAMILIES
from transformers import (
    SwinConfig,
    SwinForImageClassification,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from calig.pipeline.attribution import ExplainableModel, UnsupportedModelError, attribute
from calig.pipeline.attribution.attention import hidden_keys
from calig.pipeline.attribution.pixels import baseline_pixels, blur
from calig.pipeline.errors import InputError

VIT = FAMILIES[0]


@pytest.fixture(scope="module")
def vit():
    return build(VIT)


PROCESSOR = SimpleNamespace(do_normalize=True, do_rescale=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.5])


def test_pixels_of_the_baselines():
    pixels = images(2)["pixel_values"]
    black = baseline_pixels(pixels, "black", PROCESSOR)
    # As the processor makes it of an image of zeros.
    for channel, value in enumerate((-0.5 / 0.2, -0.4 / 0.25, -0.3 / 0.5)):
        assert torch.allclose(black[:, channel], torch.tensor(value).double())
    for baseline in ("mean", "pad"):
        assert (baseline_pixels(pixels, baseline, PROCESSOR) == 0).all()
        assert (baseline_pixels(pixels, baseline, None) == 0).all()
    # Without normalisation the mean colour is the mean itself, and black is 0.
    plain = SimpleNamespace(do_normalize=False, image_mean=[0.5, 0.4, 0.3], image_std=None)
    assert torch.allclose(baseline_pixels(pixels, "mean", plain)[0, 1], torch.tensor(0.4).double())
    assert (baseline_pixels(pixels, "black", SimpleNamespace(image_processor=plain)) == 0).all()


def test_blur_equals_scipy():
    filters = pytest.importorskip("scipy.ndimage")
    pixels = images(2, size=40)["pixel_values"]
    wanted = filters.gaussian_filter(pixels.numpy(), sigma=(0, 0, 2, 2), mode="nearest", truncate=3)
    assert torch.allclose(blur(pixels, 2), torch.from_numpy(wanted), atol=1e-10)
    constant = torch.full((1, 3, 12, 20), 0.7)
    assert torch.allclose(blur(constant, 1), constant)


@pytest.mark.parametrize("baseline", ["mean", "black", "blur", "zero"])
def test_output_change_and_completeness_of_every_baseline(vit, baseline):
    batch = images()
    result = attribute(vit, batch, "integrated_gradients", target=1, baseline=baseline, tokenizer=PROCESSOR, steps=64)
    # A state of zeros is near-singular behind a norm: allowed, but nothing closes its gap at 64 nodes.
    assert baseline == "zero" or (result.completeness_gap < 2e-2).all()
    with torch.no_grad():
        here = vit(**batch).logits
        if baseline != "zero":
            other = vit(baseline_pixels(batch["pixel_values"], baseline, PROCESSOR)).logits
            assert torch.allclose(result.output_change.double(), (here - other)[:, 1], atol=1e-5)
    # A special token is embedded alike in an image and its baseline, so nothing is left for it on the first layer.
    assert result.special.sum(1).tolist() == [1, 1, 1] and (result.scores[:, 0] == 0).all()


def test_bad_baselines_of_images_and_text_say_so(vit):
    with pytest.raises(InputError, match=r"'black'.*image processor.*'mean' or 'blur'"):
        attribute(vit, images(), baseline="black")
    with pytest.raises(InputError, match="'mask' is for text; images take black, mean, blur"):
        attribute(vit, images(), baseline="mask")
    with pytest.raises(InputError, match="'blur' is for images; text takes pad"):
        attribute(make_bert(), make_batch(), baseline="blur")
    grey = SimpleNamespace(do_normalize=True, image_mean=[0.1, 0.2], image_std=[0.1, 0.2])
    with pytest.raises(InputError, match="2 channel means, the images have 3"):
        attribute(vit, images(), baseline="black", tokenizer=grey)
    with pytest.raises(InputError, match="no `image_mean`"):
        attribute(vit, images(), baseline="mean", tokenizer=SimpleNamespace(do_normalize=False))
    with pytest.raises(InputError, match=r"attention_mask has shape \(3, 4\); expected \(3, 17\)"):
        attribute(vit, images() | {"attention_mask": torch.ones(3, 4)})
    with pytest.raises(InputError, match=r"special_tokens_mask has shape \(3, 16\)"):
        attribute(vit, images(), special_tokens_mask=torch.zeros(3, 16))


def test_random_state_and_images_of_another_size(vit):
    wrapped = ExplainableModel(vit)
    before = torch.get_rng_state()
    small = attribute(wrapped, images(), "input_x_gradient", target=1)
    assert torch.equal(torch.get_rng_state(), before)
    large = attribute(wrapped, images(size=24) | {"interpolate_pos_encoding": True}, "input_x_gradient", target=1)
    assert small.scores.shape == (3, 17) and large.scores.shape == (3, 37)
    assert large.special.sum(1).tolist() == [1, 1, 1]


def test_a_random_ranking_depends_on_the_image_alone(vit):
    together = attribute(vit, images(), "random", target=1).scores
    alone = attribute(vit, {"pixel_values": images()["pixel_values"][1:2]}, "random", target=1).scores
    assert torch.equal(alone[0], together[1]) and not torch.equal(together[0], together[1])


# --------------------------------------------------------------------------------------------- masked autoencoders


def test_a_masked_autoencoder_is_a_plain_vit_with_its_weights(tmp_path):
    family = next(family for family in FAMILIES if family.name == "vit_mae")
    mae = build(family)
    pretrained = ViTMAEForPreTraining(ViTMAEConfig(**IMAGE, decoder_hidden_size=12, decoder_num_attention_heads=3))
    pretrained.vit.load_state_dict(mae.vit.state_dict())
    pretrained.double().save_pretrained(tmp_path)
    plain = ViTForImageClassification.from_pretrained(tmp_path, num_labels=3, dtype=torch.float64).eval()
    plain.classifier.load_state_dict(mae.head.state_dict())
    found, wanted = (attribute(model, images(), target=1) for model in (plain, mae))
    assert torch.allclose(found.scores, wanted.scores, atol=1e-6)


def test_an_embedding_that_shuffles_or_drops_patches_is_refused():
    class Shuffled(MAEClassifier):
        def forward(self, pixel_values):
            return self.head(self.vit(pixel_values).last_hidden_state[:, 0])

    for ratio in (0.0, 0.5):
        torch.manual_seed(0)
        model = Shuffled(ViTMAEConfig(**IMAGE, mask_ratio=ratio))
        with pytest.raises(
            UnsupportedModelError, match=r"'vit_mae' embeds the same image differently each time.*noise"
        ):
            attribute(model, images(dtype=torch.float32))


def test_a_model_that_merges_patches_says_so():
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=3
    )
    model = SwinForImageClassification(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"'swin' took states of shape .* layer by layer"):
        attribute(model, images(size=32, dtype=torch.float32))


# --------------------------------------------------------------------------------------------- positions hidden as keys


def removed(model, blocks, batch, keep):
    """The logits of one example with tokens physically taken away in front of the first block."""
    handle = blocks[0].register_forward_pre_hook(
        lambda _m, args, kwargs: ((args[0][:, keep], *args[1:]), kwargs), with_kwargs=True
    )
    try:
        with torch.no_grad():
            return model(**batch).logits[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name in ("vit", "deit")], ids=lambda family: family.name)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hidden_patches_are_as_good_as_removed(family, implementation):
    model, batch = build(family), images()
    model.set_attn_implementation(implementation)
    tokens = family.special + 16
    keep = torch.rand(3, tokens, generator=torch.Generator().manual_seed(5)) > 0.5
    keep[:, : family.special] = True
    with hidden_keys(model, keep), torch.no_grad():
        found = model(**batch).logits
    for row in range(3):
        one = {"pixel_values": batch["pixel_values"][row : row + 1]}
        wanted = removed(model, model.get_submodule(family.blocks), one, keep[row])
        assert torch.allclose(found[row], wanted, atol=1e-5)
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, found, atol=1e-3)


def test_hidden_tokens_of_text_are_as_good_as_removed():
    model, batch = make_bert(dtype=torch.float64), make_batch((9, 9, 6))
    keys = {key: batch[key] for key in ("input_ids", "attention_mask")}
    keep = torch.ones(3, 9, dtype=torch.bool)
    keep[:, [2, 4]] = False
    with hidden_keys(model, keep), torch.no_grad():
        found = model(**keys).logits
    for row in range(3):
        left = keep[row] & batch["attention_mask"][row].bool()
        with torch.no_grad():
            wanted = model(keys["input_ids"][row : row + 1, left], position_ids=torch.arange(9)[None, left]).logits[0]
        assert torch.allclose(found[row], wanted, atol=1e-5)


def test_hidden_keys_clean_up_and_say_what_does_not_fit(vit):
    keep = torch.ones(3, 17, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="theirs"), hidden_keys(vit, keep):
        raise RuntimeError("theirs")
    assert vit.config._attn_implementation == "sdpa"
    with (
        pytest.raises(InputError, match=r"mask of shape \(2, 17\); the pass has 3 rows of 17"),
        hidden_keys(vit, keep[:2]),
    ):
        vit(**images())
    assert vit.config._attn_implementation == "sdpa"
    from transformers import MPNetConfig, MPNetForSequenceClassification

    config = MPNetConfig(vocab_size=60, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=8)
    other = MPNetForSequenceClassification(config)
    with (
        pytest.raises(UnsupportedModelError, match="'mpnet' does not use the attention interface"),
        hidden_keys(other, keep),
    ):
        pass
