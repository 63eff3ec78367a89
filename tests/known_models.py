"""Models whose true relevance is known by construction, and what measures them; shared by the tests of the metrics."""

import random

import torch
from transformers import BertConfig, BertForSequenceClassification

from calig.pipeline.metrics import PerturbationTokens, faithfulness_rows

PAD, MASK, BOS, CLS, SEP, VOCABULARY = 0, 1, 2, 3, 4, 50
TOKENS = PerturbationTokens(pad_id=PAD, mask_id=MASK, empty_id=BOS)


def bag_of_words(seed=0, scale=0.4):
    """A linear model: the logits are the sum of one vector per visible token; MASK and special tokens say nothing."""
    weight = torch.randn(VOCABULARY, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.double) * scale
    weight[:5] = 0

    def forward(batch):
        return (weight[batch["input_ids"]] * batch["attention_mask"].unsqueeze(-1)).sum(1)

    return forward, weight


def texts(lengths, seed=0):
    draw = random.Random(seed)
    return [[CLS, *(draw.randrange(5, VOCABULARY) for _ in range(n)), SEP] for n in lengths]


def collate(rows, extra=0):
    width = max(map(len, rows)) + extra
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = ids != PAD
    return {"input_ids": ids, "attention_mask": mask.long()}, (ids == CLS) | (ids == SEP), mask


def measure(forward, rows, scores, target, ids=None, extra=0, **options):
    batch, special, mask = collate(rows, extra)
    width = mask.shape[1]
    scores = {m: torch.stack([torch.nn.functional.pad(s, (0, width - len(s))) for s in v]) for m, v in scores.items()}
    return faithfulness_rows(
        forward,
        batch,
        scores,
        target=torch.as_tensor(target),
        special=special,
        mask=mask,
        sample_ids=list(range(len(rows))) if ids is None else ids,
        tokens=TOKENS,
        **options,
    )


def table(rows):
    return {tuple(row[name] for name in list(row)[:-1]): row["value"] for row in rows}


def two_class_bag(seed=0):
    """A linear model of two classes: class 1 has the sum of one number per visible token, class 0 nothing.

    Every function of the logits of class 1, and so its probability and the prediction, falls with that sum: the true
    relevance, the number of a token, is the best ranking for every metric, and its reversal the worst.
    """
    forward, weight = bag_of_words(seed, scale=0.6)
    weight[:, 0] = 0

    def two_classes(batch):
        return forward(batch)[:, :2]

    return two_classes, weight[:, 1]


KEY, SECOND = 20, 21


def planted_bert():
    """A BERT with weights set by hand: class 1 where it sees the token KEY, and more so where it sees SECOND, too.

    Word vectors are rows of a 4 x 4 Hadamard matrix, so a LayerNorm leaves them as they are: one row is every ordinary
    token, one KEY, one SECOND. One head attends to KEY alone, the other to SECOND alone, each writes its key's row into
    all positions, and the head of the model reads the rows at [CLS]. True relevance: KEY above SECOND above nothing.
    """
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=64,
        pad_token_id=PAD,
        num_labels=2,
        layer_norm_eps=1e-12,
    )
    model = BertForSequenceClassification(config).eval()
    ordinary, key, second = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "LayerNorm.weight" in name else 0.0)
        words = model.bert.embeddings.word_embeddings.weight
        words[:] = ordinary
        words[KEY], words[SECOND] = key, second
        attention = model.bert.encoder.layer[0].attention
        attention.self.query.bias[[0, 2]] = 60.0
        for part in (attention.self.key, attention.self.value):
            part.weight[0], part.weight[2] = key / 4, second / 4  # 1 at the head's own token, 0 at all others
        attention.output.dense.weight[:, 0], attention.output.dense.weight[:, 2] = key, second
        model.bert.pooler.dense.weight[0], model.bert.pooler.dense.weight[1] = key / 4, second / 4
        model.classifier.weight[1, 0], model.classifier.weight[1, 1] = 2.0, 0.6
        model.classifier.bias[1] = -0.8

    def forward(batch):
        return model(**batch).logits

    return forward
