"""Object masks through rows: against scikit-learn and loops, with the controls, and what is undefined."""

import pytest
import torch
from sklearn.metrics import average_precision_score

from calig.pipeline.attribution.pixels import to_pixels
from calig.pipeline.benchmarking import benchmark
from calig.pipeline.errors import InputError
from calig.pipeline.explainer import scalar_key
from calig.pipeline.metrics import MetricError, centre_prior, summarise
from calig.pipeline.metrics.localisation_rows import METRICS_OF_MASKS, localisation_rows
from calig.pipeline.render.leaderboard import leaderboards
from calig.pipeline.render.rows import MetricRow

GRID, SIZE = (3, 4), (12, 16)
SPECIAL = torch.zeros(4, 13, dtype=torch.bool)
SPECIAL[:, 0] = True


def masks():
    found = torch.zeros(4, *SIZE, dtype=torch.long)
    found[0, 2:7, 9:14] = 1
    found[1] = 1  # everything
    found[3] = -1  # unknown; the third is empty
    return found


def scores(seed=0):
    return torch.randn(4, 13, generator=torch.Generator().manual_seed(seed))


def measured(**more):
    given = {"special": SPECIAL, "grid": GRID, "sample_ids": [3, 5, 8, 9], **more}
    rows = localisation_rows({"a": scores(), "b": scores(1)}, masks(), **given)
    return {(row["sample_id"], row["method"], row["control"], row["metric"]): row["value"] for row in rows}


@pytest.mark.parametrize("how", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", [(12, 16), (3, 4), (13, 31), (2, 2)])
def test_maps_against_a_loop(how, size):
    flat = scores()[0, 1:]
    grid, (height, width) = flat.view(GRID), size

    def along(i, pixels, cells):
        """The two cells around a pixel's middle, and how far it is towards the second."""
        place = min(max((i + 0.5) * cells / pixels - 0.5, 0), cells - 1)
        first = min(int(place), cells - 1)
        return first, min(first + 1, cells - 1), place - first

    def value(y, x):
        if how == "nearest":
            return grid[int((y + 0.5) * 3 / height), int((x + 0.5) * 4 / width)]
        a, b, v = along(y, height, 3)
        c, d, h = along(x, width, 4)
        top, low = grid[a, c] * (1 - h) + grid[a, d] * h, grid[b, c] * (1 - h) + grid[b, d] * h
        return top * (1 - v) + low * v

    wanted = torch.tensor([[value(y, x) for x in range(width)] for y in range(height)])
    assert torch.allclose(to_pixels(flat, GRID, size, how), wanted, atol=1e-6)
    assert torch.equal(to_pixels(scores()[:, 1:], GRID, size, how)[0], to_pixels(flat, GRID, size, how))


def test_against_scikit_learn_and_the_controls():
    found, mask = measured(), masks()[0]
    for method, values in (("a", scores()), ("b", scores(1))):
        for control, sign in (("none", 1), ("reversed", -1)):
            heat = to_pixels(sign * values[0, 1:], GRID, SIZE)
            own = {metric: found[3, method, control, metric] for metric in METRICS_OF_MASKS}
            assert own["mask_auprc"] == pytest.approx(average_precision_score(mask.flatten(), heat.flatten()))
            above = heat > heat.mean()
            assert own["mask_iou"] == pytest.approx(float((above & (mask > 0)).sum() / (above | (mask > 0)).sum()))
            assert own["pointing_game"] == float(mask.flatten()[heat.argmax()])
    prior = centre_prior(*SIZE)
    assert found[3, "centre", "centre", "mask_auprc"] == pytest.approx(
        average_precision_score(mask.flatten(), prior.flatten())
    )
    # Once each, whatever the methods; a random map depends on the seed and the sample alone.
    assert sum(key[1:3] == ("random", "random") for key in found) == 4 * 3
    assert measured(seed=1)[3, "random", "random", "mask_auprc"] != found[3, "random", "random", "mask_auprc"]


def test_what_is_undefined_is_skipped():
    found = measured()
    for (sample_id, _, _, metric), value in found.items():
        undefined = sample_id in (8, 9) or (sample_id == 5 and metric == "mask_auprc")
        assert (value is None) == undefined
    summaries = summarise(
        localisation_rows({"a": scores()}, masks(), special=SPECIAL, grid=GRID, sample_ids=[3, 5, 8, 9])
    )
    assert summaries["a", "none", "mask_auprc"].n == 1 and summaries["a", "none", "mask_auprc"].n_skipped == 3
    assert summaries["centre", "centre", "pointing_game"].mean is not None
    assert scalar_key("explain", "centre", "centre", "pointing_game") == "explain/centre/pointing_game"


def test_the_centre_prior_stands_among_the_controls_of_tables():
    generator = torch.Generator().manual_seed(2)
    mask = (torch.rand(20, *SIZE, generator=generator) < 0.3).long()
    values = {name: torch.randn(20, 13, generator=generator) for name in ("a", "b")}
    given = {"special": SPECIAL[:1].expand(20, -1), "grid": GRID, "sample_ids": range(20)}
    rows = localisation_rows(values, mask, **given)
    explanations = [
        [
            {"sample_id": i, "method": name, "scores": values[name][i].tolist(), "word_ids": [None, *range(12)]}
            | {"label": 0, "prediction": 0, "steps_used": 1}
            for name in values
        ]
        for i in range(20)
    ]
    table = benchmark(rows, explanations, ["a", "b"], [])
    against = next(row for row in table if (row.method, row.metric) == ("centre", "mask_auprc") and row.group == "all")
    assert against.other == "a" and 0 < against.p <= 1 and against.n_paired == 20
    summaries = summarise(rows)
    lines = leaderboards([MetricRow(m, k, s.mean, control=c) for (m, c, k), s in summaries.items()], "a")[0]
    assert [line.name for line in lines.controls] == ["random", "centre prior", "a reversed", "b reversed"]
    assert [line.name for line in lines.methods] == ["a", "b"]


def test_bad_input():
    given = {"special": SPECIAL, "grid": GRID, "sample_ids": [3, 5, 8, 9]}
    with pytest.raises(InputError, match="'a' has 2 examples, but there are 4"):
        localisation_rows({"a": scores()[:2]}, masks(), **given)
    with pytest.raises(InputError, match=r"expected \(B, H, W\)"):
        localisation_rows({"a": scores()}, masks()[:, 0], **given)
    bad = scores()
    bad[1, 4] = float("nan")
    with pytest.raises(MetricError, match="sample 5, method 'a': the score of a patch is not finite"):
        localisation_rows({"a": bad}, masks(), **given)
    with pytest.raises(InputError, match="12 scores are no grid of 4 x 4"):
        to_pixels(scores()[:, 1:], (4, 4), SIZE)
    with pytest.raises(InputError, match="interpolation 'cubic'"):
        to_pixels(scores()[:, 1:], GRID, SIZE, "cubic")
