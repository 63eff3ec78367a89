"""The data module: set-up, loaders, their order, the report, two processes."""

import pickle

import lightning
import pytest
import torch
from test_data_sources import columns, settings, write_jsonl
from torch import nn
from transformers import GPT2Tokenizer

from calig.datamodules.text import TextDataModule
from calig.pipeline.errors import InputError


@pytest.fixture
def module():
    data = TextDataModule(settings(name="controlled"), vocab_size=2000, seed=3)
    data.setup()
    return data


def ids(loader):
    return [i for batch in loader for i in batch["sample_id"].tolist()]


def test_set_up_once_and_before_use(module):
    with pytest.raises(RuntimeError, match="setup"):
        TextDataModule(settings(name="controlled")).describe()
    before = module.dataset("train")
    module.setup("fit")
    assert module.dataset("train") is before
    assert module.splits == ["train", "val", "test"] and len(module.label_names) == 2
    assert module.tokenizer.model_max_length == 32
    assert len(pickle.loads(pickle.dumps(module)).dataset("val")) == 20


def test_batches(module):
    batch = next(iter(module.val_dataloader()))
    width = batch["input_ids"].shape
    assert width[0] == 4 and batch["labels"].shape == batch["sample_id"].shape == (4,)
    for key in ("attention_mask", "token_type_ids", "special_tokens_mask", "word_ids", "rationale"):
        assert batch[key].shape == width
    assert ((batch["word_ids"] == -1) == (batch["special_tokens_mask"] == 1)).all()
    assert ids(module.val_dataloader()) == ids(module.test_dataloader()) == list(range(20))


def test_evaluation_batch_size_where_the_configuration_has_one():
    data = TextDataModule(settings(name="controlled", eval_batch_size=16))
    data.setup()
    assert (data.train_dataloader().batch_size, data.val_dataloader().batch_size) == (4, 16)


def test_training_order_depends_on_seed_and_epoch_only(module):
    loader = module.train_dataloader()
    first = ids(loader)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    assert ids(module.train_dataloader()) == first and sorted(first) == list(range(60)) != first
    assert torch.equal(torch.get_rng_state(), state), "iterating must not draw from the global generator"
    loader.sampler.set_epoch(1)
    second = ids(loader)
    assert second != first and ids(loader) == second
    other = TextDataModule(settings(name="controlled"), seed=4)
    other.setup()
    assert ids(other.train_dataloader()) != first


def test_explain_loader_is_a_fixed_subset_longest_first(module):
    loader = module.explain_dataloader("test", num_samples=7, batch_size=3, seed=1)
    chosen = ids(loader)
    assert len(set(chosen)) == 7 and ids(module.explain_dataloader("test", 7, 2, seed=1)) == chosen
    assert set(ids(module.explain_dataloader("test", 7, 3, seed=2))) != set(chosen)
    lengths = [n for batch in loader for n in batch["attention_mask"].sum(1).tolist()]
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(ids(module.explain_dataloader("test"))) == list(range(20))
    with pytest.raises(InputError, match="num_samples=0"):
        module.explain_dataloader("test", 0)
    with pytest.raises(InputError, match=r"unknown split 'tests'. Did you mean 'test'"):
        module.explain_dataloader("tests")


def test_report_and_missing_split(tmp_path):
    rows = [{"text": f"{i} " + "word " * (40 if i == 0 else 3), "label": "yes" if i % 4 else "no"} for i in range(1200)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    data = TextDataModule(settings(path=path, val_fraction=0.0, test_fraction=1 / 3), vocab_size=100)
    data.setup()
    counts = [row["labels"] for row in data.dataset("train").rows]
    no = round(100 * counts.count(0) / 800)
    pieces = [len(data.tokenizer.tokenize(row["text"])) for row in rows]
    tokens = sum(pieces)
    cut = pieces[0] - 30  # places beside [CLS] and [SEP]
    truncation = data.truncation()
    assert sum(part.tokens for part in truncation.values()) == tokens
    assert [sum(part[i] for part in truncation.values()) for i in (0, 1, 3)] == [1200, 1, cut]
    assert data.describe() == (
        f"train 800 · test 400 · 2 classes (no {no} %, yes {100 - no} %) · "
        f"1 of 1,200 texts truncated at 32 tokens ({cut / tokens:.1%} of all)"
    )
    with pytest.raises(InputError, match=r"there is no val split.*data.val_fraction"):
        data.val_dataloader()


def test_given_tokenizer_without_pad_and_workers(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"a": f"text {i}", "b": "a pair", "label": i % 2} for i in range(20)])
    gpt2 = GPT2Tokenizer().train_new_from_iterator([["text a pair"]], 300, show_progress=False)
    config = settings(path=path, columns=columns(text="a", text_pair="b"), num_workers=1)
    data = TextDataModule(config, tokenizer=gpt2)
    data.setup()
    assert data.tokenizer is gpt2 and gpt2.pad_token_id == gpt2.eos_token_id
    batch = next(iter(data.test_dataloader()))
    assert (
        "token_type_ids" not in batch and (batch["input_ids"][batch["attention_mask"] == 0] == gpt2.pad_token_id).all()
    )


class Recorder(lightning.LightningModule):
    """Writes the ids it is given, per epoch and rank."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.layer = folder, nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        with open(self.folder / f"{self.current_epoch}-{self.global_rank}", "a") as file:
            file.writelines(f"{i}\n" for i in batch["sample_id"].tolist())
        return self.layer(batch["labels"].float()[:, None]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_trainer_shares_the_rows_out_in_a_new_order_every_epoch(tmp_path, processes):
    data = TextDataModule(settings(name="controlled", val_fraction=0.0), seed=3)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Recorder(tmp_path), datamodule=data)
    epochs = [[(tmp_path / f"{e}-{rank}").read_text().split() for rank in range(processes)] for e in range(2)]
    for ranks in epochs:
        assert sorted(int(i) for rank in ranks for i in rank) == list(range(60))
    assert epochs[0] != epochs[1]
