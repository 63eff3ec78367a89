"""Generated scenes: seeded, masks exact, places uniform, and nothing but the deciding object tells the class."""

from collections import Counter

import pytest
import torch
from images import image_settings
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from calig.datamodules.image import ImageDataModule
from calig.datamodules.image_processor import to_tensor
from calig.datamodules.scenes import _SIZES, LABELS, SIZE, generate
from calig.pipeline.errors import InputError


@pytest.fixture(scope="module")
def scenes():
    return generate({"train": 2000, "test": 1000}, seed=5)


def pixels(scenes):
    return torch.stack([to_tensor(scene.picture) for scene in scenes]).float() / 255


def labels(scenes):
    return torch.tensor([scene.label for scene in scenes])


def masks(scenes):
    return torch.stack([to_tensor(scene.mask)[0] > 0 for scene in scenes])


def test_scenes_are_seeded_and_leave_the_generator_alone(scenes):
    state = torch.get_rng_state()
    small = generate({"train": 20, "val": 10}, seed=3)
    again = generate({"train": 20, "val": 10}, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pixels(small["train"]), pixels(again["train"]))
    assert not torch.equal(pixels(generate({"train": 20}, seed=4)["train"]), pixels(small["train"]))
    assert len({scene.picture.tobytes() for split in small.values() for scene in split}) == 30
    assert Counter(labels(scenes["test"]).tolist()) == dict.fromkeys(range(4), 250)


def test_sizes_that_make_no_sense():
    for size in (-1, 2.5, True):
        with pytest.raises(InputError, match="size of split 'train' is"):
            generate({"train": size})
    with pytest.raises(InputError, match="1000000 at most"):
        generate({"train": 900_000, "test": 200_000})


def test_the_mask_is_the_object_and_the_rest_says_nothing(scenes):
    """Of one place and size, the masks of a class are one shape; under it all pixels have left the background."""
    shapes = {}
    for scene, mask in zip(scenes["train"], masks(scenes["train"]), strict=True):
        (top, left), side = scene.place, scene.side
        inside = mask[top : top + side, left : left + side]
        assert inside.sum() == mask.sum() > 20 and inside[0].any() and inside[:, 0].any()
        assert torch.equal(shapes.setdefault((scene.label, side), inside), inside)
    assert len(shapes) == len(LABELS) * len(_SIZES)
    images, marked = pixels(scenes["train"]), masks(scenes["train"])
    around = torch.nn.functional.max_pool2d(marked.float()[:, None], 3, 1, 1)[:, 0].bool() & ~marked
    brightness = images.mean(1)
    on = (brightness * marked).sum((1, 2)) / marked.sum((1, 2))
    off = (brightness * around).sum((1, 2)) / around.sum((1, 2))
    assert ((on - off).abs() > 0.1).float().mean() > 0.98


def test_places_are_uniform(scenes):
    """By chi-squared over a grid of places, for every side of an object."""
    stats = pytest.importorskip("scipy.stats")
    everything = [*scenes["train"], *scenes["test"]]
    for side in _SIZES:
        places = [scene.place for scene in everything if scene.side == side]
        room = SIZE - side + 1
        cells = Counter((row * 4 // room, column * 4 // room) for row, column in places)
        sizes = Counter(place * 4 // room for place in range(room))
        expected = [len(places) * sizes[row] * sizes[column] / room**2 for row in range(4) for column in range(4)]
        found = [cells[row, column] for row in range(4) for column in range(4)]
        assert stats.chisquare(found, expected).pvalue > 1e-3


def views(scenes):
    images = pixels(scenes)
    middle = images[:, :, 12:20, 12:20]
    return {
        "centre": middle.flatten(1),
        "mean colour": images.mean((2, 3)),
        "colour statistics": torch.cat([images.mean((2, 3)), images.amax((2, 3)), images.amin((2, 3))], 1),
        "border": torch.cat([images[:, :, :4].flatten(1), images[:, :, -4:].flatten(1)], 1),
        "all pixels": images[:, :, ::2, ::2].flatten(1),
    }


@pytest.mark.parametrize("model", [LogisticRegression(C=0.01, max_iter=200), NearestCentroid()], ids=["linear", "mean"])
def test_neither_centre_nor_colour_tells_the_class(scenes, model):
    chance, spread = 1 / len(LABELS), (0.25 * 0.75 / 1000) ** 0.5
    wanted, truth = labels(scenes["train"]).numpy(), labels(scenes["test"]).numpy()
    train, test = views(scenes["train"]), views(scenes["test"])
    for name in train:
        score = model.fit(train[name].numpy(), wanted).score(test[name].numpy(), truth)
        assert score < chance + 4 * spread, (name, score)


def test_as_data(scenes):
    data = ImageDataModule(image_settings(name="scenes", batch_size=20), image_size=SIZE, seed=5)
    data.setup()
    assert data.label_names == list(LABELS) and {s: len(data.dataset(s)) for s in data.splits} == {
        "train": 60,
        "val": 20,
        "test": 20,
    }
    batch = next(iter(data.test_dataloader()))
    assert batch["object_mask"].shape == (20, SIZE, SIZE) and set(batch["object_mask"].unique().tolist()) == {0, 1}
    shown = data.processor.pictures(batch["pixel_values"])
    own = generate({"train": 60, "val": 20, "test": 20}, seed=5)["test"]
    assert torch.equal(shown[3], to_tensor(own[3].picture).permute(1, 2, 0))
    assert torch.equal(batch["object_mask"][3].bool(), masks(own)[3])
    assert isinstance(own[0].picture, Image.Image)
    with pytest.raises(InputError, match=r"unknown column 'colour'.*data.name=scenes has no columns"):
        data.column("test", "colour", "here")
    other = ImageDataModule(image_settings(name="scenes"), data.processor, label_names=["a", "b"])
    with pytest.raises(InputError, match="data.name=scenes has the classes cross, ring, saltire, bars"):
        other.setup()
    names = ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
    given = ImageDataModule(image_settings(name="scenes"), data.processor, seed=5, label_names=names)
    given.setup()
    assert [row["labels"] for row in given.dataset("test").rows] == labels(own).tolist()
