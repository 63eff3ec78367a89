"""Classifiers and tokenizers from every source, and the weights that end in `model/`."""

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForSequenceClassification

from calig.datamodules.tokenization import train_wordpiece
from calig.pipeline.config import ModelConfig, ScratchConfig
from calig.pipeline.errors import InputError
from calig.pipeline.models import load_model, load_tokenizer
from calig.pipeline.module import ClassificationModule

SCRATCH = ScratchConfig(layers=2, width=16, heads=2, vocab_size=60, max_positions=32)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["a good film", "a bad film", "we liked it"], 60)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return load_model(ModelConfig(scratch=SCRATCH), ["no", "yes"], tokenizer)


def test_from_scratch(model, tokenizer):
    assert model.config.num_hidden_layers == 2 and model.config.vocab_size == len(tokenizer)
    assert model.config.id2label == {0: "no", 1: "yes"}
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert load_tokenizer(ModelConfig()) is None


def test_from_a_local_folder_with_its_tokenizer(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    assert load_tokenizer(config).get_vocab() == tokenizer.get_vocab()
    again = load_model(config, ["no", "yes"], tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    # Another task: a fresh head of the right size on the same encoder.
    other = load_model(config, ["a", "b", "c"], tokenizer)
    assert other.config.num_labels == 3 and other.classifier.out_features == 3
    assert torch.equal(other.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)


def test_from_a_checkpoint_file_or_folder(model, tokenizer, tmp_path):
    module = ClassificationModule(model, ["no", "yes"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    for checkpoint in (tmp_path / "last.ckpt", tmp_path / "folder"):
        torch.manual_seed(1)
        again = load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(checkpoint)), ["no", "yes"], tokenizer)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert load_tokenizer(ModelConfig(checkpoint=str(tmp_path / "folder"))) is not None


def test_a_bf16_checkpoint_comes_up_in_float32(model, tokenizer, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert load_model(ModelConfig(name=str(tmp_path)), ["no", "yes"], tokenizer).dtype == torch.float32


def test_errors_name_the_source(model, tokenizer, tmp_path):
    with pytest.raises(InputError, match="'no-such/model' could not be loaded"):
        load_tokenizer(ModelConfig(name="no-such/model"))
    with pytest.raises(InputError, match="'no-such/model' could not be loaded"):
        load_model(ModelConfig(name="no-such/model"), ["no", "yes"], tokenizer)
    with pytest.raises(InputError, match="width=16 is not a multiple of model.scratch.heads=3"):
        load_model(ModelConfig(scratch=ScratchConfig(width=16, heads=3)), ["no", "yes"], tokenizer)
    with pytest.raises(InputError, match="type=berd"):
        load_model(ModelConfig(scratch=ScratchConfig(type="berd")), ["no", "yes"], tokenizer)
    with pytest.raises(InputError, match="does not exist"):
        load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "x.ckpt")), ["no", "yes"], tokenizer)
    (tmp_path / "bad.ckpt").write_text("not a checkpoint")
    with pytest.raises(InputError, match="not a Lightning checkpoint"):
        load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "bad.ckpt")), ["no", "yes"], tokenizer)
    torch.save({"state_dict": {"model.other": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="weights of another model"):
        load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "other.ckpt")), ["no", "yes"], tokenizer)


def test_a_checkpoint_cannot_run_code(tokenizer, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError):
        load_model(ModelConfig(scratch=SCRATCH, checkpoint=str(tmp_path / "evil.ckpt")), ["no", "yes"], tokenizer)
    assert not (tmp_path / "ran").exists()
