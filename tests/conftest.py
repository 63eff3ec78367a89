"""Small random models and batches that the tests share, and a guard on what a test may leave behind."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Of processes that tests start. A pool of threads does not outlive a fork: a child that computes would wait for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

torch.set_num_threads(1)


def make_bert(layers=3, *, seed=0, classes=3, spread=0.3, attention="sdpa", dtype=torch.float32):
    """A random BERT whose weights are spread enough that attention is not uniform."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=48,
        max_position_embeddings=40,
        initializer_range=spread,
        pad_token_id=0,
        num_labels=classes,
        attn_implementation=attention,
    )
    model = BertForSequenceClassification(config).to(dtype).eval()
    # A fresh head is the same small linear map everywhere: make its classes differ.
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    return model


def make_batch(lengths=(9, 6, 8), *, seed=0, width=None):
    """Token ids with [CLS]=1, [SEP]=2, padding 0 on the right, and the masks that go with them."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, 60, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = 1, 2
    mask = (ids != 0).long()
    special = ((ids == 1) | (ids == 2) | (ids == 0)).long()
    return {"input_ids": ids, "attention_mask": mask, "special_tokens_mask": special}


@pytest.fixture(scope="module")
def tab():
    """A tab of a real browser; only for tests that are skipped where there is none."""
    from browser import CHROMIUM, Page

    with Page(CHROMIUM) as page:
        yield page


@pytest.fixture
def bert():
    return make_bert()


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture(autouse=True)
def _no_leaks():
    """A test must not leak environment variables or bare module names (two module objects of one file)."""
    import sys

    before = dict(os.environ)
    yield
    bare = {"pipeline", "callbacks", "datamodules", "configs"} & set(sys.modules)
    assert not bare, f"bare modules were imported: {bare}; import calig.<name>"
    for key in set(os.environ) - set(before):
        del os.environ[key]
    os.environ.update(before)
