"""Texts longer than the model's window: cut into overlapping windows of whole frames, and put into batches."""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

from calig.datamodules.collate import TextCollator
from calig.datamodules.examples import TextExample
from calig.datamodules.text import TextDataModule
from calig.datamodules.tokenization import encode, encode_all, train_wordpiece
from calig.datamodules.windows import WindowSettings, places
from calig.pipeline.config import ColumnsConfig, DataConfig, WindowsConfig
from calig.pipeline.errors import InputError

WORDS = [f"w{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([" ".join(WORDS)], 200)


def sentence(count):
    return " ".join(WORDS[i % len(WORDS)] for i in range(count))


@pytest.mark.parametrize("special", [0, 1, 2, 3])
@pytest.mark.parametrize(("length", "overlap"), [(8, 0), (8, 1), (8, 4), (16, 12)])
def test_windows_cover_a_text_are_full_and_share_the_overlap(length, overlap, special):
    settings = WindowSettings(length, overlap)
    room = length - special
    for count in range(1, 60):
        spans = settings.spans(1, 1 + count, special)
        held = {position for start, stop in spans for position in range(start, stop)}
        assert held == set(range(1, 1 + count))
        if len(spans) == 1:
            assert count <= room
            continue
        assert all(stop - start == room for start, stop in spans)
        steps = [b[0] - a[0] for a, b in itertools.pairwise(spans)]
        assert set(steps[:-1]) <= {room - overlap} and 1 <= steps[-1] <= room - overlap
        # As few as will do: without the last, something would be missing.
        assert spans[-2][1] < 1 + count


def test_a_limit_holds_exactly_as_many_windows():
    settings = WindowSettings(10, 3, limit=4)
    assert len(settings.spans(0, settings.longest(0), 0)) == 4
    assert len(settings.spans(0, settings.longest(0) + 1, 0)) == 5
    assert WindowSettings(10, 3).longest(2) is None


def test_a_text_keeps_all_its_tokens_and_knows_its_windows(tokenizer):
    example = TextExample(0, sentence(20), 1)
    plain = encode(example, tokenizer, 512)
    row = encode(example, tokenizer, 9, WindowSettings(9, 2))
    assert {key: row[key] for key in plain} == plain
    assert row["windows"] == [(1, 8), (6, 13), (11, 18), (14, 21)]
    for position, (start, end) in enumerate(zip(row["char_start"], row["char_end"], strict=True)):
        if row["special_tokens_mask"][position]:
            assert start == end == -1
        else:
            token = tokenizer.convert_ids_to_tokens(row["input_ids"][position]).removeprefix("##")
            assert example.text[start:end] == token
    short = encode(TextExample(0, sentence(5), 1), tokenizer, 9, WindowSettings(9, 2))
    assert short["windows"] == [(1, 6)]


def test_what_lies_behind_the_last_window_is_cut_off_and_counted(tokenizer):
    marks = [0] * 17 + [1] * 3
    example = TextExample(0, sentence(20).split(), 1, rationale=marks)
    row = encode(example, tokenizer, 9, WindowSettings(9, 2, limit=2))
    assert row["windows"] == [(1, 8), (6, 13)]
    assert (row["truncated"], row["tokens_cut"], row["rationale_missed"]) == (True, 8, 3)
    whole = encode(example, tokenizer, 9, WindowSettings(9, 2, limit=4))
    assert (whole["truncated"], whole["tokens_cut"], whole["rationale_missed"]) == (False, 0, 0)
    assert sum(mark == 1 for mark in whole["rationale"]) == 3


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_hold_what_each_window_alone_would_be(tokenizer, side):
    texts = [sentence(20), sentence(3), sentence(9)]
    settings = WindowSettings(9, 2)
    rows = list(encode_all([TextExample(i, text, 0) for i, text in enumerate(texts)], tokenizer, 9, settings))
    batch = TextCollator(tokenizer.pad_token_id, side)(rows)
    assert batch["windows"].shape == (3, 4, 9)
    for row, text in enumerate(texts):
        words = text.split()
        for number, (start, stop) in enumerate(rows[row]["windows"]):
            alone = tokenizer(" ".join(words[start - 1 : stop - 1]))["input_ids"]
            chosen = batch["windows"][row, number]
            real = chosen[chosen >= 0]
            assert batch["input_ids"][row, real].tolist() == alone
            assert batch["attention_mask"][row, real].all()
        assert (batch["windows"][row, len(rows[row]["windows"]) :] == -1).all()
    assert batch["char_start"].shape == batch["input_ids"].shape


def test_a_tokenizer_without_special_tokens_frames_nothing(tokenizer):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.Sequence([])
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    row = encode(TextExample(0, sentence(10), 0), plain, 4, WindowSettings(4, 1))
    assert not any(row["special_tokens_mask"]) and len(row["input_ids"]) == 10
    assert row["windows"] == [(0, 4), (3, 7), (6, 10)]
    assert places(row["windows"], 10) == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


def test_what_cannot_be_cut_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"data.windows.overlap=7 leaves no step.*7 tokens beside its 2 special ones"):
        encode(TextExample(0, sentence(20), 0), tokenizer, 9, WindowSettings(9, 7))
    with pytest.raises(InputError, match="windows are cut from one text"):
        encode(TextExample(0, "wa", 0, "wb"), tokenizer, 9, WindowSettings(9, 2))
    with pytest.raises(InputError, match="sample 3: the tokenizer finds no token"):
        encode(TextExample(3, "\u200b", 0), tokenizer, 9, WindowSettings(9, 2))


def test_the_data_module_reads_windows_and_says_so(tmp_path, tokenizer):
    lines = [f"{' '.join((WORDS * 2)[i % 26 :][: 4 + 5 * (i % 4)])}\t{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "\n".join(lines))

    def module(**windows):
        config = DataConfig(path=str(tmp_path / "train.tsv"), max_length=9, columns=ColumnsConfig(), batch_size=4,
                            windows=WindowsConfig(**windows))  # fmt: skip
        return TextDataModule(config, BertTokenizer(vocab=tokenizer.get_vocab()))

    data = module(overlap=2, limit=2)
    data.setup()
    assert "20 of 40 texts truncated at 2 windows of 9 tokens (1.8 on average)" in data.describe()
    batch = next(iter(data.train_dataloader()))
    assert batch["windows"].ndim == 3 and batch["windows"].shape[0] == 4
    assert data.truncation()["train"].truncated > 0
    truncating = module()
    truncating.setup()
    assert "windows" not in next(iter(truncating.train_dataloader()))
    assert "truncated at 9 tokens" in truncating.describe()
    with pytest.raises(InputError, match="leaves no step"):
        module(overlap=8).setup()
    assert torch.equal(batch["windows"][:, 0, 0], torch.zeros(4, dtype=torch.long))
