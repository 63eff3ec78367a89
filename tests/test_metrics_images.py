"""Operators on images, to the bit."""

import math

import pytest
import torch

from calig.pipeline.attribution.pixels import blur
from calig.pipeline.errors import InputError
from calig.pipeline.metrics import perturb_image


def images(b=2, c=3, h=6, w=8):
    return torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(0))


def test_mask_sets_patches_to_the_mean_and_touches_nothing_else():
    pixels, mean = images(), torch.tensor([0.5, -1.0, 2.0])
    keep = torch.ones(2, 12, dtype=torch.bool)
    keep[0, [0, 5]] = keep[1, 11] = False  # 3 x 4 patches of 2 x 2
    before = pixels.clone()
    out = perturb_image(pixels, [1, 0], keep, "mask", grid=(3, 4), mean=mean)
    want = pixels[[1, 0]].clone()
    want[0, :, 0:2, 0:2] = want[0, :, 2:4, 2:4] = want[1, :, 4:6, 6:8] = mean.view(3, 1, 1)
    assert torch.equal(out, want) and torch.equal(pixels, before)
    picture = torch.arange(3 * 6 * 8.0).view(3, 6, 8)
    out = perturb_image(pixels, [1, 0], keep, "mask", grid=(3, 4), mean=picture)
    assert torch.equal(out[0, :, 2:4, 2:4], picture[:, 2:4, 2:4]) and torch.equal(out[1, 0, :4], pixels[0, 0, :4])


def test_blur_puts_the_patch_of_the_blurred_image():
    pixels, sigma = images(1, 2, 6, 8), 0.6
    keep = torch.ones(1, 12, dtype=torch.bool)
    keep[0, 5] = False
    out = perturb_image(pixels, [0], keep, "blur", grid=(3, 4), sigma=sigma)
    changed = torch.zeros(6, 8, dtype=torch.bool)
    changed[2:4, 2:4] = True
    assert torch.equal(out[..., ~changed], pixels[..., ~changed])
    reach = 2  # three sigma
    weights = {d: math.exp(-d * d / (2 * sigma * sigma)) for d in range(-reach, reach + 1)}
    total = sum(weights.values())

    def inside(i, size):
        return min(max(i, 0), size - 1)

    def naive(channel, y, x):
        return sum(
            wy * wx * pixels[0, channel, inside(y + dy, 6), inside(x + dx, 8)].item()
            for dy, wy in weights.items()
            for dx, wx in weights.items()
        ) / (total * total)

    whole = blur(pixels, sigma)
    for channel, y, x in [(0, 2, 2), (1, 3, 3), (0, 2, 3), (1, 0, 0), (0, 5, 7), (1, 0, 4)]:
        assert whole[0, channel, y, x].item() == pytest.approx(naive(channel, y, x), abs=1e-5)
    assert torch.equal(out[..., 2:4, 2:4], whole[..., 2:4, 2:4])
    # by default half a patch wide; a constant image stays, also where the kernel is larger than the image
    default = perturb_image(pixels, [0], keep, "blur", grid=(3, 4))
    assert torch.equal(default[..., 2:4, 2:4], blur(pixels, 1.0)[..., 2:4, 2:4])
    torch.testing.assert_close(blur(torch.full((1, 1, 1, 3), 2.0), 9.0), torch.full((1, 1, 1, 3), 2.0))


@pytest.mark.parametrize("operator", ["mask", "blur"])
def test_all_kept_is_the_image_and_requests_do_not_touch_each_other(operator):
    pixels = images()
    keep = torch.rand(5, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    keep[0] = True
    given = {"grid": (3, 4), "mean": torch.zeros(3)}
    together = perturb_image(pixels, [0, 1, 1, 0, 1], keep, operator, **given)
    assert torch.equal(together[0], pixels[0])
    for r, b in enumerate([0, 1, 1, 0, 1]):
        assert torch.equal(together[r : r + 1], perturb_image(pixels[[b]], [0], keep[[r]], operator, **given))


def test_bad_input_is_named():
    pixels, keep = images(), torch.ones(1, 12, dtype=torch.bool)
    given = {"grid": (3, 4), "mean": torch.zeros(3)}
    for operator in ("delete", "attention"):
        with pytest.raises(InputError, match=f"'{operator}' drops patch tokens.*'mask' or 'blur'"):
            perturb_image(pixels, [0], keep, operator, **given)
    for options, message in (
        ({"operator": "blurr"}, "Did you mean 'blur'"),
        ({"grid": (4, 4)}, r"grid of 4 x 4"),
        ({"grid": (0, 4)}, r"grid of 0 x 4"),
        ({"mean": None}, "needs the data set's mean"),
        ({"mean": torch.zeros(2)}, r"mean has the shape \(2,\)"),
        ({"keep": keep[:, :9]}, r"expected \(1, 12\)"),
        ({"operator": "blur", "sigma": 0.0}, r"sigma = 0\.0 must be positive"),
    ):
        full = {"keep": keep, "operator": "mask", **given} | options
        with pytest.raises(InputError, match=message):
            perturb_image(pixels, [0], full.pop("keep"), full.pop("operator"), **full)
