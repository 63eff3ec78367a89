"""Tokenisers trained here, and tokens that know their words."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer

from calig.datamodules.examples import TextExample
from calig.datamodules.tokenization import check_length, encode, encode_all, ensure_pad_token, train_wordpiece
from calig.pipeline.errors import InputError

TEXTS = ["the film was utterly wonderful , and i would watch it again", "the plot however made no sense at all"]
WORDS = ["the", "film", "was", "utterly", "wonderful"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(TEXTS, vocab_size=400, max_length=32)


@pytest.fixture(scope="module")
def gpt2():
    return GPT2Tokenizer().train_new_from_iterator([TEXTS], 300, show_progress=False)


def test_training_is_deterministic_in_and_between_processes():
    # 80 is too few for all merges, so that every tie counts; the library's own training differs from call to call.
    vocabularies = [train_wordpiece(TEXTS, 80).get_vocab() for _ in range(3)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2] and len(vocabularies[0]) == 80
    code = (
        "import json; from calig.datamodules.tokenization import train_wordpiece;"
        f"print(json.dumps(train_wordpiece({TEXTS!r}, 80).get_vocab()))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(child.stdout.splitlines()[-1]) == vocabularies[0]


def test_words_stay_whole_where_the_vocabulary_allows(tokenizer):
    assert tokenizer.tokenize(TEXTS[0]) == TEXTS[0].split()
    assert train_wordpiece([text.split() for text in TEXTS], 400).get_vocab() == tokenizer.get_vocab()
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert [vocabulary[t] for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == list(range(5))
    assert set(tokenizer.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}


def test_controlled_words_stay_whole():
    from calig.datamodules.controlled import generate

    examples = generate({"train": 300, "val": 20, "test": 20}, 0)["train"]
    tokenizer = train_wordpiece([e.text for e in examples], 4000)
    for example, row in zip(examples, encode_all(examples, tokenizer, 64), strict=True):
        assert tokenizer.convert_ids_to_tokens(row["input_ids"])[1:-1] == example.text
        assert row["rationale"][1:-1] == example.rationale and row["rationale_missed"] == 0


def test_tokenizer_round_trip(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast and loaded.model_max_length == 32 and loaded.get_vocab() == tokenizer.get_vocab()
    text = TextExample(0, "The plot, wonderfully unseen", 1)
    assert encode(text, loaded, 16) == encode(text, tokenizer, 16)


def test_vocabulary_below_the_alphabet_is_an_error():
    with pytest.raises(InputError, match=r"vocab_size=10 is too small.*at least"):
        train_wordpiece(TEXTS, 10)


def test_encode_a_list_of_words(tokenizer):
    row = encode(TextExample(7, [*WORDS, "zzz-wonderful"], 1, rationale=[0, 1, 0, 0, 1, 1]), tokenizer, 32)
    # The last word: one unknown piece, "-", "wonderful".
    assert row["word_ids"] == [-1, 0, 1, 2, 3, 4, 5, 5, 5, -1]
    assert row["rationale"] == [-1, 0, 1, 0, 0, 1, 1, 1, 1, -1]
    assert row["special_tokens_mask"] == [1, *[0] * 8, 1]
    assert (row["labels"], row["sample_id"], row["rationale_missed"], row["truncated"]) == (1, 7, 0, False)
    assert set(row) - set(tokenizer.model_input_names) == {
        *("special_tokens_mask", "word_ids", "rationale"),
        *("rationale_missed", "truncated", "tokens_cut", "labels", "sample_id"),
    }
    assert row["input_ids"] == tokenizer([*WORDS, "zzz-wonderful"], is_split_into_words=True)["input_ids"]


def test_encode_a_string(tokenizer):
    row = encode(TextExample(0, "the film, wonderful", None), tokenizer, 32)
    assert row["word_ids"] == [-1, 0, 1, 2, 3, -1]  # BERT makes a word of the comma
    assert row["rationale"] == [-1] * 6 and "labels" not in row


def test_truncation_counts_the_rationale_that_it_cut(tokenizer):
    example = TextExample(0, WORDS, 0, rationale=[0, 1, 0, 1, 1])
    assert encode(example, tokenizer, 7)["truncated"] is False
    row = encode(example, tokenizer, 5)
    assert row["truncated"] is True and row["word_ids"] == [-1, 0, 1, 2, -1] and row["rationale_missed"] == 2


def test_pairs_go_on_counting_words(tokenizer):
    row = encode(TextExample(0, WORDS[:2], 0, text_pair="the plot", rationale=[0, 1]), tokenizer, 32)
    assert row["word_ids"] == [-1, 0, 1, -1, 2, 3, -1]
    assert row["rationale"] == [-1, 0, 1, -1, -1, -1, -1]
    assert row["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    with pytest.raises(InputError, match="all of them one, or none"):
        list(encode_all([TextExample(0, "a", 0, text_pair="b"), TextExample(1, "a", 0)], tokenizer, 8))


def test_byte_level_tokenizer_needs_no_setting_for_words(gpt2):
    row = encode(TextExample(0, [*WORDS, "日本"], 1, rationale=[0, 0, 0, 0, 1, 1]), gpt2, 64)
    pieces = {word: [] for word in range(6)}
    for token, word in zip(row["input_ids"], row["word_ids"], strict=True):
        pieces[word].append(token)
    assert [gpt2.decode(tokens).strip() for tokens in pieces.values()] == [*WORDS, "日本"]
    assert "token_type_ids" not in row and 1 not in row["special_tokens_mask"]
    assert encode(TextExample(0, "the film", 1), gpt2, 64)["word_ids"][0] == 0


def test_tokenizer_without_words_of_its_own_counts_by_white_space():
    # SentencePiece in the style of Llama: the library says that the whole text is word 0.
    llama = LlamaTokenizer(
        vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6}, merges=[("▁", "a")]
    )
    row = encode(TextExample(0, "ab  b a", 1), llama, 64)
    body = [
        (token, word)
        for token, word in zip(llama.convert_ids_to_tokens(row["input_ids"]), row["word_ids"], strict=True)
        if word >= 0 and token != "▁"
    ]
    assert body == [("▁a", 0), ("b", 0), ("b", 1), ("▁a", 2)]


def test_pad_token_falls_back_to_eos(gpt2):
    assert gpt2.pad_token is None
    ensure_pad_token(gpt2)
    assert gpt2.pad_token_id == gpt2.eos_token_id is not None
    bare = GPT2Tokenizer()
    bare.eos_token = None
    with pytest.raises(InputError, match="neither a pad nor an eos token"):
        ensure_pad_token(bare)


def test_length_and_empty_texts(tokenizer, gpt2):
    with pytest.raises(InputError, match=r"data.max_length=64 is more than the 32 tokens"):
        check_length(tokenizer, 64)
    with pytest.raises(InputError, match=r"data.max_length=2 leaves no room"):
        check_length(tokenizer, 2)
    with pytest.raises(InputError, match=r"sample 4: the tokenizer finds no token"):
        encode(TextExample(4, "\u0000", 0), tokenizer, 8)
