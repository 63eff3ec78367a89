"""Somebody's own Lightning project: own module, own dataset, and explanations from one callback. Runs offline."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForSequenceClassification

from calig.callbacks import AttributionCallback

WORDS = ["[PAD]", "[CLS]", "[SEP]", "the", "film", "plot", "cast", "is", "was", "good", "great", "bad", "dull"]


class Reviews(Dataset):
    """Sentences of five words; the last word decides the label."""

    def __init__(self, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        columns = [torch.randint(low, high, (count,), generator=draw) for low, high in ((4, 7), (7, 9), (9, 13))]
        self.rows = torch.stack(columns, dim=1).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([1, 3, *self.rows[index], 2])
        special = torch.tensor([1, 0, 0, 0, 0, 1])  # instead of a tokenizer, which would name them
        label = (ids[4] <= 10).long()
        return {"input_ids": ids, "attention_mask": ids.ne(0), "special_tokens_mask": special, "label": label}


class Sentiment(LightningModule):
    """As in any tutorial; nothing in it knows of calig."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        self.encoder = BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), num_labels=2, **size))

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Loss of a batch."""
        return self.encoder(batch["input_ids"], batch["attention_mask"], labels=batch["label"]).loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Loss of a batch."""
        self.log("val/loss", self.training_step(batch, batch_idx), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    seed_everything(0)
    explain = AttributionCallback(method="ca_lig", num_samples=16, label_names=["bad", "good"], folder="explanations")
    trainer = Trainer(max_epochs=3, accelerator="cpu", callbacks=[explain], logger=False, enable_checkpointing=False)
    trainer.fit(Sentiment(), DataLoader(Reviews(512, 0), 32, shuffle=True), DataLoader(Reviews(64, 1), 32))
    for key, value in sorted(trainer.callback_metrics.items()):
        print(f"{key:60s} {float(value):.3f}")
