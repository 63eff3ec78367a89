from types import SimpleNamespace

import pytest
import torch

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import PerturbationTokens, Request, perturbed_logits
from calig.pipeline.metrics.operators import perturb_text

PAD, MASK, BOS, CLS, SEP = 0, 1, 2, 3, 4
TOKENS = PerturbationTokens(pad_id=PAD, mask_id=MASK, empty_id=BOS)


def padded(texts, left=0, right=0, types=False):
    """Pad texts: the batch, special and mask. CLS and SEP are special."""
    width = max(map(len, texts)) + right
    ids = torch.tensor([[PAD] * left + text + [PAD] * (width - len(text)) for text in texts])
    batch = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if types:
        batch["token_type_ids"] = (ids > 20).long()
    return batch, (ids == CLS) | (ids == SEP), ids != PAD


def keeping(batch, kept_ids):
    return torch.isin(batch["input_ids"], torch.tensor(kept_ids))


class Counting:
    """A forward that records what it is fed and returns the tokens it sees, one column each."""

    def __init__(self, vocabulary=64):
        self.batches, self.vocabulary = [], vocabulary

    def __call__(self, batch):
        assert torch.is_inference_mode_enabled()
        self.batches.append({key: value.clone() for key, value in batch.items()})
        position = torch.arange(1, batch["input_ids"].shape[1] + 1)
        seen = torch.zeros(len(batch["input_ids"]), self.vocabulary)
        return seen.scatter_add_(1, batch["input_ids"], (position * batch["attention_mask"]).float())


def test_operators_on_one_text():
    batch, special, mask = padded([[CLS, 10, 11, 12, SEP, 21, SEP]], right=2, types=True)
    keep = keeping(batch, [10, 21])[[0, 0, 0]]
    rows, lengths = perturb_text(
        batch, [0, 0, 0], keep, ["mask", "delete", "attention"], tokens=TOKENS, special=special, mask=mask
    )
    assert lengths.tolist() == [7, 5, 7]
    assert rows["input_ids"].tolist() == [
        [CLS, 10, MASK, MASK, SEP, 21, SEP, PAD, PAD],
        [CLS, 10, SEP, 21, SEP, PAD, PAD, PAD, PAD],
        [CLS, 10, 11, 12, SEP, 21, SEP, PAD, PAD],
    ]
    assert rows["attention_mask"].tolist() == [[1] * 7 + [0, 0], [1] * 5 + [0] * 4, [1, 1, 0, 0, 1, 1, 1, 0, 0]]
    assert rows["token_type_ids"].tolist() == [
        [0, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0, 0, 0],
        [0] * 5 + [1] + [0] * 3,
    ]
    assert batch["input_ids"].tolist() == [[CLS, 10, 11, 12, SEP, 21, SEP, PAD, PAD]]


@pytest.mark.parametrize("operator", ["mask", "delete", "attention"])
def test_all_kept_is_the_input_and_special_tokens_are_never_touched(operator):
    batch, special, mask = padded([[CLS, 10, 11, SEP]])
    given = {"tokens": TOKENS, "special": special, "mask": mask}
    rows, _ = perturb_text(batch, [0], torch.ones(1, 4).bool(), [operator], **given)
    assert all(torch.equal(rows[key], batch[key]) for key in batch)
    rows, lengths = perturb_text(batch, [0], torch.zeros(1, 4).bool(), [operator], **given)
    removed = {"mask": [CLS, MASK, MASK, SEP], "delete": [CLS, SEP], "attention": [CLS, 10, 11, SEP]}[operator]
    assert rows["input_ids"][0, : lengths[0]].tolist() == removed
    assert (rows["attention_mask"][0, [0, lengths[0] - 1]] == 1).all()


@pytest.mark.parametrize("operator", ["delete", "attention"])
def test_nothing_kept_feeds_one_token(operator):
    batch, special, mask = padded([[10, 11, 12], [10, 11]], types=True)
    given = {"special": special, "mask": mask}
    keep = torch.zeros(2, 3).bool()
    keep[1] = torch.tensor([False, False, True])  # padding that is "kept" is still nothing
    rows, lengths = perturb_text(batch, [0, 1], keep, [operator] * 2, tokens=TOKENS, **given)
    assert lengths.tolist() == [1, 1]
    assert rows["input_ids"].tolist() == [[BOS, PAD, PAD]] * 2
    assert rows["attention_mask"].tolist() == [[1, 0, 0]] * 2
    with pytest.raises(InputError, match="neither a bos nor an eos"):
        perturb_text(batch, [0, 1], keep, [operator] * 2, tokens=PerturbationTokens(pad_id=PAD), **given)


def test_attention_ends_at_the_last_kept_token():
    batch, special, mask = padded([[10, 11, 12, 13]])
    keep = keeping(batch, [10, 12])
    rows, lengths = perturb_text(batch, [0], keep, ["attention"], tokens=TOKENS, special=special, mask=mask)
    assert lengths.tolist() == [3]
    assert rows["input_ids"].tolist() == [[10, 11, 12, PAD]]
    assert rows["attention_mask"].tolist() == [[1, 0, 1, 0]]


def test_identical_inputs_run_once():
    batch, special, mask = padded([[CLS, 10, 11, 12, SEP], [CLS, 10, 13, SEP], [CLS, 10, 11, 12, SEP]])
    every, none = torch.ones(5).bool(), torch.zeros(5).bool()
    requests = [
        *(Request(b, every, operator) for operator in ("mask", "delete", "attention") for b in (0, 1, 2)),  # 2 texts
        *(Request(b, none, "delete") for b in (0, 1, 2)),  # CLS SEP: 1 text
        *(Request(b, none, "mask") for b in (0, 1, 2)),  # of 5 and of 4 tokens: 2 texts
        *(Request(b, keeping(batch, [10])[b], "delete") for b in (0, 1, 2)),  # CLS 10 SEP: 1 text
        *(Request(b, keeping(batch, [10])[b], "attention") for b in (0, 1, 2)),  # 2 texts
    ]
    forward = Counting()
    logits = perturbed_logits(forward, batch, requests, tokens=TOKENS, special=special, mask=mask)
    assert sum(len(fed["input_ids"]) for fed in forward.batches) == 2 + 1 + 2 + 1 + 2
    one_by_one = [
        perturbed_logits(Counting(), batch, [request], tokens=TOKENS, special=special, mask=mask)
        for request in requests
    ]
    assert torch.equal(logits, torch.cat(one_by_one))
    assert not logits.is_inference()


def test_batches_are_sorted_and_within_the_budget():
    texts = [[CLS, *range(5, 5 + n), SEP] for n in (1, 20, 3, 3, 9, 2, 8, 1)]
    batch, special, mask = padded(texts, right=5)
    requests = [Request(b, torch.ones(mask.shape[1]).bool()) for b in range(len(texts))]
    forward = Counting()
    logits = perturbed_logits(forward, batch, requests, tokens=TOKENS, special=special, mask=mask, token_budget=20)
    shapes = [tuple(fed["input_ids"].shape) for fed in forward.batches]
    widths = [length for _, length in shapes]
    assert widths == sorted(widths, reverse=True) and widths[0] == 22
    assert all(n * length <= 20 or n == 1 for n, length in shapes)
    for b, text in enumerate(texts):
        assert logits[b].nonzero().flatten().tolist() == sorted(text)


@pytest.mark.parametrize(("left", "right"), [(0, 6), (4, 0), (2, 3)])
def test_the_padding_does_not_matter(left, right):
    texts = [[CLS, 10, 11, 12, SEP], [CLS, 22, SEP]]
    outputs = []
    for pads in ({}, {"left": left, "right": right}):
        batch, special, mask = padded(texts, types=True, **pads)
        keep = keeping(batch, [11, 22])
        requests = [Request(b, keep[b], operator) for b in (0, 1) for operator in ("mask", "delete", "attention")]
        forward = Counting()
        outputs.append(perturbed_logits(forward, batch, requests, tokens=TOKENS, special=special, mask=mask))
        for fed in forward.batches:  # on the right, and only keys of the batch
            assert set(fed) == set(batch)
            assert (fed["input_ids"][:, 0] == CLS).all()
    assert torch.equal(*outputs)


def test_only_the_keys_and_dtypes_of_the_batch_are_fed():
    batch, special, mask = padded([[CLS, 10, SEP]])
    batch = {"input_ids": batch["input_ids"].int(), "attention_mask": batch["attention_mask"].bool()}
    seen = []

    def forward(fed):
        seen.append({key: value.dtype for key, value in fed.items()})
        return fed["input_ids"].float()

    perturbed_logits(forward, batch, [Request(0, torch.ones(3))], tokens=TOKENS, special=special, mask=mask)
    assert seen == [{"input_ids": torch.int32, "attention_mask": torch.bool}]
    given = {"tokens": TOKENS, "special": special, "mask": mask}
    with pytest.raises(InputError, match="position_ids"):
        perturbed_logits(forward, batch | {"position_ids": special}, [Request(0, torch.ones(3))], **given)
    with pytest.raises(InputError, match="attention_mask"):
        perturbed_logits(forward, {"input_ids": special}, [Request(0, torch.ones(3))], **given)
    with pytest.raises(InputError, match="empty"):
        perturbed_logits(forward, batch, [], **given)
    with pytest.raises(InputError, match="expected logits"):
        perturbed_logits(lambda fed: torch.zeros(1), batch, [Request(0, torch.ones(3))], **given)
    with pytest.raises(InputError, match="do not fit"):
        perturbed_logits(forward, batch, [Request(0, torch.ones(4))], **given)
    with pytest.raises(InputError, match="Did you mean 'delete'"):
        perturbed_logits(forward, batch, [Request(0, torch.ones(3), "delet")], **given)


def tokenizer(**ids):
    names = ("pad", "mask", "unk", "bos", "eos", "cls", "sep")
    return SimpleNamespace(**{f"{name}_token_id": ids.get(name) for name in names})


def test_tokens_of_the_families():
    bert = PerturbationTokens.from_tokenizer(tokenizer(pad=0, mask=103, unk=100, cls=101, sep=102))
    assert bert == PerturbationTokens(pad_id=0, mask_id=103, empty_id=None)
    llama = PerturbationTokens.from_tokenizer(tokenizer(pad=2, unk=0, bos=1, eos=2))
    assert llama == PerturbationTokens(pad_id=2, mask_id=0, empty_id=1)
    gpt2 = PerturbationTokens.from_tokenizer(tokenizer(pad=7, unk=7, bos=7, eos=7))
    assert gpt2 == PerturbationTokens(pad_id=7, mask_id=None, empty_id=7)
    t5 = PerturbationTokens.from_tokenizer(tokenizer(pad=0, unk=2, eos=1))
    assert t5 == PerturbationTokens(pad_id=0, mask_id=2, empty_id=1)
    with pytest.raises(InputError, match="Use the operator 'delete'"):
        gpt2.check("mask")
    gpt2.check("delete")
    with pytest.raises(InputError, match="no pad token"):
        PerturbationTokens.from_tokenizer(tokenizer(unk=1))


def test_tokens_of_a_real_tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<unk>": 1, "<eos>": 2, "a": 3}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    real = PreTrainedTokenizerFast(tokenizer_object=base, **names)
    assert PerturbationTokens.from_tokenizer(real) == PerturbationTokens(pad_id=0, mask_id=1, empty_id=2)


def tiny(family):
    import transformers

    torch.manual_seed(0)
    if family == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, pad_token_id=PAD, num_labels=3
        )
        return transformers.GPT2ForSequenceClassification(config).eval()
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["intermediate_size"] = 32
    if family == "bert":
        config = transformers.BertConfig(**sizes, pad_token_id=PAD, num_labels=3)
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.RobertaConfig(**sizes, pad_token_id=PAD, num_labels=3)
        model = transformers.RobertaForSequenceClassification(config)
    for parameter in model.parameters():  # larger than at initialisation, so that logits differ
        parameter.data.mul_(4)
    return model.eval()


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("operator", ["mask", "delete", "attention"])
def test_transformers_agree_with_one_unpadded_text_at_a_time(family, operator):
    model = tiny(family)
    edges = ([CLS], [SEP]) if family != "gpt2" else ([], [])
    texts = [edges[0] + list(range(5, 5 + n)) + edges[1] for n in (6, 2, 11)]
    batch, special, mask = padded(texts, right=3)
    generator = torch.Generator().manual_seed(1)
    requests = [
        Request(b, torch.rand(mask.shape[1], generator=generator) < 0.6, operator) for b in range(3) for _ in range(6)
    ]

    def forward(fed):
        return model(**fed).logits

    logits = perturbed_logits(forward, batch, requests, tokens=TOKENS, special=special, mask=mask, token_budget=64)
    for request, got in zip(requests, logits, strict=True):
        text = texts[request.example]
        kept = [bool(request.keep[i]) or token in (CLS, SEP) for i, token in enumerate(text)]
        ids, attention, read = text, [1] * len(text), len(text) - 1
        if operator == "mask":
            ids = [token if stays else MASK for token, stays in zip(text, kept, strict=True)]
        elif not any(kept):
            ids, attention, read = [BOS], [1], 0
        elif operator == "delete":
            ids = [token for token, stays in zip(text, kept, strict=True) if stays]
            attention, read = [1] * len(ids), len(ids) - 1
        else:
            attention, read = [int(stays) for stays in kept], max(i for i, stays in enumerate(kept) if stays)
        fed = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([attention])}
        with torch.no_grad():
            want = model(**fed).logits[0]
            if family == "gpt2":  # read out by hand at the last kept position of the whole text
                want = model.score(model.transformer(**fed)[0])[0, read]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
