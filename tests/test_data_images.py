"""Picture files of every kind to pixels, the processor against transformers, masks against plain loops."""

import json
import struct
import zlib

import pytest
import torch
from images import encoded, noise
from PIL import Image
from transformers import AutoImageProcessor

from calig.datamodules.image_augment import augment
from calig.datamodules.image_masks import Regions, draw_mask, parse_boxes, read_annotations
from calig.datamodules.image_pixels import CorruptImage, picture
from calig.datamodules.image_processor import ImageProcessor, to_picture, to_tensor
from calig.pipeline.errors import InputError


def values(image):
    return to_tensor(image).permute(1, 2, 0).tolist()


# --------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(kind):
    image = noise()
    options = {"lossless": True} if kind == "WEBP" else {}
    assert values(picture(encoded(image, kind, **options), "x")) == values(image)


def test_grey_palette_and_two_tone():
    grey = noise().convert("L")
    assert values(picture(encoded(grey), "x")) == values(grey.convert("RGB"))
    palette = noise().quantize(7)
    assert values(picture(encoded(palette), "x")) == values(palette.convert("RGB"))
    tones = grey.convert("1")
    assert {tuple(pixel) for row in values(picture(encoded(tones), "x")) for pixel in row} == {(0,) * 3, (255,) * 3}


def test_transparency_shows_white():
    image = Image.new("RGBA", (3, 1))
    for place, pixel in enumerate([(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 51)]):
        image.putpixel((place, 0), pixel)
    found = values(picture(encoded(image), "x"))[0]
    assert found[:2] == [[10, 20, 30], [255] * 3] and all(abs(value - 204) <= 1 for value in found[2])
    shaded = Image.new("LA", (1, 1), (0, 128))
    assert all(abs(value - 127) <= 1 for value in values(picture(encoded(shaded), "x"))[0][0])
    indexed = Image.new("P", (2, 1), 0)
    indexed.putpalette([200, 0, 0, 0, 0, 200])
    indexed.putpixel((1, 0), 1)
    assert values(picture(encoded(indexed, transparency=0), "x")) == [[[255] * 3, [0, 0, 200]]]


def test_sixteen_bits_keep_their_range():
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    levels = [0, 257, 32896, 65535]
    rows = b"\0" + struct.pack(">4H", *levels)
    header = struct.pack(">IIBBBBB", 4, 1, 16, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert [pixel[0] for pixel in values(picture(png, "x"))[0]] == [0, 1, 128, 255]
    floats = Image.new("F", (2, 1), 0.5)
    floats.putpixel((1, 0), 1.0)
    assert [pixel[0] for pixel in values(picture(encoded(floats, "TIFF"), "x"))[0]] == [128, 255]


def test_the_orientation_of_a_camera_is_applied():
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    turned = picture(encoded(image, "PNG", exif=exif), "x")
    assert turned.size == (2, 4) and turned.getpixel((1, 0)) == (255, 255, 255)


def test_tiny_and_huge_pictures():
    assert picture(encoded(Image.new("RGB", (1, 1))), "x").size == (1, 1)
    processor = ImageProcessor.plain(8, [0.5] * 3, [0.5] * 3)
    for size in ((1, 1), (1, 300), (6000, 4000)):
        assert processor.pixels(picture(encoded(Image.new("RGB", size, "red")), "x")).shape == (3, 8, 8)
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    with pytest.raises(CorruptImage, match=r"poster.png cannot be read.*decompression bomb"):
        picture(bomb, "poster.png")


def test_what_is_no_picture_is_named(tmp_path):
    jpeg = encoded(noise(200, 200), "JPEG")
    for data in (b"", b"no image", jpeg[: len(jpeg) // 2]):
        with pytest.raises(CorruptImage, match=r"a/1.jpg in x.tar cannot be read as an image.*data.on_corrupt=skip"):
            picture(data, "a/1.jpg in x.tar")
    with pytest.raises(CorruptImage, match="No such file"):
        picture(tmp_path / "none.png", "row 3 of x.csv")


# --------------------------------------------------------------------------------------------- the processor

SETTINGS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": 14, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    "mae": {"feature_extractor_type": "ViTFeatureExtractor", "size": 9, "image_mean": [0.1, 0.2, 0.3]},
    "deit": {"image_processor_type": "DeiTImageProcessor", "size": 16, "crop_size": 12, "do_center_crop": True},
    "beit": {"image_processor_type": "BeitImageProcessor", "size": 11, "do_center_crop": False, "resample": 2},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 13},
        "crop_size": {"height": 8, "width": 10},
        "do_center_crop": True,
        "do_resize": True,
        "resample": 3,
    },
    "large_crop": {"image_processor_type": "DeiTImageProcessor", "size": 8, "crop_size": 11, "do_center_crop": True},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("size", [(12, 10), (9, 31), (40, 40)])
def test_pixels_equal_those_of_transformers(tmp_path, name, size):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True, **SETTINGS[name]}))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    image = noise(*size)
    ours = ImageProcessor.from_pretrained(str(tmp_path))
    found = ours.normalise(ours.pixels(image)[None])
    wanted = torch.as_tensor(theirs(image, return_tensors="pt")["pixel_values"])
    assert found.shape == wanted.shape == (1, 3, *ours.size)
    assert torch.allclose(found, wanted, atol=1e-5)
    # Saved and read by transformers, it is the same again.
    ours.save_pretrained(tmp_path)
    assert ImageProcessor.from_pretrained(str(tmp_path)) == ours
    again = torch.as_tensor(AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"])
    assert torch.allclose(again, wanted, atol=1e-6)
    # Back to a picture: to a level of 255 where nothing was cut.
    shown = ours.pictures(found).permute(0, 3, 1, 2)
    assert (shown.int() - ours.pixels(image)[None].int()).abs().max() <= 1


def test_processors_that_cannot_be_had(tmp_path):
    with pytest.raises(InputError, match="holds no image processor"):
        ImageProcessor.from_pretrained(str(tmp_path))
    base = ImageProcessor.plain(8, [0.5] * 3, [0.5] * 3).settings
    for change, message in (
        ({"do_pad": True}, "asks for do_pad"),
        ({"size": {"shortest_edge": 8}}, "gives images no fixed size"),
        ({"do_resize": False}, "leaves images at the sizes"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "normalises 1 channels"),
    ):
        with pytest.raises(InputError, match=message):
            ImageProcessor.from_settings(base | change, "folder")


# --------------------------------------------------------------------------------------------- masks


def inside(size, *boxes):
    width, height = size
    return [
        [any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in boxes) for x in range(width)] for y in range(height)
    ]


def drawn(mask):
    return (to_tensor(mask)[0] > 0).tolist()


def test_boxes_cover_whole_pixels():
    size = (9, 7)
    assert drawn(Regions(boxes=[(1, 2, 4, 5), (6, 0, 9, 1)]).draw(size, "x")) == inside(
        size, (1, 2, 4, 5), (6, 0, 9, 1)
    )
    assert drawn(Regions(boxes=[(1.4, 2.2, 3.1, 2.4)]).draw(size, "x")) == inside(size, (1, 2, 4, 3))
    with pytest.raises(InputError, match="row 1 of x: its boxes or polygons lie outside of the image of 9 x 7"):
        Regions(boxes=[(20, 20, 30, 30)]).draw(size, "row 1 of x")


def test_boxes_as_columns_hold_them():
    for value in ([1, 2, 3, 4], [[1, 2, 3, 4]], "[1, 2, 3, 4]", "[[1, 2, 3, 4]]"):
        assert parse_boxes(value, "row 1", "boxes") == Regions(boxes=[(1.0, 2.0, 3.0, 4.0)])
    assert (
        parse_boxes(None, "row 1", "boxes") is parse_boxes("", "row 1", "boxes") is parse_boxes([], "row", "b") is None
    )
    for value in ([1, 2, 3], [3, 2, 1, 4], "here", [[1, 2, 3, "x"]], 5):
        with pytest.raises(InputError, match="row 1: column 'boxes' holds .* no boxes"):
            parse_boxes(value, "row 1", "boxes")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I", "F"])
def test_masks_of_every_mode(mode):
    rows = inside((5, 4), (1, 1, 3, 4))
    image = Image.new(mode, (5, 4), 0)
    for y, row in enumerate(rows):
        for x, there in enumerate(row):
            if there:
                image.putpixel((x, y), (0, 0, 1) if mode == "RGB" else 1)
    assert drawn(draw_mask(encoded(image, "TIFF"), (5, 4), "x")) == rows
    assert drawn(draw_mask([[int(there) for there in row] for row in rows], (5, 4), "x")) == rows
    with pytest.raises(InputError, match="the mask of a.png has 5 x 4 pixels, the image 9 x 9"):
        draw_mask(encoded(image, "TIFF"), (9, 9), "a.png")
    with pytest.raises(InputError, match="no rectangle of numbers"):
        draw_mask([[0, 1], [1]], (2, 2), "a.png")


def test_a_mask_stands_in_the_frame_of_its_picture():
    """Where the object is white on black, the mask of the frame is where the frame is white."""
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (24, 4, 32, 12))
    mask = Regions(boxes=[(24, 4, 32, 12)]).draw(image.size, "x")
    base = ImageProcessor.plain(8, [0.0] * 3, [1.0] * 3).settings
    for change in (
        {"size": {"height": 20, "width": 40}},
        {"size": {"height": 10, "width": 20}, "do_center_crop": True, "crop_size": {"height": 6, "width": 16}},
        {"size": {"shortest_edge": 5}, "do_center_crop": True, "crop_size": {"height": 5, "width": 9}},
    ):
        processor = ImageProcessor.from_settings(base | change, "x")
        white = processor.pixels(image).float().mean(0) > 127
        found = processor.mask(mask)
        assert found.sum() > 0 and (found.bool() != white).sum() <= 4  # edges of blurred pixels


def test_coco_files(tmp_path):
    width, height = 6, 5
    box, runs = inside((width, height), (1, 1, 4, 3)), inside((width, height), (0, 2, 2, 5))
    flat = [int(runs[y][x]) for x in range(width) for y in range(height)]  # down the columns
    counts, value, length = [], 0, 0
    for bit in flat:
        if bit != value:
            counts.append(length)
            value, length = bit, 0
        length += 1
    counts.append(length)
    content = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(("a.png", "cat/b.png", "c.png", "d.png"))],
        "categories": [{"id": 7, "name": "cat"}, {"id": 8, "name": "mat"}],
        "annotations": [
            {"image_id": 0, "category_id": 7, "bbox": [1, 1, 3, 2]},
            {"image_id": 0, "category_id": 8, "bbox": [5, 4, 1, 1]},
            {"image_id": 1, "category_id": 7, "segmentation": {"size": [height, width], "counts": counts}},
            {"image_id": 2, "category_id": 7, "segmentation": [[1, 1, 3, 1, 3, 2, 1, 2]]},
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    found = read_annotations(str(path))

    def mask(name, label="cat"):
        return drawn(found.of(name, label).draw((width, height), name))

    assert mask("train/cat/a.png") == box
    assert mask("a.png", "dog") == inside((width, height), (1, 1, 4, 3), (5, 4, 6, 5))  # no category: all of it
    assert mask("train/cat/b.png") == runs and mask("c.png") == inside((width, height), (1, 1, 4, 3))
    assert found.of("d.png", "cat") is found.of("e.png", "cat") is found.of("b.png", "cat") is None
    # The same runs as pycocotools would write them.
    content["annotations"][2]["segmentation"]["counts"] = compressed(counts)
    path.write_text(json.dumps(content))
    found = read_annotations(str(path))
    assert mask("train/cat/b.png") == runs
    with pytest.raises(InputError, match="of 6 x 5 pixels, the image of 5 x 6"):
        found.of("cat/b.png", "cat").draw((5, 6), "x")
    for text in ("{", "[]", '{"images": []}'):
        path.write_text(text)
        with pytest.raises(InputError, match="cannot be read as a COCO file"):
            read_annotations(str(path))


def compressed(counts):
    """The encoder of pycocotools (rleToString), in Python."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        while True:
            code = value & 31
            value >>= 5
            more = value != (-1 if code & 16 else 0)
            text += chr((code | 32 if more else code) + 48)
            if not more:
                break
    return text


# --------------------------------------------------------------------------------------------- augmentation


def test_augmentation_is_a_function_of_seed_epoch_and_row():
    pixels = torch.arange(3 * 16 * 16, dtype=torch.uint8).view(3, 16, 16)
    mask = (pixels[0] > 100).byte()
    state = torch.get_rng_state()
    first = augment(pixels, mask, "crop_flip", 1, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, augment(pixels, mask, "crop_flip", 1, 2, 3), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    many = [augment(pixels, mask, "crop_flip", 0, epoch, 0)[0] for epoch in range(40)]
    assert len({bytes(one.flatten().tolist()) for one in many}) > 20
    flips = [augment(pixels, None, "flip", 0, 0, row)[0] for row in range(200)]
    flipped = sum(torch.equal(one, pixels.flip(2)) for one in flips)
    assert 70 < flipped < 130 and flipped + sum(torch.equal(one, pixels) for one in flips) == 200
    assert torch.equal(augment(pixels, None, "none", 0, 0, 0)[0], pixels)


def test_a_mask_moves_with_its_picture():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 24, 16), dtype=torch.uint8, generator=generator)
    for row in range(20):
        moved, mask = augment(pixels, (pixels[1] > 99).byte(), "crop_flip", 0, 0, row)
        assert moved.shape == pixels.shape and torch.equal(mask, (moved[1] > 99).byte())


def test_pictures_and_tensors():
    pixels = to_tensor(noise())
    assert torch.equal(to_tensor(to_picture(pixels)), pixels)
