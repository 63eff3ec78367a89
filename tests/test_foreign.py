"""AttributionCallback in Lightning projects that know nothing of calig: their loaders, batches and modules."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, SubsetRandomSampler
from transformers import DataCollatorWithPadding

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_bert
from distributed_worker import loader, make_rows, make_trainer

from calig.callbacks import AttributionCallback
from calig.callbacks.probe import sampled_indices
from calig.datamodules.tokenization import train_wordpiece
from calig.pipeline.errors import InputError

PREFIX = "val/explain/ca_lig"
GAP = f"{PREFIX}/completeness_gap"
STEPS = {"steps": 4}


class Module(LightningModule):
    """A user's module: `net` takes `input_ids` and `attention_mask`, `read` turns their batch into (inputs, labels)."""

    def __init__(self, read=lambda batch: (batch, batch["labels"]), net=None):
        super().__init__()
        self.net = make_bert(layers=2).train() if net is None else net
        self.read = read

    def training_step(self, batch, batch_idx):
        inputs, labels = self.read(batch)
        logits = self.net(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits, labels)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def fit(tmp_path, val, *, probe=None, module=None, train=None, callbacks=(), **arguments):
    seed_everything(0, verbose=False)
    probe = probe or AttributionCallback(num_samples=4, folder=tmp_path / "probe", **STEPS)
    trainer = make_trainer(1, tmp_path, [probe, *callbacks], **arguments)
    trainer.fit(module or Module(), train or loader(4), val)
    return probe, trainer


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


# ---------------------------------------------------------------------------------------------------------- loaders


class Rows(IterableDataset):
    """Yields its rows in another order on every pass."""

    def __init__(self, count):
        self.rows = make_rows(count)
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        shift = self.passes % len(self.rows)
        yield from self.rows[shift:] + self.rows[:shift]


def plain(rows):
    """Without the keys that only calig's own data modules have."""
    return [{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in rows]


LOADERS = {
    "a list of loaders": lambda: [loader(5), loader(9)],
    "a dict of loaders": lambda: {"first": loader(5), "second": loader(9)},
    "a CombinedLoader": lambda: CombinedLoader({"first": loader(5), "second": [loader(9)]}, "sequential"),
    "a batch_sampler": lambda: DataLoader(
        plain(make_rows(5)), batch_sampler=BatchSampler(SequentialSampler(range(5)), 2, drop_last=False)
    ),
    "workers": lambda: DataLoader(plain(make_rows(5)), 2, num_workers=1),
    "an iterable dataset": lambda: DataLoader(Rows(5), 2),
    "a dataset of batches": lambda: DataLoader([next(iter(loader(5, 3))), next(iter(loader(5, 2)))], batch_size=None),
}


@pytest.mark.parametrize("name", LOADERS)
def test_validation_loaders_of_every_kind(tmp_path, name):
    probe, trainer = fit(tmp_path, LOADERS[name](), max_epochs=2)
    assert GAP in trainer.callback_metrics, sorted(trainer.callback_metrics)
    assert trainer.callback_metrics[f"{PREFIX}/failed"] == 0
    assert f"{PREFIX}/drift" in trainer.callback_metrics
    ids = probe.state_dict()["ids"]
    assert len(ids) == 4 and set(ids) <= set(range(5)), "of the first loader, by their place in its dataset"


def test_an_iterable_dataset_is_read_once_so_that_every_probe_sees_the_same_rows(tmp_path):
    probe, _ = fit(tmp_path, DataLoader(Rows(6), 2), max_epochs=1)
    before = probe.state_dict()["texts"]
    probe, _ = fit(tmp_path, DataLoader(Rows(6), 2), max_epochs=3)
    assert probe.state_dict()["texts"] == before


def test_a_dataset_that_takes_lists_of_indices(tmp_path):
    class Lists(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, indices):
            return torch.utils.data.default_collate([plain(make_rows(5))[index] for index in indices])

    sampler = BatchSampler(SequentialSampler(range(5)), 2, drop_last=False)
    _, trainer = fit(tmp_path, DataLoader(Lists(), sampler=sampler, batch_size=None))
    assert trainer.callback_metrics[f"{PREFIX}/failed"] == 0


def test_a_subset_sampler_keeps_the_probe_off_the_training_samples(tmp_path):
    rows = plain(make_rows(9))
    train = DataLoader(rows, 2, sampler=SubsetRandomSampler([0, 1, 2, 3, 4]))
    val = DataLoader(rows, 2, sampler=SubsetRandomSampler([5, 6, 7, 8]))
    probe, _ = fit(tmp_path, val, train=train)
    assert probe.state_dict()["ids"] == [5, 6, 7, 8]
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    wrapped = DistributedSamplerWrapper(SubsetRandomSampler([5, 6, 7]), num_replicas=2, rank=1)
    assert sampled_indices(DataLoader(rows, 2, sampler=wrapped)) == [5, 6, 7]


def test_more_samples_asked_for_than_there_are(tmp_path):
    probe, trainer = fit(tmp_path, loader(3), probe=AttributionCallback(num_samples=64, **STEPS))
    assert probe.state_dict()["ids"] == [0, 1, 2]
    assert trainer.callback_metrics[f"{PREFIX}/failed"] == 0


def test_what_is_no_dataloader_is_named(tmp_path):
    class Batches:
        __iter__ = lambda self: iter(loader(4))
        __len__ = lambda self: 2

    with pytest.raises(InputError, match=r"needs a torch DataLoader for validation, got Batches\. Wrap .*DataLoader\("):
        fit(tmp_path, Batches())


def test_another_dataset_is_another_probe(tmp_path):
    probe = AttributionCallback(num_samples=4, **STEPS)
    trainer = make_trainer(1, tmp_path, [probe])
    module = Module()
    trainer.validate(module, loader(9), verbose=False)
    texts = probe.state_dict()["texts"]
    other = DataLoader(make_rows(40)[20:29], 3)
    trainer.validate(module, other, verbose=False)
    assert probe.state_dict()["texts"] != texts
    assert f"{PREFIX}/drift" not in trainer.callback_metrics, "other texts have not drifted"
    trainer.validate(module, other, verbose=False)
    assert trainer.callback_metrics[f"{PREFIX}/drift"] == 1, "the rank correlation with itself"


# ---------------------------------------------------------------------------------------------------------- batches


def tuples(rows):
    return [(row["input_ids"], row["attention_mask"], row["labels"]) for row in rows]


def read_tuple(batch):
    return {"input_ids": batch[0], "attention_mask": batch[1]}, batch[2]


def test_tuples_are_refused_before_the_first_step_and_an_adapter_takes_them(tmp_path):
    data = DataLoader(tuples(make_rows(4)), 2)
    module = Module(read_tuple)
    with pytest.raises(InputError, match=r"gives a list; .*`input_ids`.*AttributionCallback\(inputs=lambda batch:"):
        fit(tmp_path, data, module=module, train=data)
    assert module.trainer.global_step == 0
    adapted = AttributionCallback(num_samples=3, inputs=lambda batch: {**read_tuple(batch)[0], "labels": batch[2]})
    _, trainer = fit(tmp_path, data, probe=adapted, module=Module(read_tuple), train=data)
    assert trainer.callback_metrics[f"{PREFIX}/failed"] == 0
    batches = DataLoader(list(data), batch_size=None)
    again = AttributionCallback(num_samples=3, inputs=adapted.inputs)
    fit(tmp_path, batches, probe=again, module=Module(read_tuple), train=data)
    assert again.state_dict()["ids"] == [0, 1, 2]


def test_other_keys_are_named(tmp_path):
    rows = [
        {"tokens": row["input_ids"], "mask": row["attention_mask"], "labels": row["labels"]}
        for row in plain(make_rows(4))
    ]
    module = Module(lambda batch: ({"input_ids": batch["tokens"], "attention_mask": batch["mask"]}, batch["labels"]))
    with pytest.raises(InputError, match="gives a mapping with tokens, mask, labels; .*inputs=lambda"):
        fit(tmp_path, DataLoader(rows, 2), module=module, train=DataLoader(rows, 2))


def test_the_collator_of_a_tokenizer(tmp_path):
    texts = ["a good film", "a bad film we liked", "we liked it", "bad"]
    tokenizer = train_wordpiece(texts, 60)
    rows = [{**tokenizer(text), "label": index % 2} for index, text in enumerate(texts)]
    data = DataLoader(rows, 2, collate_fn=DataCollatorWithPadding(tokenizer))
    probe = AttributionCallback(num_samples=4, tokenizer=tokenizer, folder=tmp_path / "probe", **STEPS)
    _, trainer = fit(tmp_path, data, probe=probe, module=Module(lambda b: (b, b["labels"])), train=data)
    assert f"{PREFIX}/comprehensiveness" in trainer.callback_metrics, "with a tokenizer the operator is mask"
    row = rows_of(tmp_path)[0]
    assert row["tokens"][0] == "[CLS]" and row["word_ids"][0] is None and row["label"] == 0


def rows_of(folder):
    import pyarrow.parquet as pq

    return pq.read_table(next((folder / "probe").glob("*.parquet"))).to_pylist()


@pytest.mark.parametrize("labels", ["absent", "label", "vector", "float"])
def test_labels_absent_renamed_or_of_another_kind(tmp_path, labels):
    rows = plain(make_rows(4))
    for row in rows:
        label = row.pop("labels")
        if labels == "label":
            row["label"] = label
        elif labels == "vector":
            row["labels"] = torch.nn.functional.one_hot(torch.tensor(label), 3).float()
        elif labels == "float":
            row["labels"] = float(label)

    def read(batch):
        return batch, torch.zeros(len(batch["input_ids"]), dtype=torch.long)

    data = DataLoader(rows, 2)
    _, trainer = fit(tmp_path, data, module=Module(read), train=data)
    assert trainer.callback_metrics[f"{PREFIX}/failed"] == 0
    found = [row["label"] for row in rows_of(tmp_path)]
    assert found == ([row["label"] for row in rows] if labels == "label" else [None] * 4)


def test_keys_that_mean_something_else_in_their_data(tmp_path):
    rows = plain(make_rows(4))
    for index, row in enumerate(rows):
        row |= {"sample_id": f"row-{index}", "rationale": "because", "word_ids": torch.tensor([index])}
    _, trainer = fit(tmp_path, DataLoader(rows, 2), train=DataLoader(rows, 2))
    assert trainer.callback_metrics[f"{PREFIX}/failed"] == 0
    assert [row["sample_id"] for row in rows_of(tmp_path)] == [0, 1, 2, 3]


def test_numbers_of_their_own_count_where_they_tell_samples_apart(tmp_path):
    for own, found in ((lambda i: 10 - i, [7, 8, 9, 10]), (lambda i: i // 2, [0, 1, 2, 3])):
        rows = [{**row, "sample_id": own(index)} for index, row in enumerate(make_rows(4))]
        probe, _ = fit(tmp_path, DataLoader(rows, 2))
        assert probe.state_dict()["ids"] == found


def test_without_a_tokenizer_tokens_are_ids(tmp_path):
    _, trainer = fit(tmp_path, DataLoader(plain(make_rows(4)), 2))
    assert f"{PREFIX}/comprehensiveness@attention" in trainer.callback_metrics
    first = rows_of(tmp_path)[0]
    assert first["tokens"] == [str(int(token)) for token in make_rows(1)[0]["input_ids"] if token]


def test_the_batch_is_moved_by_the_modules_own_hooks(tmp_path):
    class Own(Module):
        seen = 0

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            self.seen += isinstance(batch["input_ids"], list)
            return {key: torch.tensor(value, device=device) for key, value in batch.items()}

    def collate(rows):
        return {key: [torch.as_tensor(row[key]).tolist() for row in rows] for key in rows[0]}

    data = DataLoader(plain(make_rows(4)), 2, collate_fn=collate)
    _, trainer = fit(tmp_path, data, module=(module := Own()), train=data)
    assert module.seen and trainer.callback_metrics[f"{PREFIX}/failed"] == 0


# ---------------------------------------------------------------------------------------------------------- modules


def test_a_model_made_in_configure_model_or_setup(tmp_path):
    class Late(Module):
        def __init__(self):
            super().__init__(net=torch.nn.Identity())

        def configure_model(self):
            if isinstance(self.net, torch.nn.Identity):
                self.net = make_bert(layers=2)

    class AtSetup(Late):
        configure_model = LightningModule.configure_model

        def setup(self, stage):
            Late.configure_model(self)

    for kind in (Late, AtSetup):
        _, trainer = fit(tmp_path, loader(4), module=kind())
        assert GAP in trainer.callback_metrics


def test_no_model_and_a_wrong_choice(tmp_path):
    module = Module(net=torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"Module holds 0 Hugging Face models: none\. Name the one"):
        fit(tmp_path, loader(4), module=module)
    with pytest.raises(InputError, match=r"model=\.\.\.\) gave NoneType"):
        fit(tmp_path, loader(4), probe=AttributionCallback(model=lambda module: None))


def test_frozen_parts_and_eval_mode_keep_their_flags(tmp_path):
    module = Module()
    module.net.bert.embeddings.requires_grad_(False)
    module.net.bert.encoder.layer[0].eval()
    module.net.bert.encoder.layer[0].requires_grad_(False)
    flags = lambda: [(part.training, [p.requires_grad for p in part.parameters()]) for part in module.net.modules()]
    before = flags()
    _, trainer = fit(tmp_path, loader(4), module=module, max_epochs=2)
    assert flags() == before and all(p.grad is None for p in module.net.bert.embeddings.parameters())
    assert trainer.callback_metrics[f"{PREFIX}/failed"] == 0


def test_a_callback_used_for_a_second_training_follows_its_model(tmp_path):
    probe = AttributionCallback(num_samples=3, every_n_epochs=2, **STEPS)
    fit(tmp_path, loader(4), probe=probe, max_epochs=4)
    module = Module()
    _, trainer = fit(tmp_path, loader(4), probe=probe, module=module, max_epochs=2)
    assert GAP in trainer.callback_metrics and f"{PREFIX}/drift" not in trainer.callback_metrics
    assert probe._explainer.model.module is module.net


def test_bf16_mixed_explains_in_fp32_and_leaves_the_weights_alone(tmp_path):
    ends = []
    for callbacks in ([], [AttributionCallback(num_samples=4, **STEPS)]):
        seed_everything(0, verbose=False)
        module = Module()
        trainer = make_trainer(1, tmp_path, callbacks, precision="bf16-mixed", max_epochs=2)
        trainer.fit(module, loader(6, shuffle=True), loader(5))
        ends.append(weights(module))
    assert torch.equal(*ends)
    module.net.eval()
    seed_everything(0, verbose=False)
    exact = make_trainer(1, tmp_path, [AttributionCallback(num_samples=4, **STEPS)])
    exact.validate(module, loader(5), verbose=False)
    assert exact.callback_metrics[GAP] == trainer.callback_metrics[GAP]


def test_half_precision_weights_are_said_to_be_coarse(tmp_path):
    with pytest.warns(UserWarning, match="parameters are bfloat16.*bf16-mixed"):
        _, trainer = fit(tmp_path, loader(4), precision="bf16-true")
    assert f"{PREFIX}/failed" in trainer.callback_metrics


def test_the_script_of_the_docs_runs_and_is_short(tmp_path, monkeypatch, capsys):
    path = Path(__file__).resolve().parents[1] / "docs" / "foreign_project.py"
    assert len(path.read_text().splitlines()) <= 60
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert "val/explain/ca_lig/completeness_gap" in out and "val/explain/ca_lig/drift" in out
