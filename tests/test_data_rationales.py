"""Spans of words and of characters, from the file to the tokens."""

import json

import pytest
from test_data_sources import columns, settings, write_jsonl
from transformers import GPT2Tokenizer

from calig.datamodules.columns import read_texts
from calig.datamodules.examples import TextExample
from calig.datamodules.readers import read_file
from calig.datamodules.text import TextDataModule
from calig.datamodules.tokenization import encode, train_wordpiece
from calig.pipeline.errors import InputError

TEXT = "An utterly wonderful film, sadly short"


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([TEXT], vocab_size=400, max_length=32)


def read(tmp_path, *records, named=None):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return read_texts(read_file(path), columns(rationale=named))


def test_spans_of_words(tmp_path):
    words = ["a", "good", "film", "indeed"]
    found = read(
        tmp_path,
        {"text": words, "rationale": [[3, 4], [1, 2]]},
        {"text": words, "rationale": []},
        {"text": words, "rationale": None},
        {"text": words, "rationale": "[[0, 2], [2, 3]]"},
        {"text": words, "rationale": [0, 0, 1, 0]},
    )
    assert found.rationales == [[0, 1, 0, 1], [0, 0, 0, 0], None, [1, 1, 1, 0], [0, 0, 1, 0]]
    assert found.spans == [None] * 5


def test_spans_of_characters_leave_strings_as_they_are(tmp_path):
    found = read(
        tmp_path,
        {"text": TEXT, "rationale": [[27, 32], [3, 20]]},
        {"text": "two  words", "rationale": None},
        {"text": "two words", "rationale": []},
        {"text": ["a", "list"], "rationale": [[1, 2]]},
    )
    assert found.texts[:2] == [TEXT, "two  words"] and found.rationales == [None, None, None, [0, 1]]
    assert found.spans == [[(3, 20), (27, 32)], None, [], None]


@pytest.mark.parametrize(
    ("text", "rationale", "message"),
    [
        (["a", "b"], [[0, 3]], r"row 1 of .*\[0, 3\) is out of range: the text has 2 words"),
        (["a", "b"], [[-1, 1]], r"out of range"),
        (["a", "b"], [[1, 1]], r"span \[1, 1\) is empty"),
        (["a", "b", "c"], [[1, 3], [0, 2]], r"spans \[0, 2\) and \[1, 3\) overlap. Merge"),
        ("a good film", [[2, 12]], r"row 1 of .*\[2, 12\) is out of range: the text has 11 characters"),
        ("a good film", [[2, 6], [4, 8]], r"overlap"),
        ("a good film", [[1, 2]], r"covers nothing but white space"),
        ("a good film", [[2, 6, 7]], r"not a rationale.*of characters where it is a string"),
        (["a", "b"], [0, 1, 1], r"rationale has 3 entries, the text 2 words"),
        ("a good film", [2, 6], r"not a rationale"),
    ],
)
def test_spans_that_do_not_fit(tmp_path, text, rationale, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, {"text": text, "rationale": rationale}, named="rationale")


def test_a_column_of_characters_and_marks_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"row 2 of .*Other rows of the column hold spans of characters"):
        read(tmp_path, {"text": "a good film", "rationale": [[2, 6]]}, {"text": "a b", "rationale": [0, 1]})


def test_characters_mark_the_words_of_the_tokenizer(tokenizer):
    spans = [(5, 20), (25, 26)]  # from inside "utterly" to the end of "wonderful", and the comma
    row = encode(TextExample(0, TEXT, 1, spans=spans), tokenizer, 32)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[1:-1] == TEXT.lower().replace(",", " ,").split()
    assert row["rationale"] == [-1, 0, 1, 1, 0, 1, 0, 0, -1] and row["rationale_missed"] == 0
    cut = encode(TextExample(0, TEXT, 1, spans=spans), tokenizer, 5)
    assert cut["rationale"] == [-1, 0, 1, 1, -1] and (cut["rationale_missed"], cut["tokens_cut"]) == (1, 4)
    assert encode(TextExample(0, TEXT, 1, spans=[]), tokenizer, 5)["rationale"] == [-1, 0, 0, 0, -1]


def test_pieces_of_one_word_are_marked_together():
    gpt2 = GPT2Tokenizer().train_new_from_iterator([["an utterly"]], 300, show_progress=False)
    text = "日本 wonderful film"
    row = encode(TextExample(0, text, 1, spans=[(4, 6)]), gpt2, 64)
    marked = [token for token, mark in zip(row["input_ids"], row["rationale"], strict=True) if mark]
    assert gpt2.decode(marked).strip() == "wonderful"
    # The space before a word belongs to its token, not to the rationale.
    row = encode(TextExample(0, text, 1, spans=[(0, 3)]), gpt2, 64)
    marked = [token for token, mark in zip(row["input_ids"], row["rationale"], strict=True) if mark]
    assert gpt2.decode(marked) == "日本"


def test_tokens_cut_of_pairs_are_counted_once(tokenizer):
    words = TEXT.lower().replace(",", "").split()
    example = TextExample(0, words, 0, text_pair=words)
    row = encode(example, tokenizer, 9)
    assert row["special_tokens_mask"].count(0) + row["tokens_cut"] == 2 * len(words)
    assert encode(example, tokenizer, 32)["tokens_cut"] == 0


def test_from_file_to_batch(tmp_path):
    rows = [{"text": f"{TEXT} {i}", "label": i % 2, "rationale": [[3, 20]] if i % 2 else None} for i in range(20)]
    data = TextDataModule(settings(path=write_jsonl(tmp_path / "x.jsonl", rows)), vocab_size=400)
    data.setup()
    for batch in data.train_dataloader():
        for marks, label in zip(batch["rationale"], batch["labels"], strict=True):
            assert (marks == 1).sum() == (2 if label else 0)
    assert "10 texts with rationale" in data.describe()
