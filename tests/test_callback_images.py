"""AttributionCallback on images: scalars, files, pictures, tables with masks, and weights that do not notice."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from distributed_worker import make_trainer
from families import VISION, build
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch.utils.data import DataLoader
from wandb_records import read_offline_run

from calig.callbacks import AttributionCallback
from calig.callbacks.image_media import Masked
from calig.callbacks.media import MediaLog
from calig.pipeline.errors import InputError
from calig.pipeline.records import EXPLANATION_SCHEMA


class Images(torch.utils.data.Dataset):
    def __init__(self, count, masked=True):
        generator = torch.Generator().manual_seed(count)
        self.rows = []
        for i in range(count):
            row = {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": torch.tensor(i % 3)}
            if masked:
                row["object_mask"] = torch.zeros(16, 16, dtype=torch.long)
                row["object_mask"][2:8, 4 : 9 + i] = 1
            self.rows.append(row)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Vision(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = build(VISION[0]).float()

    def training_step(self, batch, _):
        return self.net(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss

    def validation_step(self, batch, _):
        self.log("val/loss", self.training_step(batch, 0))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def train(folder, callbacks, masked=True, **arguments):
    seed_everything(0, verbose=False)
    module = Vision()
    trainer = make_trainer(1, folder, callbacks, max_epochs=2, **arguments)
    trainer.fit(module, DataLoader(Images(8), 4, shuffle=True), DataLoader(Images(5, masked), 4))
    return module, trainer


def test_scalars_files_and_bit_identical_weights(tmp_path):
    plain, _ = train(tmp_path, [])
    callback = AttributionCallback(num_samples=4, steps=4, folder=tmp_path / "probe", label_names=["a", "b", "c"])
    watched, trainer = train(tmp_path, [callback])
    for (name, a), b in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    metrics = trainer.callback_metrics
    for key in ("ca_lig/mask_auprc", "ca_lig/reversed/pointing_game", "random/mask_iou", "centre/mask_auprc"):
        assert 0 <= metrics[f"val/explain/{key}"] <= 1
    assert "val/explain/ca_lig/comprehensiveness" in metrics and "val/explain/ca_lig/drift" in metrics
    files = sorted((tmp_path / "probe").glob("epoch-*.parquet"))
    assert len(files) == 2
    for file in files:
        table = pq.read_table(file)
        assert table.schema.names == EXPLANATION_SCHEMA.names
        for row in table.to_pylist():
            assert row["grid"] == [4, 4] and row["tokens"][1] == "r1c1"
            assert Image.open(tmp_path / "probe" / row["image_ref"]).size == (16, 16)
            assert (tmp_path / "probe" / row["mask_ref"]).is_file()
    assert len(list((tmp_path / "probe" / "images").iterdir())) == 8


def test_wandb_gets_overlays_strips_and_masks(tmp_path):
    logger = WandbLogger(project="calig", save_dir=tmp_path, offline=True)
    callback = AttributionCallback(num_samples=3, steps=4, label_names=["a", "b", "<c>"])
    train(tmp_path, [callback], logger=logger)
    import wandb

    wandb.finish()
    run = read_offline_run(tmp_path)
    files = next((tmp_path / "wandb").glob("offline-run-*")) / "files"
    prefix = "val/explain/ca_lig"
    # The history holds plain cells; the artifact of a table, all of them with their media.
    name = f"{prefix}/samples.table.json"
    tables = [media for kind, media in run.artifacts if kind == "run_table" and name in media]
    assert len(tables) == 2
    content = json.loads(Path(tables[-1][name]).read_text())
    columns = content["columns"]
    assert columns[:5] == ["epoch", "sample_id", "input", "overlay", "label"] and columns[-1] == "layers"
    assert {"mask_auprc", "pointing_game", "comprehensiveness"} <= set(columns) and len(content["data"]) == 3
    for line in content["data"]:
        shown = dict(zip(columns, line, strict=True))
        assert shown["label"] in ("a", "b", "<c>") and 0 <= shown["mask_auprc"] <= 1
        assert set(shown["input"]["masks"]) == {"object"}
        sizes = {key: Image.open(tables[-1][shown[key]["path"]]).size for key in ("input", "overlay", "layers")}
        assert sizes["input"] == (16, 16) and sizes["overlay"] == (240, 240) and sizes["layers"][0] > sizes["layers"][1]
        mask = Image.open(tables[-1][shown["input"]["masks"]["object"]["path"]])
        assert mask.size == (16, 16) and mask.convert("L").getextrema() == (0, 1)
    for key in ("overlay", "layers", "layer_profile_image"):
        path = next(row[f"{prefix}/{key}/path"] for row in run.history if f"{prefix}/{key}/path" in row)
        assert Image.open(files / path).width > 100
    assert f"{prefix}/perturbation_removed" in run.charts


class Board:
    def __init__(self):
        self.images, self.texts = {}, {}
        self.experiment = self

    def add_image(self, key, pixels, step, dataformats):
        self.images[key] = pixels

    def add_text(self, key, text, step):
        self.texts[key] = text


class TensorBoardLogger(Board):
    pass


def test_tensorboard_gets_the_same_pictures(tmp_path):
    callback = AttributionCallback(num_samples=2, steps=4)
    board = TensorBoardLogger()
    seen = {}

    class Watch(AttributionCallback):
        def on_validation_end(self, trainer, pl_module):
            self._media = MediaLog([board])
            seen["rows"] = self._shown
            super().on_validation_end(trainer, pl_module)

    train(tmp_path, [Watch(num_samples=2, steps=4)], masked=False)
    assert set(board.images) >= {f"val/explain/ca_lig/{key}" for key in ("overlay", "layers", "perturbation_removed")}
    assert not board.texts and seen["rows"][0]["picture"].startswith(b"\x89PNG") and seen["rows"][0]["mask"] is None
    assert callback.operator is None


def test_a_batch_of_another_kind_is_refused_by_name():
    from calig.callbacks.probe import model_inputs

    pixels = torch.zeros(2, 3, 16, 16)
    kept = model_inputs(
        {"pixel_values": pixels, "label": torch.tensor([0, 1]), "object_mask": torch.ones(2, 4, 4).bool()}, [4, 7]
    )
    assert kept["sample_id"].tolist() == [4, 7] and kept["object_mask"].shape == (2, 4, 4)
    assert "object_mask" not in model_inputs({"pixel_values": pixels, "object_mask": torch.ones(3, 4, 4)}, [4, 7])
    with pytest.raises(InputError, match=r"a mapping with images.*`pixel_values` \(batch, channels, height, width\)"):
        model_inputs({"images": pixels}, [0, 1])


def test_a_masked_cell_holds_zeros_and_ones():
    from calig.callbacks.media import _wandb_mask

    mask = Image.new("L", (3, 2))
    mask.putpixel((2, 1), 255)
    cell = Masked(Image.new("RGB", (3, 2)), mask)
    assert _wandb_mask(cell.mask)["mask_data"].tolist() == [[0, 0, 0], [0, 0, 1]]
