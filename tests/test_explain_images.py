"""Images through the explainer: rows, pictures and metrics of every family and method, and files that are whole."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch, make_bert
from families import UNNAMED, VISION, build, images
from PIL import Image

from calig.pipeline.attribution import attribute, available_methods
from calig.pipeline.attribution.pixels import to_pixels
from calig.pipeline.calibrating import CalibrationSettings, Calibrator
from calig.pipeline.errors import InputError
from calig.pipeline.explained import Explained
from calig.pipeline.explainer import Explainer, ExplainSettings
from calig.pipeline.image_rows import MAX_SIDE, pictures
from calig.pipeline.manifest import take_up, write_shard
from calig.pipeline.metrics import mask_auprc, summarise
from calig.pipeline.metrics.names import METRICS
from calig.pipeline.records import read_rows

FAMILIES = [*VISION, *(family for family in UNNAMED if family.image)]
PROCESSOR = SimpleNamespace(do_normalize=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.5])
FEW = {"ca_lig": {"steps": 4}, "input_x_gradient": {}, "random": {}}


def batch_of(count=3, *, masks=True):
    batch = {**images(count), "sample_id": torch.arange(10, 10 + count), "labels": torch.arange(count) % 3}
    if masks:
        batch["object_mask"] = torch.zeros(count, 16, 16, dtype=torch.long)
        batch["object_mask"][:, 3:9, 5:12] = 1
        batch["object_mask"][-1] = -1  # not known
    return batch


def explained(family, methods=FEW, batch=None, processor=PROCESSOR, **settings):
    explainer = Explainer(build(family), processor, ExplainSettings(methods, **settings))
    return explainer.explain(batch_of() if batch is None else batch)


def values(rows):
    names = ("sample_id", "method", "control", "metric", "operator", "space", "q")
    return {tuple(row[name] for name in names): row["value"] for row in rows if row["metric"] not in ("seconds",)}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_rows_of_every_family(family):
    found = explained(family, operators=("mean", "blur", "attention"))
    assert not found.failures and len(found.explanations) == 9
    for row in found.explanations:
        patches = [i for i, number in enumerate(row["word_ids"]) if number is not None]
        assert row["grid"] == [4, 4] and [row["word_ids"][i] for i in patches] == list(range(16))
        assert [row["tokens"][i] for i in patches[:5]] == ["r1c1", "r1c2", "r1c3", "r1c4", "r2c1"]
        special = [row["tokens"][i] for i in range(len(row["tokens"])) if i not in patches]
        assert special == ["[CLS]", *(f"[REG{i}]" for i in range(1, family.special))][: family.special]
        assert len(row["scores"]) == len(row["tokens"]) == 16 + family.special
        assert row["image_ref"] == f"images/{row['sample_id']}.png"
        known = None if row["sample_id"] == 12 else f"images/{row['sample_id']}-mask.png"
        assert row["mask_ref"] == known and row["rationale"] is None
    target = torch.tensor([row["target"] for row in found.explanations[:3]])
    model = build(family)
    own = attribute(model, images(), target=target, steps=4, tokenizer=PROCESSOR)
    for row, scores in zip(found.explanations[:3], own.scores, strict=True):
        assert row["method"] == "ca_lig" and torch.allclose(torch.tensor(row["scores"]), scores, atol=1e-5)
    metrics = values(found.metrics)
    for operator in ("mask", "blur", "attention"):
        assert (10, "ca_lig", "reversed", "comprehensiveness", operator, "probability", 0.5) in metrics
    content = ~own.special[0]
    heat = to_pixels(own.scores[0][content], (4, 4), (16, 16))
    auprc = metrics[10, "ca_lig", "none", "mask_auprc", None, None, None]
    assert auprc == pytest.approx(mask_auprc(heat, batch_of()["object_mask"][0]))
    assert metrics[12, "ca_lig", "none", "mask_auprc", None, None, None] is None
    assert metrics[10, "centre", "centre", "pointing_game", None, None, None] in (0.0, 1.0)


def test_every_method_explains_images_or_says_why_not():
    methods = {name: {"steps": 3} if name in ("ca_lig", "integrated_gradients") else {} for name in available_methods()}
    found = explained(VISION[0], methods, batch_of(2), operators=())
    done, failed = ({row["method"] for row in rows} for rows in (found.explanations, found.failures))
    assert done | failed == set(methods) and not done & failed
    assert done >= set(methods) - {"shap", "lime", "occlusion"}, found.failures
    for row in found.failures:
        assert row["method"] in row["reason"] or "image" in row["reason"], row


@pytest.mark.parametrize("baseline", ["black", "mean", "blur"])
def test_baselines_of_images_are_options_of_the_methods(baseline):
    family = VISION[0]
    found = explained(family, {"integrated_gradients": {"steps": 4, "baseline": baseline}}, operators=())
    own = attribute(
        build(family), images(), "integrated_gradients", baseline=baseline, steps=4, tokenizer=PROCESSOR
    ).scores
    for row, scores in zip(found.explanations, own, strict=True):
        assert torch.allclose(torch.tensor(row["scores"]), scores, atol=1e-6)


def test_a_batch_equals_its_images_one_by_one_in_all_metrics():
    methods = {"ca_lig": {"steps": 3}, "generic_attention": {}}
    chosen = {"metrics": METRICS, "operators": ("mean", "drop"), "only": {"drop": [10]}}
    together = explained(VISION[0], methods, **chosen)
    assert not together.failures
    alone = Explained()
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in batch_of().items()}
        alone.extend(explained(VISION[0], methods, one, **chosen))
    one, other = values(together.metrics), values(alone.metrics)
    assert one.keys() == other.keys() and len(together.metrics) == len(alone.metrics)
    for key, value in one.items():
        assert value == pytest.approx(other[key], abs=2e-4), key
    assert {key[0] for key in one if key[4] == "delete"} == {10} and {key[4] for key in one} == {"mask", "delete", None}
    assert {row["metric"] for row in together.metrics} >= set(METRICS)
    assert together.files == alone.files


def test_sensitivity_puts_its_noise_on_the_pixels():
    found = explained(VISION[0], {"input_x_gradient": {}}, operators=("mask",), metrics=("sensitivity_max",))
    value = next(row["value"] for row in found.metrics if row["metric"] == "sensitivity_max")
    from calig.pipeline.metrics.sensitivity import draw_noise

    model, batch = build(VISION[0]), batch_of()
    noise = draw_noise(3 * 16, 16, seed=0, sample_id=10).view(10, 3, 16, 16).double()
    target = torch.tensor([row["target"] for row in found.explanations])[:1]
    own = attribute(model, {"pixel_values": batch["pixel_values"][:1]}, "input_x_gradient", target=target).scores
    moved = [
        attribute(model, {"pixel_values": batch["pixel_values"][:1] + one}, "input_x_gradient", target=target).scores
        for one in noise
    ]
    assert value == pytest.approx(max(float((one - own).norm() / own.norm()) for one in moved), rel=1e-4)


def test_pictures_undo_what_the_processor_did():
    colours = torch.randint(0, 256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mean, std = (torch.tensor(PROCESSOR.__dict__[name]) for name in ("image_mean", "image_std"))
    values = ((colours / 255 - mean) / std).permute(0, 3, 1, 2)
    assert torch.equal(pictures(values, PROCESSOR), colours)
    own = SimpleNamespace(pictures=lambda given: torch.full((len(given), 16, 16, 3), 7, dtype=torch.uint8))
    assert (pictures(values, own) == 7).all()
    spread = pictures(values, None)
    assert spread.flatten(1).amin(1).tolist() == [0, 0] and spread.flatten(1).amax(1).tolist() == [255, 255]
    grey = pictures(torch.rand(1, 1, 4, 4), None)
    assert grey.shape == (1, 4, 4, 3) and torch.equal(grey[..., 0], grey[..., 2])


def opened(data):
    return Image.open(io.BytesIO(data))


def test_files_are_small_and_hold_image_and_mask():
    found = explained(VISION[0], {"random": {}}, operators=())
    names = ("10", "10-mask", "11", "11-mask", "12")
    assert sorted(found.files) == [f"images/{name}.png" for name in sorted(names, key="images/{}.png".format)]
    picture = opened(found.files["images/10.png"])
    wanted = pictures(batch_of()["pixel_values"], PROCESSOR)[0]
    assert picture.size == (16, 16) and picture.tobytes() == wanted.numpy().tobytes()
    mask = torch.frombuffer(bytearray(opened(found.files["images/10-mask.png"]).tobytes()), dtype=torch.uint8)
    assert torch.equal(mask.view(16, 16) > 0, batch_of()["object_mask"][0] > 0)
    without = explained(VISION[0], {"random": {}}, batch_of(masks=False), operators=())
    assert {row["mask_ref"] for row in without.explanations} == {None} and len(without.files) == 3
    from calig.pipeline.image_rows import picture_files

    large = opened(next(picture_files(torch.rand(1, 3, 300, 600), None)))
    assert large.size == (MAX_SIDE, MAX_SIDE // 2)


def test_shards_write_each_picture_once_and_a_resumed_run_mends_them(tmp_path):
    found = explained(VISION[0], operators=())
    write_shard(tmp_path, "part-00000-00000", found, {"methods": {}, "limits": {}})
    for row in read_rows(tmp_path / "explanations"):
        assert opened((tmp_path / row["image_ref"]).read_bytes()).size == (16, 16)
        assert row["mask_ref"] is None or (tmp_path / row["mask_ref"]).is_file()
        assert row["grid"] == [4, 4]
    listed = json.loads((tmp_path / "manifest" / "part-00000-00000.json").read_text())["files"]
    assert {"images/10.png", "images/11-mask.png"} < set(listed)
    # Another method of the same samples refers to the same pictures.
    before = (tmp_path / "images" / "10.png").stat().st_mtime_ns
    more = explained(VISION[0], {"raw_attention": {}}, operators=())
    write_shard(tmp_path, "part-00000-00001", more, {"methods": {}, "limits": {}})
    assert (tmp_path / "images" / "10.png").stat().st_mtime_ns == before
    # What a killed session left of a shard that does not count goes, what counts stays.
    (tmp_path / "images" / "99.png").write_bytes(b"half")
    (tmp_path / "images" / ".98.png.1.tmp").write_bytes(b"half")
    assert take_up(tmp_path).done == {10, 11, 12}
    assert len(list((tmp_path / "images").iterdir())) == 5
    (tmp_path / "images" / "11.png").unlink()
    standing = take_up(tmp_path)
    assert not standing.done and ["11.png is gone" in damage for damage in standing.damaged] == [True, True]
    assert not list((tmp_path / "images").iterdir())


def test_pictures_of_samples_that_failed_are_not_written(tmp_path):
    batch = batch_of()
    batch["pixel_values"][1] = float("nan")
    found = explained(VISION[0], {"input_x_gradient": {}}, batch, operators=("mean",))
    assert [row["sample_id"] for row in found.failures] == [11]
    write_shard(tmp_path, "part-00000-00000", found, {})
    assert not (tmp_path / "images" / "11.png").exists() and (tmp_path / "images" / "12.png").exists()


def test_positive_and_negative_auc_of_one_model_as_chefer_reads_them():
    found = explained(VISION[0], operators=("mean",), metrics=("positive_auc", "negative_auc"))
    summaries = summarise(found.metrics)
    for method in ("ca_lig", "input_x_gradient"):
        for metric in ("positive_auc", "negative_auc"):
            assert 5 <= summaries[method, "none", metric].mean <= 90
    curve = [row for row in found.metrics if row["metric"] == "positive_auc" and row["method"] == "ca_lig"]
    base = {row["sample_id"]: row["value"] for row in curve if row["q"] == 0.0}
    assert base == {10: 1.0, 11: 1.0, 12: 1.0}  # the prediction follows itself


def test_operators_are_checked_by_what_the_model_takes():
    with pytest.raises(InputError, match=r"operator on images 'blurr'.*'mean' is 'mask' and 'drop' is 'delete'"):
        explained(VISION[0], operators=("blurr",))
    beit = next(family for family in VISION if family.name == "beit")
    with pytest.raises(InputError, match="'delete' does not work on this model"):
        explained(beit, operators=("drop",))
    for name in ("mean", "blur"):
        with pytest.raises(InputError, match=f"operator on texts '{name}'.*mask, delete, attention"):
            Explainer(make_bert(), None, ExplainSettings({"random": {}}, operators=(name,)))
    text = Explainer(make_bert(), None, ExplainSettings({"random": {}}, operators=()))
    row = text.explain({**make_batch(), "sample_id": torch.arange(3)}).explanations[0]
    assert "grid" not in row and "image_ref" not in row


def test_lambda_is_calibrated_on_images():
    settings = CalibrationSettings(
        asked={"lam": "auto"},
        options={"steps": 4},
        objective="comprehensiveness",
        operator="drop",
        grid=[0.0, 0.5, 1.0],
    )
    calibrator = Calibrator(build(VISION[0]), PROCESSOR, settings)
    calibrator.add(batch_of())
    chosen = calibrator.choose()
    assert chosen.count == 3 and len(chosen.points) >= 3
