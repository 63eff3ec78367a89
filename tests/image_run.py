"""A run directory of images as the stages leave it, made without training: a small ViT, discs and squares, a probe."""

import torch
from PIL import Image, ImageDraw
from transformers import ViTConfig, ViTForImageClassification

from calig.pipeline.compose import compose, to_yaml
from calig.pipeline.explainer import Explainer, ExplainSettings
from calig.pipeline.manifest import write_shard
from calig.pipeline.records import EXPLANATION_SCHEMA, write_table

NAMES = ["disc", "square"]
METHODS = {"ca_lig": {"steps": 6}, "generic_attention": {}, "input_x_gradient": {}, "random": {}}
SIZE = 64


class Processor:
    """Pixels from -1 to 1."""

    image_mean, image_std, do_normalize = [0.5] * 3, [0.5] * 3, True

    def pictures(self, pixel_values):
        return (127.5 * (pixel_values + 1)).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def scenes(count, seed=0):
    """A red disc or a red square at a random place on stripes."""
    generator = torch.Generator().manual_seed(seed)
    pixels, masks, labels = [], [], []
    for i in range(count):
        label, (x, y) = i % 2, torch.randint(4, SIZE - 28, (2,), generator=generator).tolist()
        picture, mask = Image.new("RGB", (SIZE, SIZE), (110, 140, 105)), Image.new("L", (SIZE, SIZE))
        for stripe in range(int(3 * i) % 8, SIZE, 8):
            ImageDraw.Draw(picture).line((stripe, 0, stripe, SIZE), fill=(80, 105, 85), width=2)
        for canvas, colour in ((picture, (205, 60, 50)), (mask, 255)):
            draw = ImageDraw.Draw(canvas)
            (draw.rectangle if label else draw.ellipse)((x, y, x + 22, y + 22), fill=colour)
        data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(SIZE, SIZE, 3)
        pixels.append(data.permute(2, 0, 1) / 127.5 - 1)
        masks.append((torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(SIZE, SIZE) > 0).long())
        labels.append(label)
    return {"pixel_values": torch.stack(pixels), "object_mask": torch.stack(masks), "labels": torch.tensor(labels)}


def vit(layers=4):
    torch.manual_seed(3)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=SIZE,
        patch_size=8,
        num_labels=2,
        initializer_range=0.25,
    )
    return ViTForImageClassification(config).eval()


def make_image_run(folder, count=6, model=None):
    """Explanations, metrics, pictures and two probes; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = compose(
        ["explain.methods=[ca_lig,generic_attention,input_x_gradient,random]", "run.name=discs and squares"]
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "summary.json").write_text("{}")
    model = vit() if model is None else model
    explainer = Explainer(model, Processor(), ExplainSettings(METHODS, operators=("mean", "drop")))
    batch = {**scenes(count), "sample_id": torch.arange(20, 20 + count)}
    batch["object_mask"][1] = -1
    write_shard(folder, "part-00000-00000", explainer.explain(batch), {"methods": METHODS, "label_names": NAMES})
    probe = Explainer(model, Processor(), ExplainSettings({"ca_lig": {"steps": 4}}, operators=()))
    for epoch in range(2):
        with torch.no_grad():
            model.classifier.weight[:, ::3] += 0.5 * torch.tensor([[1.0], [-1.0]])
        found = probe.explain({**scenes(3, seed=9), "sample_id": torch.arange(3)})
        name = f"epoch-{epoch:04d}-step-{40 * (epoch + 1):07d}.parquet"
        write_table(folder / "probe" / name, found.explanations, EXPLANATION_SCHEMA, {"label_names": NAMES})
        for place, data in found.files.items():
            (folder / "probe" / place).parent.mkdir(exist_ok=True)
            (folder / "probe" / place).write_bytes(data)
    return folder
