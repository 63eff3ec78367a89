"""Tokens as people spell them: blanks in front, several pieces, ids, and what is not in the vocabulary."""

import pytest
from language_models import byte_level_tokenizer, sentence_piece_tokenizer

from calig.datamodules.trained_tokenizers import train_tokenizer, train_wordpiece
from calig.pipeline.errors import InputError
from calig.pipeline.vocabulary import quoted, spelled_tokens, token_text

TEXTS = ["the plot is new", "Paris and London"]


@pytest.fixture(scope="module")
def byte_level():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def sentence_piece():
    return sentence_piece_tokenizer()


def named(tokenizer, spelling):
    return [tokenizer.convert_ids_to_tokens(token) for token in spelled_tokens(tokenizer, spelling)]


def test_a_blank_in_front_is_part_of_the_token(byte_level, sentence_piece):
    assert named(byte_level, "the") == ["Ġthe", "the"] and named(byte_level, " the") == ["Ġthe"]
    # Paris stands inside the texts only, so there is one token for it.
    assert named(byte_level, " Paris") == named(byte_level, "Paris") == ["ĠParis"]
    assert named(sentence_piece, "Paris") == ["▁Paris", "Paris"] and named(sentence_piece, " Paris") == ["▁Paris"]


def test_tokenizers_without_two_forms_of_a_word():
    assert named(train_wordpiece(TEXTS, 200), "plot") == ["plot"]
    assert named(train_tokenizer("byte_bpe", TEXTS * 5, 400), "plot") == ["Ġplot"]


def test_line_breaks_punctuation_special_tokens_and_ids(byte_level, sentence_piece):
    assert named(byte_level, "\n") == ["Ċ"] and named(sentence_piece, "\n") == ["<0x0A>"]
    assert named(byte_level, ",") == [","]
    assert named(byte_level, "<|endoftext|>") == ["<|endoftext|>"] and named(sentence_piece, "</s>") == ["</s>"]
    token = spelled_tokens(byte_level, " film")[0]
    assert spelled_tokens(byte_level, f"id:{token}") == spelled_tokens(byte_level, token) == [token]


def test_what_a_token_writes(byte_level, sentence_piece):
    for tokenizer in (byte_level, sentence_piece):
        for spelling in (" Paris", " the"):
            assert token_text(tokenizer, spelled_tokens(tokenizer, spelling)[0]) == spelling
    assert quoted(byte_level, spelled_tokens(byte_level, "\n")[0]) == '"\\n"'
    half = byte_level.get_vocab()["á"]  # the byte E1, which begins a character
    assert quoted(byte_level, half) == '"á"'


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("Parisian", ["'Parisian' is", 'tokens, " Paris" + "i" + "an"', "target ' Paris' asks for the first"]),
        ("", ["target is empty"]),
        ("id:", ["'id:' is no token id"]),
        ("id:9999", ["'id:9999' is no token id; the tokenizer has", "from id:0 to id:"]),
        (-1, ["-1 is no token id"]),
        (True, ["the text of a token or its id, got True"]),
        (0.5, ["got 0.5"]),
    ],
)
def test_what_is_no_token(byte_level, spelling, words):
    with pytest.raises(InputError) as error:
        spelled_tokens(byte_level, spelling)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_is_not_in_the_vocabulary():
    with pytest.raises(InputError, match=r"versus '日' is not in the model's vocabulary"):
        spelled_tokens(train_wordpiece(TEXTS, 200), "日", "versus")
    assert named(train_wordpiece(TEXTS, 200), "[UNK]") == ["[UNK]"]
