"""`calig explain` and `explain()` on images: the model sees what its processor makes, and slips have names."""

import pytest
import torch
from families import VISION, build
from PIL import Image
from test_render_images import scene
from transformers import ViTImageProcessorPil

from calig.datamodules.image_processor import ImageProcessor
from calig.pipeline import Explanation, explain, load_explanations
from calig.pipeline.attribution import attribute
from calig.pipeline.cli import main
from calig.pipeline.errors import InputError

PROCESSOR = ImageProcessor.plain(16, [0.5] * 3, [0.25] * 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "vit"
    model = build(VISION[0]).float()
    model.config.id2label = {0: "cat", 1: "dog", 2: "cow"}
    model.save_pretrained(path)
    PROCESSOR.save_pretrained(path)
    return path


@pytest.fixture
def files(tmp_path):
    picture, _ = scene()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a scene.png").write_bytes(picture)
    Image.open(tmp_path / "pictures" / "a scene.png").convert("L").save(tmp_path / "pictures" / "grey.JPG", "JPEG")
    Image.new("RGBA", (3, 500), (10, 200, 30, 120)).save(tmp_path / "pictures" / "thin.webp")
    (tmp_path / "pictures" / "notes.txt").write_text("no image")
    (tmp_path / "broken.png").write_bytes(picture[:100])
    (tmp_path / "texts.txt").write_text("good room\n")
    return tmp_path


def test_one_image_shows_its_map_in_the_terminal_and_on_a_page(folder, files, capsys):
    page = files / "page.html"
    image = str(files / "pictures" / "a scene.png")
    assert main(["explain", str(folder), "--file", image, "--html", str(page), "--steps", "8"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert " · ca_lig · completeness gap" in lines[0] and lines[0].split()[0] in ("cat", "dog", "cow")
    assert [len(line) for line in lines[1:5]] == [12] * 4 and set("".join(lines[1:5])) <= set("+-· ")
    assert "supports  r" in out and "layers    " in out and "\x1b" not in out
    text = page.read_text()
    assert text.count("<title>r") == 16 and "data:image/" in text and "http" not in text.replace("http-equiv", "")


def test_scores_are_those_of_the_engine_on_what_the_processor_makes(folder, files):
    image = files / "pictures" / "a scene.png"
    (found,) = explain(folder, [image], steps=8, target="dog")
    from calig.pipeline.opening import open_source

    pixels = PROCESSOR.normalise(PROCESSOR.pixels(Image.open(image).convert("RGB"))[None])
    own = attribute(open_source(folder).model, {"pixel_values": pixels}, target=1, steps=8, tokenizer=PROCESSOR)
    assert torch.allclose(torch.tensor(found.scores), own.scores[0], atol=1e-5)
    assert found.grid == (4, 4) and found.target_name == "dog" and found.picture.startswith(b"\x89PNG")
    # As transformers prepares it.
    theirs = ViTImageProcessorPil.from_pretrained(folder)(Image.open(image), return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, theirs, atol=1e-5)


def test_a_folder_of_images_of_any_kind_becomes_rows_with_pictures(folder, files, capsys):
    out, page = files / "out", files / "page.html"
    arguments = ["--file", str(files / "pictures"), "--out", str(out), "--html", str(page)]
    assert main(["explain", str(folder), *arguments, "--method", "generic_attention", "--batch-size", "2"]) == 0
    assert "3 images explained by generic_attention" in capsys.readouterr().out
    table = load_explanations(out)
    assert sorted(table["sample_id"]) == [0, 1, 2]
    for row in table:
        assert Image.open(out / row["image_ref"]).size == (16, 16)
        assert Explanation.from_row(row, folder=out).picture is not None
    text = page.read_text()
    assert [text.index(f"<h2>{name}</h2>") for name in ("a scene.png", "grey.JPG", "thin.webp")]


def test_a_live_model_and_pictures_in_memory(folder, files):
    from calig.pipeline.opening import open_source

    model = open_source(folder).model
    picture = Image.open(files / "pictures" / "a scene.png")
    with_ours = explain(model, [picture], tokenizer=PROCESSOR, method="input_x_gradient")
    with_theirs = explain(
        model, [picture], tokenizer=ViTImageProcessorPil.from_pretrained(folder), method="input_x_gradient"
    )
    from_disk = explain(str(folder), [files / "pictures" / "a scene.png"], method="input_x_gradient")
    assert with_ours[0].scores == with_theirs[0].scores == from_disk[0].scores
    curves = explain(folder, [picture], method="input_x_gradient", curves=True)[0]
    assert set(curves.curves) == {"none", "random", "reversed"}


def test_slips_have_names_and_leave_nothing(folder, files, capsys):
    def fails(*arguments):
        assert main(["explain", str(folder), *arguments]) == 2
        return capsys.readouterr().err

    image = str(files / "pictures" / "a scene.png")
    assert "takes images (--file IMAGE, or a folder of them), got texts" in fails("--text", "good")
    assert "takes images" in fails("--file", str(files / "texts.txt"), "--out", str(files / "out"))
    assert "is of images: drop --text" in fails("--file", image, "--text", "good")
    assert "holds 3 images: add --out DIR or --html FILE" in fails("--file", str(files / "pictures"))
    assert "broken.png cannot be read as an image" in fails("--file", str(files / "broken.png"))
    assert "gone.png does not exist" in fails("--file", str(files / "gone.png"))
    assert "unknown" in fails("--file", image, "--target", "horse").lower()
    assert not (files / "out").exists()
    for given, message in (
        ([], "at least one"),
        ([3], r"images\[0\] is int"),
        ("a.png", "list of paths or pictures"),
    ):
        with pytest.raises(InputError, match=message):
            explain(folder, given)
    with pytest.raises(InputError, match="text_pairs belong to a model of texts"):
        explain(folder, [image], text_pairs=["b"])
    with pytest.raises(InputError, match="needs its image processor, got object"):
        explain(build(VISION[0]).float(), [image], tokenizer=object())
