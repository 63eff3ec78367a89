"""Perturbed images through the planner, against brute force: pixels set by hand, tokens taken away by hand."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from families import IMAGE, UNNAMED, VISION, build, images
from transformers import SwinConfig, SwinForImageClassification, ViTMAEConfig, ViTMAEModel

from calig.pipeline.attribution import ExplainableModel, UnsupportedModelError
from calig.pipeline.attribution.dropping import dropped_positions, hidden_positions
from calig.pipeline.attribution.pixels import blur, patch_grid
from calig.pipeline.errors import InputError
from calig.pipeline.metrics import Request, perturbed_logits
from calig.pipeline.metrics.faithfulness import faithfulness_rows
from calig.pipeline.metrics.names import operator_name
from calig.pipeline.metrics.patches import PATCH_OPERATORS, PatchPerturbation

FAMILIES = [*VISION, *(family for family in UNNAMED if family.image)]
PROCESSOR = SimpleNamespace(do_normalize=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.5])
named = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


class Asked:
    """A model's forward that counts the images it ran and the passes it took."""

    def __init__(self, model):
        self.model, self.images, self.passes = model, 0, []

    def __call__(self, batch):
        self.images += len(batch["pixel_values"])
        self.passes.append(len(batch["pixel_values"]))
        return self.model.logits_of_batch(batch)


def prepared(family, count=3):
    model, batch = ExplainableModel(build(family)), images(count)
    with model.session():
        inputs = model.prepare(batch)
    return model, batch, inputs.special, inputs.mask


def keeps(special, seed=0):
    """A few masks per example; the last one keeps every patch."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for example in range(len(special)):
        for share in (0.2, 0.5, 0.5, 0.9, 2.0):
            found.append((example, (torch.rand(special.shape[1], generator=generator) < share) | special[example]))
    return found


def run(model, batch, special, mask, requests, processor=None, **more):
    asked = Asked(model)
    with model.session():
        found = perturbed_logits(
            asked, batch, requests, tokens=PatchPerturbation(model, processor), special=special, mask=mask, **more
        )
    return found, asked


def logits(model, pixels):
    with torch.no_grad():
        output = model.module(pixel_values=pixels)
    return getattr(output, "logits", output).float()


def by_hand(image, keep, special, operator):
    """Patch by patch: 4 x 4 patches of 4 x 4 pixels."""
    filled = blur(image[None], 2.0)[0] if operator == "blur" else torch.zeros_like(image)
    changed = image.clone()
    for number, stays in enumerate(keep[~special].tolist()):
        row, column = 4 * (number // 4), 4 * (number % 4)
        if not stays:
            changed[:, row : row + 4, column : column + 4] = filled[:, row : row + 4, column : column + 4]
    return changed


@named
@pytest.mark.parametrize("operator", ["mask", "blur"])
def test_pixels_change_patch_by_patch(family, operator):
    model, batch, special, mask = prepared(family)
    wanted = keeps(special)
    found, _ = run(model, batch, special, mask, [Request(e, keep, operator) for e, keep in wanted])
    for logit, (example, keep) in zip(found, wanted, strict=True):
        image = by_hand(batch["pixel_values"][example], keep, special[example], operator)
        assert torch.allclose(logit, logits(model, image[None])[0], atol=1e-5)


def removed(model, family, pixels, keep):
    """The logits of one image with positions taken away in front of the first block, by a hook of the test's own."""
    block = model.module.get_submodule(family.blocks)[0]

    def take(_module, args, kwargs):
        if args:
            return (args[0][:, keep], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"][:, keep]}

    handle = block.register_forward_pre_hook(take, with_kwargs=True)
    try:
        return logits(model, pixels)[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("operator", ["attention", "delete"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name != "beit"], ids=lambda family: family.name)
def test_hiding_and_dropping_equal_physical_removal(family, operator):
    model, batch, special, mask = prepared(family)
    wanted = keeps(special)
    found, asked = run(model, batch, special, mask, [Request(e, keep, operator) for e, keep in wanted])
    for logit, (example, keep) in zip(found, wanted, strict=True):
        alone = removed(model, family, batch["pixel_values"][example : example + 1], keep)
        assert torch.allclose(logit, alone, atol=1e-5)
    assert asked.images == len({(e, tuple(keep.tolist())) for e, keep in wanted})
    # The model is as it was.
    assert torch.equal(
        logits(model, batch["pixel_values"]), logits(ExplainableModel(build(family)), images()["pixel_values"])
    )


def test_beit_hides_its_patches_and_says_that_none_can_be_dropped():
    """Its relative positions are a table over all pairs: reference with a mask of the test's own at every key."""
    family = next(family for family in VISION if family.name == "beit")
    model, batch, special, mask = prepared(family, 2)
    with pytest.raises(InputError, match=r"'delete' does not work.*'beit' do not run on fewer patches.*'attention'"):
        PatchPerturbation(model).check("delete")
    keep = keeps(special)[1][1]
    found, _ = run(model, batch, special, mask, [Request(0, keep, "attention")])

    import transformers.models.beit.modeling_beit as home

    original = home.eager_attention_forward

    def attend(module, query, key, value, attention_mask=None, *args, **kwargs):
        hidden = torch.zeros(len(keep), dtype=query.dtype).masked_fill(~keep, -1e9)
        return original(
            module, query, key, value, hidden if attention_mask is None else attention_mask + hidden, *args, **kwargs
        )

    home.eager_attention_forward = attend
    model.module.set_attn_implementation("eager")
    last = model.module.get_submodule(family.blocks)[-1]
    handle = last.register_forward_hook(
        lambda _m, _a, out: (out[0][:, keep], *out[1:]) if isinstance(out, tuple) else out[:, keep]
    )
    try:
        wanted = logits(model, batch["pixel_values"][:1])
    finally:
        handle.remove()
        home.eager_attention_forward = original
    assert torch.allclose(found, wanted, atol=1e-5)


def test_dropping_is_what_a_masked_autoencoder_does_itself():
    """Independent reference: the encoder's own random masking, told by its `noise` which patches to keep."""
    family = next(family for family in VISION if family.name == "vit_mae")
    model, batch, special, mask = prepared(family, 2)
    own = ViTMAEModel(ViTMAEConfig(**IMAGE, mask_ratio=0.75)).double().eval()
    own.load_state_dict(model.module.vit.state_dict())
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    with torch.no_grad():
        wanted = model.module.head(own(**batch, noise=noise).last_hidden_state[:, 0])
    stays = noise.argsort(1).argsort(1) < 4
    keep = torch.cat([torch.ones(2, 1, dtype=torch.bool), stays], 1)
    found, _ = run(model, batch, special, mask, [Request(e, keep[e], "delete") for e in range(2)])
    assert torch.allclose(found, wanted.float(), atol=1e-5)


@pytest.mark.parametrize("operator", ["attention", "delete"])
@named
def test_an_image_without_patches(family, operator):
    """[CLS] alone where the head reads it; a head that averages patches gets the mean image."""
    if (family.name, operator) == ("beit", "delete"):
        return
    model, batch, special, mask = prepared(family, 1)
    found, _ = run(model, batch, special, mask, [Request(0, torch.zeros(special.shape[1], dtype=torch.bool), operator)])
    if family.reads == "first":
        wanted = removed(model, family, batch["pixel_values"], special[0])
    else:
        wanted = logits(model, torch.zeros_like(batch["pixel_values"]))[0]
    assert found.isfinite().all() and torch.allclose(found[0], wanted, atol=1e-5)


def test_equal_images_run_once_and_passes_hold_the_budget():
    model, batch, special, mask = prepared(VISION[0])
    whole = torch.ones(17, dtype=torch.bool)
    keep = whole.clone()
    keep[[3, 9]] = False
    other = keep.clone()
    other[0] = False  # what is said of a special token does not matter
    requests = [Request(e, k, o) for o in PATCH_OPERATORS for k in (whole, keep, other) for e in (0, 1)]
    found, asked = run(model, batch, special, mask, requests, token_budget=3 * 17)
    assert asked.images == 2 + 2 * len(PATCH_OPERATORS) and max(asked.passes) <= 3
    assert len(found) == len(requests)
    alone = torch.cat([run(model, batch, special, mask, [request])[0] for request in requests])
    assert torch.allclose(found, alone, atol=1e-5)
    assert (found[[0, 6, 12, 18]] == found[0]).all()


def test_the_mean_comes_from_the_processor():
    model, batch, special, mask = prepared(VISION[0], 1)
    nothing = [Request(0, special[0], "mask")]
    for processor, colour in (
        (None, [0, 0, 0]),
        (PROCESSOR, [0, 0, 0]),
        (SimpleNamespace(do_normalize=False, image_mean=[0.5, 0.4, 0.3]), [0.5, 0.4, 0.3]),
    ):
        found, _ = run(model, batch, special, mask, nothing, processor)
        plain = torch.tensor(colour, dtype=torch.double).view(1, 3, 1, 1).expand(1, 3, 16, 16)
        assert torch.allclose(found, logits(model, plain), atol=1e-5)


def test_faithfulness_of_an_image_against_loops():
    model, batch, special, mask = prepared(VISION[0], 2)
    scores = torch.randn(2, 17, generator=torch.Generator().manual_seed(4))
    target = logits(model, batch["pixel_values"]).argmax(1)
    with model.session():
        rows = faithfulness_rows(
            model.logits_of_batch,
            batch,
            {"m": scores},
            target=target,
            special=special,
            mask=mask,
            sample_ids=[5, 7],
            tokens=PatchPerturbation(model),
            metrics=("comprehensiveness", "positive_auc", "negative_auc"),
            operators=("mask", "delete"),
        )
    found = {
        (row["sample_id"], row["metric"], row["operator"]): row["value"]
        for row in rows
        if row["q"] is None and row["control"] == "none" and row["space"] != "logit"
    }
    for example, sample_id in enumerate((5, 7)):
        image, order = batch["pixel_values"][example], (scores[example, 1:].argsort(descending=True) + 1).tolist()

        def without(gone, operator, example=example, image=image):
            keep = torch.ones(17, dtype=torch.bool)
            keep[gone] = False
            if operator == "mask":
                return logits(model, by_hand(image, keep, special[example], "mask")[None])[0]
            return removed(model, VISION[0], image[None], keep)

        for operator in ("mask", "delete"):
            p = lambda gone, o=operator, t=target[example]: float(without(gone, o).softmax(-1)[t])
            drops = [p([]) - p(order[: max(1, math.ceil(round(q * 16, 6)))]) for q in (0.01, 0.05, 0.1, 0.2, 0.5)]
            assert found[sample_id, "comprehensiveness", operator] == pytest.approx(sum(drops) / 5, abs=1e-5)
            for name, ranking in (("positive_auc", order), ("negative_auc", order[::-1])):
                right = []
                for tenths in range(10):
                    gone = ranking[: math.ceil(tenths * 16 / 10)]
                    right.append(float(without(gone, operator).argmax() == target[example]))
                area = 100 * sum((a + b) / 20 for a, b in itertools.pairwise(right))
                assert found[sample_id, name, operator] == pytest.approx(area)


def test_grids():
    assert patch_grid(224, 224, 196, 16) == (14, 14) and patch_grid(224, 112, 98, None) == (14, 7)
    assert patch_grid(30, 30, 9, 8) == (3, 3)  # what does not fill a patch is cut off by the model
    assert patch_grid(32, 32, 16, 16) == (4, 4)  # a config may speak of another tower
    for count in (15, 0):
        with pytest.raises(InputError, match=rf"32 x 32 pixels has no grid of {count} square patches"):
            patch_grid(32, 32, count, 8)


def test_what_does_not_fit_says_so():
    model, batch, special, mask = prepared(VISION[0])
    check = PatchPerturbation(model).check
    for operator in PATCH_OPERATORS:
        check(operator)
    with pytest.raises(InputError, match=r"operator on images 'blurr'.*Did you mean 'blur'.*'mean' is 'mask'"):
        check("blurr")
    assert [operator_name(name) for name in ("mean", "drop", "blur")] == ["mask", "delete", "blur"]
    with pytest.raises(InputError, match="lacks 'pixel_values'. It has: input_ids"):
        run(model, {"input_ids": mask}, special, mask, [Request(0, mask[0])])
    keep = mask.clone()
    keep[0, 3] = False
    for context in (dropped_positions, hidden_positions):
        with pytest.raises(InputError, match="as many positions each, got from 16 to 17"), context(model, keep):
            pass
        with pytest.raises(InputError, match=r"\(3, 17\) are to stay|mask of shape \(3, 17\)"), context(model, mask):
            logits(model, batch["pixel_values"][:1])
    assert model.module.config._attn_implementation == "sdpa"
    swin = SwinForImageClassification(
        SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[1, 2], window_size=4)
    )
    with pytest.raises((InputError, UnsupportedModelError)):
        PatchPerturbation(ExplainableModel(swin)).check("delete")
