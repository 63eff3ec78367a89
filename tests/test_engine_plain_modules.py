"""Modules that are no Hugging Face models: blocks found or named, torch's own encoder, what is refused."""

import copy

import pytest
import torch
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from conftest import make_batch, make_bert
from torch import nn

from calig.pipeline.attribution import ExplainableModel, UnsupportedModelError, attribute, available_methods
from calig.pipeline.attribution.wrapping import suspended
from calig.pipeline.errors import InputError


class Classifier(nn.Module):
    """torch's own encoder with a head on the first token."""

    def __init__(self, batch_first=True, layers=2):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(60, 24, padding_idx=0)
        self.position = nn.Parameter(0.5 * torch.randn(20, 24))
        layer = nn.TransformerEncoderLayer(24, 3, 48, dropout=0.1, batch_first=batch_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, layers)
        for number, block in enumerate(self.encoder.layers):
            torch.manual_seed(number)
            for parameter in block.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.2)
        self.head = nn.Linear(24, 3)
        self.batch_first = batch_first

    def forward(self, x, padding=None):
        z = self.embed(x) + self.position[: x.shape[1]]
        z = z if self.batch_first else z.transpose(0, 1)
        z = self.encoder(z, src_key_padding_mask=padding)
        return self.head(z[:, 0] if self.batch_first else z[0])


def plain_batch(**more):
    batch = make_batch(**more)
    real = batch["attention_mask"].bool()
    return {
        "x": batch["input_ids"],
        "padding": ~real,
        "attention_mask": batch["attention_mask"],
        "special_tokens_mask": batch["special_tokens_mask"],
    }


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "tokens first"])
def test_torch_encoder_equals_captum(batch_first):
    model, batch = Classifier(batch_first).eval(), plain_batch()
    result = attribute(model, batch, "integrated_gradients", target=1, steps=12)
    base = torch.where(batch["special_tokens_mask"].bool(), batch["x"], 0)
    wanted = LayerIntegratedGradients(model, model.embed).attribute(
        batch["x"],
        baselines=base,
        target=1,
        additional_forward_args=(batch["padding"],),
        n_steps=12,
        method="gausslegendre",
    )
    assert torch.allclose(result.scores, wanted.sum(-1).float() * ~batch["padding"], atol=1e-5)
    assert torch.equal(result.mask, ~batch["padding"])
    assert (result.completeness_gap < 1e-2).all()
    alone = {key: value[1:2, :6] for key, value in batch.items()}
    one = attribute(model, alone, "integrated_gradients", target=1, steps=12)
    assert torch.allclose(one.scores[0], result.scores[1, :6], atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "tokens first"])
def test_every_layer_of_torch_encoder_is_a_cut(batch_first):
    from calig.pipeline.attribution.inside import find_ends, layer_evidence
    from calig.pipeline.attribution.objective import ClassLogit

    model = Classifier(batch_first, layers=3).eval()
    wrapped, goal = ExplainableModel(model), ClassLogit(torch.tensor([0, 1, 2]))
    with wrapped.session():
        inputs = wrapped.prepare(plain_batch())
        ends = find_ends(wrapped, inputs, goal, "pad", None)
        sums = {
            path: layer_evidence(
                wrapped, inputs, goal, ends, layers=[0, 1, 2, 3], path=path, steps=steps, tolerance=1, max_steps=999
            ).evidence.sum(-1)
            for path, steps in (("straight", 24), ("shared", 257))
        }
    for path, found in sums.items():
        assert torch.allclose(found, ends.output_change[:, None].expand_as(found), rtol=1e-2, atol=1e-3), path


def test_the_fast_path_of_torch_is_off_inside_and_back_afterwards():
    model, batch = Classifier().eval(), plain_batch()
    with torch.no_grad():
        fast = model(batch["x"], batch["padding"])
        state = ExplainableModel(model)
        with state.evaluation():
            assert not torch.backends.mha.get_fastpath_enabled()
            slow = model(batch["x"], batch["padding"])
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.allclose(fast, slow, atol=1e-5)
    with pytest.raises(InputError):
        attribute(model, batch, "input_x_gradient", target=9)
    assert torch.backends.mha.get_fastpath_enabled()
    # Of two that overlap (threads), the first to leave does not turn it on under the other.
    first, second = suspended(model), suspended(Classifier())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled()


def test_methods_that_need_attention_name_the_others():
    model, batch = Classifier().eval(), plain_batch()
    for method in available_methods():
        if method in ("ca_lig", "attention_rollout", "generic_attention"):
            with pytest.raises(UnsupportedModelError, match=r"'Classifier'.*input_x_gradient"):
                attribute(model, batch, method, target=1)
        elif method in ("integrated_gradients", "input_x_gradient", "random"):
            assert not attribute(model, batch, method, target=1).non_finite().any()


class Sequential(nn.Module):
    """Blocks in an `nn.Sequential`, which are not looked for, and a larger list that is no stack."""

    def __init__(self):
        super().__init__()
        inner = Classifier().eval()
        self.words, self.head = inner.embed, inner.head
        self.body = nn.Sequential(*inner.encoder.layers)

    def forward(self, x):
        return self.head(self.body(self.words(x)).mean(1))


def test_named_blocks():
    model = Sequential().eval()
    batch = {"x": make_batch((9, 9, 9))["input_ids"], "special_tokens_mask": torch.zeros(3, 9)}
    with pytest.raises(
        UnsupportedModelError, match=r"no stack of blocks.*blocks=.*'body' \(2 x TransformerEncoderLayer"
    ):
        attribute(model, batch, "input_x_gradient")
    by_path = attribute(model, batch, "integrated_gradients", blocks="body", embedding="words", target=1)
    by_module = attribute(
        model, batch, "integrated_gradients", blocks=list(model.body), embedding=model.words, target=1
    )
    assert torch.equal(by_path.scores, by_module.scores) and (by_path.scores != 0).all()
    wrapped = ExplainableModel(model, blocks="body")
    assert wrapped.structure.blocks == tuple(model.body)
    other = wrapped.with_tokenizer(object())
    assert other.structure.blocks == tuple(model.body) and other.structure.embedding is model.words
    with pytest.raises(InputError, match="not beside one"):
        attribute(wrapped, batch, blocks="body")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            {"blocks": "bodies"},
            r"blocks='bodies' does not exist in 'Sequential'.*'body' \(2 x TransformerEncoderLayer\)",
        ),
        ({"blocks": "head"}, r"blocks='head' is a Linear, no container, in 'Sequential'.*'body'"),
        ({"blocks": [nn.Linear(2, 2)]}, r"modules inside 'Sequential', got Linear.*'body'"),
        ({"blocks": []}, r"modules inside 'Sequential', got none"),
        ({"blocks": "body", "embedding": "word"}, r"embedding='word' does not exist.*'words'"),
        ({"blocks": "body", "embedding": nn.Embedding(2, 2)}, r"embedding=Embedding does not exist.*'words'"),
    ],
)
def test_wrong_names_list_what_there_is(names, message):
    with pytest.raises(InputError, match=message):
        ExplainableModel(Sequential(), **names)


def test_blocks_that_are_not_all_of_the_model_are_refused():
    class Around(nn.Module):
        """A residual added outside the listed modules."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(60, 24), nn.Linear(24, 3)
            self.parts = nn.ModuleList([nn.Linear(24, 24) for _ in range(2)])

        def forward(self, input_ids):
            z = self.embed(input_ids)
            for part in self.parts:
                z = z + torch.tanh(part(z))
            return self.head(z.mean(1))

    with pytest.raises(UnsupportedModelError, match=r"enters block 1 of 'Around' is not all.*2 Linear.*`blocks=`"):
        attribute(Around(), make_batch(), "integrated_gradients", baseline="mean", target=1)

    class Skipping(Classifier):
        """A head that also reads what left the first block."""

        def forward(self, x, padding=None):
            z = first = self.encoder.layers[0](self.embed(x))
            for block in self.encoder.layers[1:]:
                z = block(z)
            return self.head((z + first)[:, 0])

    from calig.pipeline.attribution.inside import find_ends, layer_evidence
    from calig.pipeline.attribution.objective import ClassLogit

    wrapped, goal = ExplainableModel(Skipping(layers=3).eval()), ClassLogit(torch.tensor([0, 1, 2]))
    with wrapped.session():
        inputs = wrapped.prepare(plain_batch())
        ends = find_ends(wrapped, inputs, goal, "pad", None)
        with pytest.raises(UnsupportedModelError, match="leaves block 2 of 'Skipping'"):
            layer_evidence(
                wrapped, inputs, goal, ends, layers=[0, 1, 2, 3], path="straight", steps=4, tolerance=1, max_steps=9
            )


def test_blocks_that_do_not_run_or_change_shape_say_so():
    idle = Classifier().eval()
    idle.unused = nn.ModuleList([nn.Linear(200, 200) for _ in range(3)])
    with pytest.raises(UnsupportedModelError, match=r"no block of 'Classifier' \(Linear\) runs.*`blocks=`"):
        attribute(idle, plain_batch(), "input_x_gradient")
    assert attribute(idle, plain_batch(), "input_x_gradient", blocks="encoder.layers").scores.shape == (3, 9)

    class Vectors(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

        def forward(self, x):
            for part in self.parts:
                x = part(x)
            return x

    with pytest.raises(UnsupportedModelError, match=r"do not take a \(batch, tokens, width\) tensor.*shape \(1, 6\)"):
        attribute(Vectors(), {"x": torch.randn(3, 6)}, "input_x_gradient")


def test_features_instead_of_words_take_the_zero_baseline():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            inner = Classifier().eval()
            self.project, self.encoder, self.head = nn.Linear(7, 24), inner.encoder, inner.head

        def forward(self, frames):
            return self.head(self.encoder(self.project(frames)).mean(1))

    torch.manual_seed(0)
    model, batch = Features().eval(), {"frames": torch.randn(3, 5, 7), "special_tokens_mask": torch.zeros(3, 5)}
    with pytest.raises(UnsupportedModelError, match=r"no word embedding.*`embedding=`.*baseline='zero'"):
        attribute(model, batch, "integrated_gradients")
    result = attribute(model, batch, "integrated_gradients", baseline="zero", steps=12, target=0)
    wanted = IntegratedGradients(lambda states: model.head(model.encoder(states).mean(1))).attribute(
        model.project(batch["frames"]).detach(), target=0, n_steps=12, method="gausslegendre"
    )
    assert torch.allclose(result.scores, wanted.sum(-1).float(), atol=1e-5)
    assert attribute(model, batch, "random", target=0, baseline="zero").non_finite().sum() == 0


def test_the_host_is_the_model_around_the_blocks():
    """Two Hugging Face models in one module: attention is recorded in the one whose blocks are explained."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student = make_bert(layers=1, seed=4), make_bert(layers=3)

        def forward(self, input_ids, attention_mask=None):
            return self.student(input_ids, attention_mask=attention_mask).logits

    model = Two().eval()
    assert ExplainableModel(model).structure.host is model.student
    found, wanted = (attribute(one, make_batch(), target=1) for one in (model, model.student))
    assert torch.allclose(found.scores, wanted.scores, atol=1e-6)


def test_towers_keep_their_own_attention():
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
    config = CLIPConfig(
        vision_config=tower | {"image_size": 16, "patch_size": 4},
        text_config=tower | {"vocab_size": 60, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1},
    )
    model = CLIPModel(config)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    before = copy.copy([part.config._attn_implementation for part in (model, model.vision_model, model.text_model)])
    from calig.pipeline.attribution.attention import recorded_attention

    with recorded_attention(model):
        assert model.vision_model.config._attn_implementation == "calig_recorder"
    assert [part.config._attn_implementation for part in (model, model.vision_model, model.text_model)] == before


def test_encoder_decoders_are_refused_and_their_encoders_explained():
    from transformers import (
        BartConfig,
        BartForSequenceClassification,
        T5Config,
        T5EncoderModel,
        T5ForSequenceClassification,
    )

    bart = BartConfig(
        vocab_size=60, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40,
    )  # fmt: skip
    t5 = T5Config(vocab_size=60, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, decoder_start_token_id=0)
    for model in (BartForSequenceClassification(bart), T5ForSequenceClassification(t5)):
        with pytest.raises(UnsupportedModelError, match=r"is an encoder-decoder: .*head on its encoder alone"):
            attribute(model, make_batch(), "integrated_gradients")

    class OnTheEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encoder, self.head = T5EncoderModel(t5), nn.Linear(24, 3)
            for name, parameter in self.encoder.named_parameters():
                if "relative_attention_bias" in name:  # a fresh one hardly matters, a trained one does
                    nn.init.normal_(parameter, std=2.0)

        def forward(self, input_ids, attention_mask):
            states = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            return self.head(states[:, 0])

    model = OnTheEncoder().eval()
    result = attribute(model, make_batch(), target=1, baseline="mean", steps=513)
    assert (result.completeness_gap < 0.05).all()
    # Block 1 hands its position bias to the blocks behind it, so a tail alone is not the model.
    with pytest.raises(UnsupportedModelError, match="leaves block 1 of 't5' is not all"):
        attribute(model, make_batch(), target=1, baseline="mean", path="straight")
