"""The data module of images: every source, labels, masks, corrupt files, loaders, augmentation, two processes."""

import csv
import io
import json
import pickle
import tarfile

import datasets
import pyarrow as pa
import pytest
import torch
from images import class_folders, encoded, image_columns, image_settings, noise
from PIL import Image
from pyarrow import parquet

from calig.datamodules.image import ImageDataModule
from calig.datamodules.image_processor import ImageProcessor, to_tensor
from calig.datamodules.sources import load_corpus
from calig.pipeline.errors import InputError

PROCESSOR = ImageProcessor.plain(8, [0.5] * 3, [0.25] * 3)


def module(processor=PROCESSOR, more=None, **overrides):
    data = ImageDataModule(image_settings(**overrides), processor, image_size=8, **(more or {}))
    data.setup()
    return data


def ids(loader):
    return [i for batch in loader for i in batch["sample_id"].tolist()]


@pytest.fixture
def folders(tmp_path):
    return class_folders(tmp_path / "pictures", {"cat": 6, "dog": 5}, splits=("train", "val", "test"))


@pytest.fixture
def data(folders):
    return module(path=folders)


# --------------------------------------------------------------------------------------------- batches and loaders


def test_batches_hold_what_models_take(data):
    assert data.splits == ["train", "val", "test"] and data.label_names == ["cat", "dog"] and data.tokenizer is None
    batch = next(iter(data.val_dataloader()))
    assert batch.keys() == {"pixel_values", "sample_id", "labels"}
    assert batch["pixel_values"].shape == (4, 3, 8, 8) and batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].dtype == batch["sample_id"].dtype == torch.int64
    assert ids(data.val_dataloader()) == list(range(11))
    picture = data.dataset("val")[2]["pixels"]
    assert torch.allclose(batch["pixel_values"][2], (picture.float() / 255 - 0.5) / 0.25, atol=1e-6)
    assert "train 11 · val 11 · test 11 · 2 classes (cat 55 %, dog 45 %) · 8 x 8 pixels" in data.describe()
    assert len(pickle.loads(pickle.dumps(data)).dataset("val")) == 11
    with pytest.raises(RuntimeError, match=r"ImageDataModule.setup\(\) has not run"):
        ImageDataModule(image_settings(path="x")).describe()


def test_without_a_processor_images_are_normalised_by_the_training_images(folders):
    data = module(None, path=folders)
    pixels = torch.stack([data.dataset("train")[row]["pixels"] for row in range(11)]).double() / 255
    assert data.processor.size == (8, 8)
    assert torch.allclose(torch.tensor(data.processor.mean).double(), pixels.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(torch.tensor(data.processor.std).double(), pixels.std((0, 2, 3), correction=0), atol=1e-4)
    one = module(None, path=folders, limit_train=2, on_corrupt="skip")
    assert one.processor.mean != data.processor.mean
    with pytest.raises(InputError, match="no training split to measure the mean colour on"):
        module(None, {"label_names": ["cat", "dog"]}, path=folders + "/test")


def test_images_of_one_colour_do_not_divide_by_zero(tmp_path):
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "train" / label / f"{i}.png").write_bytes(
                encoded(Image.new("RGB", (4, 4), (200, 10 + i // 2, ord(label))))
            )
    data = module(None, path=str(tmp_path), val_fraction=0.25, test_fraction=0.25)
    assert torch.isfinite(next(iter(data.val_dataloader()))["pixel_values"]).all()


def test_training_order_and_explained_subset(data):
    loader = data.train_dataloader()
    first = ids(loader)
    torch.manual_seed(7)
    assert ids(data.train_dataloader()) == first and sorted(first) == list(range(11)) != first
    chosen = ids(data.explain_dataloader("test", 5, 2, seed=3))
    assert chosen == sorted(chosen) and len(set(chosen)) == 5
    shares = [ids(data.explain_dataloader("test", 5, 2, 3, chosen[:1], rank, 2)) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == chosen[1:]


def test_augmented_images_depend_on_the_epoch_and_not_on_loader_processes(folders):
    def epoch(data, number):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        batches = list(loader)
        pixels = torch.cat([batch["pixel_values"] for batch in batches])
        return pixels[torch.cat([batch["sample_id"] for batch in batches]).argsort()]

    plain, changed = module(path=folders), module(path=folders, augment="crop_flip")
    first = epoch(changed, 0)
    assert torch.equal(first, epoch(changed, 0)) and not torch.equal(first, epoch(changed, 1))
    assert not torch.equal(first, epoch(plain, 0)) and torch.equal(epoch(plain, 0), epoch(plain, 1))
    assert torch.equal(first, epoch(module(path=folders, augment="crop_flip", num_workers=2), 0))
    assert torch.equal(
        next(iter(changed.val_dataloader()))["pixel_values"], next(iter(plain.val_dataloader()))["pixel_values"]
    )


def test_large_data_are_read_when_they_are_needed(folders, monkeypatch):
    kept = module(path=folders)
    monkeypatch.setattr("calig.datamodules.image.KEPT", 0)
    read = module(path=folders)
    assert read.dataset("train")._kept is None and kept.dataset("train")._kept is not None
    for one, other in zip(kept.val_dataloader(), read.val_dataloader(), strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
    read.dataset("val").examples[3].image.write_bytes(b"broken since")
    with pytest.raises(InputError, match=r"val/cat/3.png in .* cannot be read as an image"):
        list(read.val_dataloader())


# --------------------------------------------------------------------------------------------- sources


def test_archives_equal_folders(folders, tmp_path):
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}.tar.gz", "w:gz") as archive:
            archive.add(f"{folders}/{split}", split)
            info = tarfile.TarInfo(f"{split}.csv")
            info.size = 2
            archive.addfile(info, io.BytesIO(b"ab"))
    # The folder of archives holds the folder of pictures too, which is not looked at.
    packed, plain = module(path=str(tmp_path)), module(path=folders)
    for split in ("train", "test"):
        own = {example.place.partition(" in ")[0]: row for row, example in enumerate(plain.dataset(split).examples)}
        for row, example in enumerate(packed.dataset(split).examples):
            other = plain.dataset(split)[own[example.place.partition(" in ")[0]]]
            assert torch.equal(packed.dataset(split)[row]["pixels"], other["pixels"])
    assert "1 files of" in packed.describe() and "left out (train.csv)" in packed.describe()


def table(tmp_path, count=9):
    """A folder with pictures, and the rows (path, label, mask path, boxes) of a table beside it."""
    rows = []
    for i in range(count):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / f"{i}.png").write_bytes(encoded(noise(8, 8, seed=i)))
        mask = Image.new("L", (8, 8), 0)
        mask.paste(255, (2, 2, 4 + i % 3, 5))
        (tmp_path / "files" / f"mask{i}.png").write_bytes(encoded(mask))
        rows.append([f"files/{i}.png", "ab"[i % 2], f"files/mask{i}.png", json.dumps([2, 2, 4 + i % 3, 5])])
    return rows


def masks(data, split="train"):
    return {row["sample_id"]: data.dataset(split)[place]["mask"] for place, row in enumerate(data.dataset(split).rows)}


def expected_mask(i):
    found = torch.zeros(8, 8, dtype=torch.uint8)
    found[2:5, 2 : 4 + i % 3] = 1
    return found


@pytest.mark.parametrize("role", ["mask", "boxes"])
def test_csv_of_paths_with_masks_or_boxes(tmp_path, role):
    with (tmp_path / "all.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file_path", "label", "outline", "where"], *table(tmp_path)])
    named = {"mask": "outline"} if role == "mask" else {"boxes": "where"}
    data = module(path=str(tmp_path / "all.csv"), columns=image_columns(**named))
    assert torch.equal(
        data.dataset("train")[0]["pixels"], to_tensor(noise(8, 8, seed=data.dataset("train").rows[0]["sample_id"]))
    )
    for split in data.splits:
        for i, mask in masks(data, split).items():
            assert torch.equal(mask, expected_mask(i))
    batch = next(iter(data.test_dataloader()))
    assert batch["object_mask"].shape == batch["pixel_values"][:, 0].shape and batch["object_mask"].dtype == torch.int64
    assert "9 images with mask" in data.describe()


def test_parquet_of_bytes_with_masks_as_arrays(tmp_path):
    rows = table(tmp_path)
    data = [(tmp_path / row[0]).read_bytes() for row in rows]
    arrays = [None if i == 0 else expected_mask(i).tolist() for i in range(9)]
    parquet.write_table(
        pa.table({"image": data, "label": [r[1] for r in rows], "mask": arrays}), tmp_path / "train.parquet"
    )
    loaded = module(path=str(tmp_path / "train.parquet"), val_fraction=0.2, test_fraction=0)
    for i, mask in (masks(loaded) | masks(loaded, "val")).items():
        assert (i == 0) == (mask is None) and (mask is None or torch.equal(mask, expected_mask(i)))
    batch = loaded.collator([loaded.dataset("train")[row] for row in range(len(loaded.dataset("train")))])
    unknown = batch["sample_id"] == 0
    assert unknown.any() and (batch["object_mask"][unknown] == -1).all() and (batch["object_mask"][~unknown] >= 0).all()


def test_a_column_called_mask_that_holds_none_is_left_alone(tmp_path):
    lines = [json.dumps({"image": row[0], "label": row[1], "mask": "surgical"}) for row in table(tmp_path)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert all(mask is None for mask in masks(module(path=str(tmp_path / "a.jsonl"))).values())
    with pytest.raises(InputError, match="the mask of row 1 of .* cannot be read as an image"):
        module(path=str(tmp_path / "a.jsonl"), columns=image_columns(mask="mask"))


def test_data_sets_of_the_hub_library(tmp_path):
    rows = table(tmp_path)
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "label": datasets.ClassLabel(names=["a", "b"]),
            "mask": datasets.Image(),
            "boxes": datasets.Sequence(datasets.Sequence(datasets.Value("float32"))),
        }
    )
    content = {
        "picture": [str(tmp_path / row[0]) if i % 2 else noise(8, 8, seed=i) for i, row in enumerate(rows)],
        "label": [row[1] for row in rows],
        "mask": [None if i == 3 else str(tmp_path / row[2]) for i, row in enumerate(rows)],
        "boxes": [[json.loads(row[3])] for row in rows],
    }
    made = datasets.Dataset.from_dict(content, features=features)
    made.save_to_disk(tmp_path / "saved")
    data = module(path=str(tmp_path / "saved"))
    assert data.label_names == ["a", "b"]
    found = {}
    for split in data.splits:
        found |= masks(data, split)
        for place, row in enumerate(data.dataset(split).rows):
            assert torch.equal(data.dataset(split)[place]["pixels"], to_tensor(noise(8, 8, seed=row["sample_id"])))
    assert found[3] is None and all(torch.equal(found[i], expected_mask(i)) for i in range(9) if i != 3)
    boxed = module(path=str(tmp_path / "saved"), columns=image_columns(boxes="boxes"))
    assert all(torch.equal(mask, expected_mask(i)) for i, mask in masks(boxed).items())


def test_coco_annotations_by_file_name(folders, tmp_path):
    content = {
        "images": [{"id": 0, "file_name": "cat/0.png"}],
        "annotations": [{"image_id": 0, "bbox": [0, 0, 6, 10]}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    data = module(path=folders, annotations=str(tmp_path / "coco.json"))
    mask = data.dataset("train")[0]["mask"]
    assert mask[:, :4].all() and not mask[:, 4:].any()  # half of a picture of 12 pixels
    assert all(data.dataset("train")[row]["mask"] is None for row in range(1, 11))
    (tmp_path / "coco.json").write_text(json.dumps(content | {"images": [{"id": 0, "file_name": "other.png"}]}))
    with pytest.raises(InputError, match=r"knows none of the 11 images of .*such as train/cat/0.png.*are other.png"):
        module(path=folders, annotations=str(tmp_path / "coco.json"))


def test_images_to_be_explained_only(folders):
    data = module(more={"label_names": ["dog", "cat"], "require_labels": False}, path=folders + "/test")
    assert data.splits == ["test"] and data.has_labels("test")
    assert [row["labels"] for row in data.dataset("test").rows] == [1] * 6 + [0] * 5
    assert data.column("test", "label", "here") == ["cat"] * 6 + ["dog"] * 5


# --------------------------------------------------------------------------------------------- what is refused


def test_corrupt_images_raise_or_are_left_out_and_counted(folders, tmp_path):
    (tmp_path / "pictures/train/cat/2.png").write_bytes(b"no image")
    (tmp_path / "pictures/train/dog/0.png").write_bytes(encoded(noise())[:60])
    with pytest.raises(InputError, match=r"train/cat/2.png in .*pictures cannot be read as an image"):
        module(path=folders)
    data = module(path=folders, on_corrupt="skip")
    assert [row["sample_id"] for row in data.dataset("train").rows] == [0, 1, 3, 4, 5, 7, 8, 9, 10]
    assert "train 9" in data.describe() and "2 unreadable images left out (train/cat/2.png in" in data.describe()
    for file in (tmp_path / "pictures/test").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(InputError, match="no image of the test split can be read"):
        module(path=folders, on_corrupt="skip")


def test_sources_that_hold_no_labelled_images(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no train, val or test file.*Found: no files"):
        module(path=str(tmp_path / "empty"))
    (tmp_path / "bare" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no train, val or test file"):
        module(path=str(tmp_path / "bare"))
    one = class_folders(tmp_path / "one", {"cat": 4})
    with pytest.raises(InputError, match=r"a classifier needs two classes; the labels hold only cat"):
        module(path=one)
    (tmp_path / "texts" / "train" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "train" / "a" / "1.txt").write_text("text")
    with pytest.raises(InputError, match=r"holds no class folders of images.*Found: train/a/1.txt"):
        module(path=str(tmp_path / "texts"))
    with pytest.raises(InputError, match=r"holds images \(train/cat/0.png\).*data.modality=image"):
        load_corpus(image_settings(path=one), 0)


def test_columns_that_hold_no_images(tmp_path):
    rows = table(tmp_path)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"image": 5, "label": row[1]}) for row in rows))
    with pytest.raises(InputError, match=r"row 1 of .*a.jsonl: column 'image' holds '5' of type int"):
        module(path=str(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"image": None, "label": row[1]}) for row in rows))
    with pytest.raises(InputError, match=r"row 1 of .*b.jsonl: the image is missing"):
        module(path=str(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"photo": row[0], "label": row[1]}) for row in rows))
    with pytest.raises(InputError, match=r"no image column of a known name.*data.columns.image; columns: photo, label"):
        module(path=str(tmp_path / "c.jsonl"))
    with pytest.raises(InputError, match=r"unknown column 'fotos'.*Did you mean 'photo'.*data.columns.image"):
        module(path=str(tmp_path / "c.jsonl"), columns=image_columns(image="fotos"))
    found = module(path=str(tmp_path / "c.jsonl"), columns=image_columns(image="photo"))
    assert len(found.dataset("train")) == 4
    (tmp_path / "files" / "4.png").unlink()
    with pytest.raises(InputError, match=r"row 5 of .*c.jsonl cannot be read as an image: .*No such file"):
        module(path=str(tmp_path / "c.jsonl"), columns=image_columns(image="photo"))


# --------------------------------------------------------------------------------------------- resuming


def test_a_resumed_training_meets_the_same_augmented_images(folders):
    def batches(data, epoch):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [batch["pixel_values"] for batch in loader]

    whole = batches(module(path=folders, augment="crop_flip"), 1)
    resumed = module(path=folders, augment="crop_flip")
    place = {"data.batch_size": 4, "processes": 1, "training rows": 11}
    resumed.load_state_dict({"epoch": 1, "batches": 1} | place)
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], batches(resumed, 1), strict=True))
    with pytest.raises(InputError, match=r"data.batch_size=8 \(now 4\)"):
        resumed.load_state_dict({"epoch": 1, "batches": 1} | place | {"data.batch_size": 8})
