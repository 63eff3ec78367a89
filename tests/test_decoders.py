"""Causal models as classifiers: tokenizers trained for them, models from scratch, a run from end to end."""

import pytest
import torch
from test_cli import TINY
from transformers import AutoTokenizer

from calig.datamodules.controlled import generate
from calig.datamodules.examples import TextExample
from calig.datamodules.tokenization import encode
from calig.datamodules.trained_tokenizers import train_tokenizer
from calig.pipeline import explain, load_explanations
from calig.pipeline.cli import main
from calig.pipeline.config import ModelConfig, ScratchConfig
from calig.pipeline.errors import InputError
from calig.pipeline.models import load_model

TEXTS = [example.text for example in generate({"train": 300})["train"]]
DECODERS = ["gpt2", "llama", "qwen2", "qwen3", "gemma", "mistral", "opt", "gpt_neox", "phi3"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer("byte_bpe", TEXTS, 1000, 64)


def test_byte_pairs_are_the_same_in_every_training_and_after_reloading(tokenizer, tmp_path):
    again = train_tokenizer("byte_bpe", TEXTS, 1000, 64)
    assert again.get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast and loaded.model_max_length == 64 and loaded.get_vocab() == tokenizer.get_vocab()
    text = TextExample(0, "The plot , wonderfully ሰላም", 1)
    assert encode(text, loaded, 16) == encode(text, again, 16)


def test_byte_pairs_keep_words_whole_between_a_begin_and_an_end(tokenizer):
    words = ["the", "soup", "was", "terrible", "."]
    row = encode(TextExample(0, words, 1, rationale=[0, 0, 0, 1, 0]), tokenizer, 16)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"]) == ["<s>", *(f"Ġ{word}" for word in words), "</s>"]
    assert row["special_tokens_mask"] == [1, 0, 0, 0, 0, 0, 1] and row["rationale"] == [-1, 0, 0, 0, 1, 0, -1]
    # GPT-2 would look token types up in its word table.
    assert "token_type_ids" not in row
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id]
    assert len(set(ids)) == 4 and None not in ids
    assert tokenizer.decode(tokenizer("ሰላም")["input_ids"], skip_special_tokens=True).strip() == "ሰላም"


def test_a_vocabulary_without_room_for_the_bytes_is_an_error():
    with pytest.raises(InputError, match="vocab_size=200 is too small: .* at least 261 are needed"):
        train_tokenizer("byte_bpe", TEXTS, 200)


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_from_scratch_have_the_size_that_is_asked_for(family, tokenizer, tmp_path):
    scratch = ScratchConfig(type=family, layers=2, width=24, heads=3, intermediate=40, max_positions=64, dropout=0.0)
    torch.manual_seed(0)
    model = load_model(ModelConfig(scratch=scratch), ["no", "yes"], tokenizer)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 2, 3)
    assert getattr(config, "num_key_value_heads", 3) == 3
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    assert any(40 in shape for shape in shapes) and len(tokenizer) in {size for shape in shapes for size in shape}
    drops = [part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)]
    assert not any(drops)
    for name in ("pad", "bos", "eos"):
        assert getattr(config, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [" ".join(words) for words in TEXTS[:3]]
    found = explain(tmp_path, texts, steps=4)
    live = explain(model, texts, tokenizer=tokenizer, steps=4, batch_size=1)
    for one, two in zip(found, live, strict=True):
        assert one.tokens == two.tokens and one.tokens[-1] == "</s>"
        assert torch.allclose(torch.tensor(one.scores), torch.tensor(two.scores), atol=1e-4)


def test_special_ids_that_a_tokenizer_lacks_are_not_left_to_the_family(tokenizer):
    bare = train_tokenizer("byte_bpe", TEXTS, 1000, 64)
    bare.bos_token = bare.eos_token = None
    model = load_model(ModelConfig(scratch=ScratchConfig(type="gpt2", width=24, heads=3)), ["no", "yes"], bare)
    assert model.config.eos_token_id is None and model.config.bos_token_id is None  # 50256 is no word of it


@pytest.mark.parametrize("model", ["gpt2_tiny", "llama_tiny"])
def test_a_decoder_is_trained_and_explained_from_end_to_end(model, tmp_path, capsys):
    run = tmp_path / "run"
    code = main(["run", f"run.dir={run}", f"model={model}", *TINY, "explain.steps=8", "logger.wandb.mode=disabled"])
    assert code == 0, capsys.readouterr().err
    rows = load_explanations(run)
    assert set(rows["method"]) >= {"ca_lig", "integrated_gradients", "attention_rollout"}
    row = rows[0]
    assert (
        row["tokens"][0] == "<s>" and row["tokens"][-1] == "</s>" and row["word_ids"][0] is row["word_ids"][-1] is None
    )
    assert AutoTokenizer.from_pretrained(run / "model").get_vocab()["</s>"] == 3
    text = "the soup was terrible , but the waiter was very charming ."
    assert main(["explain", str(run), "--text", text, "--steps", "8"]) == 0
    assert "charming" in capsys.readouterr().out
