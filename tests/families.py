"""Tiny random classifiers of many families, and references that know where a family's blocks are."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    CLIPConfig,
    DeiTConfig,
    DeiTForImageClassification,
    SiglipConfig,
    ViTMAEConfig,
    ViTMAEModel,
)

TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
IMAGE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 4,
}
PATCHES = 16
TOWERS = {"clip": CLIPConfig, "siglip": SiglipConfig}


class MAEClassifier(nn.Module):
    """A masked autoencoder's encoder with a head on [CLS]; nothing is masked, and patches keep their order."""

    def __init__(self, config):
        super().__init__()
        self.vit = ViTMAEModel(config)
        self.head = nn.Linear(config.hidden_size, 3)

    def forward(self, pixel_values):
        noise = torch.arange(PATCHES, device=pixel_values.device).expand(len(pixel_values), -1)
        return self.head(self.vit(pixel_values, noise=noise).last_hidden_state[:, 0])


@dataclass(frozen=True)
class Family:
    """A family, where its blocks are, and what its head reads: first | last | patches | first and patches."""

    name: str
    blocks: str
    reads: str = "first"
    special: int = 0  # positions in front of the patches; 0 for text
    settings: dict = field(default_factory=dict)
    image: bool = False


ENCODERS = [
    Family("bert", "bert.encoder.layer"),
    Family("roberta", "roberta.encoder.layer"),
    Family("xlm-roberta", "roberta.encoder.layer"),
    Family("camembert", "roberta.encoder.layer"),
    Family("electra", "electra.encoder.layer", settings={"embedding_size": 16}),
    Family("albert", "albert.encoder.albert_layer_groups.0.albert_layers", settings={"embedding_size": 16}),
    Family(
        "distilbert",
        "distilbert.transformer.layer",
        settings={"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 32},
    ),
    Family("modernbert", "model.layers", settings={"num_hidden_layers": 3, "local_attention": 6}),
]
DECODERS = [
    Family("gpt2", "transformer.h", "last", settings={"n_embd": 24, "n_layer": 2, "n_head": 3, "n_inner": 32}),
    Family("llama", "model.layers", "last", settings=GROUPED),
    Family("qwen2", "model.layers", "last", settings=GROUPED),
    Family("qwen3", "model.layers", "last", settings=GROUPED),
    Family("gemma", "model.layers", "last", settings=GROUPED),
    Family("mistral", "model.layers", "last", settings=GROUPED | {"sliding_window": 4}),
    Family("opt", "model.decoder.layers", "last", settings={"ffn_dim": 32, "word_embed_proj_dim": 24}),
]
VISION = [
    Family("vit", "vit.layers", special=1, image=True),
    Family("deit", "deit.layers", special=2, image=True),
    Family(
        "beit", "beit.layers", "patches", 1, {"use_relative_position_bias": True, "layer_scale_init_value": 1.0}, True
    ),
    Family("dinov2", "dinov2.encoder.layer", "first and patches", 1, image=True),
    Family("vit_mae", "vit.layers", special=1, settings={"mask_ratio": 0.0}, image=True),
]
# Named nowhere in the package.
UNNAMED = [
    Family("gpt_neox", "gpt_neox.layers", "last"),
    Family("phi3", "model.layers", "last", settings={"num_key_value_heads": 1}),
    Family("gemma2", "model.layers", "last", settings=GROUPED | {"sliding_window": 32}),
    Family("nomic_bert", "nomic_bert.layers"),
    Family("clip", "vision_model.encoder.layers", "patches", 1, image=True),
    Family("siglip", "vision_model.encoder.layers", "patches", 0, image=True),
    Family("dinov2_with_registers", "dinov2_with_registers.encoder.layer", "first and patches", 5, image=True),
]


def build(family, **more):
    """A random classifier of three classes in float64, its weights spread enough that attention is not uniform."""
    torch.manual_seed(0)
    settings = {**(IMAGE if family.image else TEXT), "num_labels": 3, **family.settings, **more}
    if family.name == "vit_mae":
        model = MAEClassifier(ViTMAEConfig(**settings))
    elif family.name == "deit":  # two classes are registered for it
        model = DeiTForImageClassification(DeiTConfig(**settings))
    elif family.name in TOWERS:
        config = TOWERS[family.name](vision_config=settings, num_labels=3)
        model = AutoModelForImageClassification.from_config(config)
    else:
        auto = AutoModelForImageClassification if family.image else AutoModelForSequenceClassification
        config = AutoConfig.for_model(
            family.name, **{key: value for key, value in settings.items() if value is not None}
        )
        model = auto.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "token" in name:
                # Also the pad token's row: at zero, a norm without a bias behind it has no baseline to start from.
                spread = 0.5 if "embed" in name or "cls" in name else 0.8 / parameter[0].numel() ** 0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def images(count=3, *, size=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    return {"pixel_values": torch.randn(count, 3, size, size, generator=generator, dtype=dtype)}


def blocks_of(model, family):
    return list(model.get_submodule(family.blocks))


def logits_of(output):
    return getattr(output, "logits", output)


@contextmanager
def overwritten(model, family, depth, state=None, seen=None):
    """Within the context z^depth is `state` (or only kept in `seen`), whatever came before it in the model."""
    calls = 0

    def put(value):
        if seen is not None:
            seen.append(value.detach())
        return value if state is None else state

    def enter(_block, args, kwargs):
        nonlocal calls
        calls += 1
        if calls == 1 and depth == 0:
            if args:
                return (put(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": put(kwargs["hidden_states"])}
        return None

    def leave(_block, _args, output):
        if calls == depth:
            return (put(output[0]), *output[1:]) if isinstance(output, tuple) else put(output)
        return None

    blocks = dict.fromkeys(blocks_of(model, family))
    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def state_at(model, family, batch, depth):
    seen = []
    with overwritten(model, family, depth, seen=seen), torch.no_grad():
        model(**batch)
    return seen[0]


@contextmanager
def baseline_rows(model, content, row):
    """Within the context the word embedding returns `row` at content positions."""
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _m, _a, output: torch.where(content[..., None], row, output)
    )
    try:
        yield
    finally:
        handle.remove()


def naive_tail_gradients(model, family, batch, depth, origin, end, target, nodes):
    """Integrated gradients on the line between two states of one layer, by whole passes with the state overwritten."""
    total = torch.zeros_like(end)
    points, weights = np.polynomial.legendre.leggauss(nodes)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        state = (origin + float(point) * (end - origin)).requires_grad_()
        with overwritten(model, family, depth, state):
            value = logits_of(model(**batch))[:, target].sum()
        total += float(weight) * torch.autograd.grad(value, state)[0]
    return ((end - origin) * total).sum(-1)


@contextmanager
def nudged_attention(model, layer, entry, step):
    """Within the context A[entry] of one layer is larger by `step`, through the family's own eager function."""
    home = next(
        sys.modules[type(part).__module__]
        for part in model.modules()
        if hasattr(sys.modules[type(part).__module__], "eager_attention_forward")
    )
    original, calls = home.eager_attention_forward, 0
    head, query, key = entry

    def forward(module, q, k, v, *args, **kwargs):
        nonlocal calls
        output, weights = original(module, q, k, v, *args, **kwargs)
        if calls == layer:
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            output = output.clone()
            output[0, query, head] += step * v[0, head, key]
        calls += 1
        return output, weights

    home.eager_attention_forward = forward
    try:
        yield
    finally:
        home.eager_attention_forward = original
