"""Scripts and tokenizers beyond English: Ge'ez, code-mixed text, SentencePiece, bytes; words that come back whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_data_sources import columns, settings, write_jsonl
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2Tokenizer,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

from calig.datamodules.columns import unquoted
from calig.datamodules.examples import TextExample
from calig.datamodules.sources import load_corpus
from calig.datamodules.tokenization import encode, ensure_pad_token, longest_input
from calig.datamodules.trained_tokenizers import train_tokenizer
from calig.pipeline import explain
from calig.pipeline.config import ModelConfig, ScratchConfig
from calig.pipeline.errors import InputError
from calig.pipeline.explainer import Explainer, ExplainSettings
from calig.pipeline.models import load_model
from calig.pipeline.render.pieces import merge_pieces

AMHARIC = ["ሰላም ለዓለም ይሁን", "ይህ ፊልም በጣም ጥሩ ነው", "ይህ ፊልም መጥፎ ነው ።"]
MIXED = [*AMHARIC, "ይህ movie በጣም nice ነው 😀", "这部电影很好 ፊልም", "ọ̀rẹ́ mi dára", "한국어 영화", "@user ሰላም!! #ፊልም"]
AFRISENTI = Path(__file__).parents[2] / "shared" / "data" / "afrisenti_amh"


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return train_tokenizer("byte_bpe", MIXED, 400, 64)


@pytest.fixture(scope="module")
def sentence_pieces():
    """SentencePiece in the style of XLM-R: a unigram vocabulary with the mark of word beginnings."""
    pieces = ["▁ሰላም", "▁ይህ", "▁ፊ", "ልም", "▁በጣም", "▁ጥ", "ሩ", "▁ነው", "▁movie", "▁", "።", "መ", "ጥ", "ፎ", "s"]
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab = [*special, *((piece, -float(i)) for i, piece in enumerate(pieces, start=1)), ("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocab)


def words_of(tokenizer, text):
    """(word as it is shown, its number) of every word."""
    row = encode(TextExample(0, text, None), tokenizer, 64)
    ids = [None if word < 0 else word for word in row["word_ids"]]
    merged = merge_pieces(tokenizer.convert_ids_to_tokens(row["input_ids"]), None, ids)
    return [(word.text, word.word_id) for word in merged if not word.special]


# --- tokenizers trained here


@pytest.mark.parametrize("text", MIXED)
def test_bytes_know_every_script_and_give_it_back(bytes_tokenizer, text):
    unseen = f"{text} ጀግና Ñandú 🎬"
    ids = bytes_tokenizer(unseen)["input_ids"]
    assert bytes_tokenizer.unk_token_id not in ids
    assert bytes_tokenizer.decode(ids, skip_special_tokens=True).strip() == unseen
    shown = "".join(word for word, _ in words_of(bytes_tokenizer, unseen))
    assert shown == unseen.replace(" ", "")
    assert "�" not in shown, "no word is cut within a character"


def test_the_first_word_is_spelt_as_elsewhere(bytes_tokenizer):
    first, second = (bytes_tokenizer.tokenize(text) for text in ("ፊልም ነው", "ነው ፊልም"))
    assert sorted(first) == sorted(second) and first != second


def test_bytes_are_the_same_in_every_process_and_survive_saving(bytes_tokenizer, tmp_path):
    code = (
        "import json; from calig.datamodules.trained_tokenizers import train_tokenizer;"
        f"print(json.dumps(train_tokenizer('bytes', {MIXED!r}, 400, 64).get_vocab()))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(child.stdout.splitlines()[-1]) == bytes_tokenizer.get_vocab()
    bytes_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 64 and len(again) == len(bytes_tokenizer) <= 400
    for text in MIXED:
        assert again(text)["input_ids"] == bytes_tokenizer(text)["input_ids"]


def test_word_pieces_serve_geez_and_lose_what_they_say(tmp_path):
    pieces = train_tokenizer("wordpiece", MIXED, 800, 64)
    assert [word for word, _ in words_of(pieces, AMHARIC[1])] == AMHARIC[1].split()
    assert pieces.unk_token_id in pieces("ጀግና")["input_ids"], "a character of no training text"
    assert "".join(words_of(pieces, "ọ̀rẹ́")[0][0]) == "ore", "accents are taken off"
    with pytest.raises(InputError, match=r"vocab_size=200 is too small: a byte-level vocabulary holds all 256 bytes"):
        train_tokenizer("byte_bpe", MIXED, 200)


# --- SentencePiece


def test_words_across_sentence_pieces(sentence_pieces):
    assert words_of(sentence_pieces, "ይህ ፊልም በጣም ጥሩ ነው") == [
        *(("ይህ", 0), ("ፊልም", 1), ("በጣም", 2), ("ጥሩ", 3), ("ነው", 4)),
    ]
    # A lone mark before pieces that begin no word, and a character that is in no piece.
    assert [word for word, _ in words_of(sentence_pieces, "መጥፎ movies ሀ ነው")] == ["መጥፎ", "movies", "<unk>", "ነው"]
    marks = TextExample(0, ["ይህ", "ፊልም", "ጥሩ", "ነው"], 0, rationale=[0, 1, 1, 0])
    row = encode(marks, sentence_pieces, 32)
    assert row["word_ids"] == [-1, 0, 1, 1, 2, 2, 3, -1] and row["rationale"] == [-1, 0, 1, 1, 1, 1, 0, -1]
    spans = TextExample(0, "ይህ ፊልም ጥሩ ነው", 0, spans=[(3, 6)])
    assert encode(spans, sentence_pieces, 32)["rationale"] == [-1, 0, 1, 1, 0, 0, 0, -1]


def tiny_xlmr(tokenizer):
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=66,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "hate", 1: "normal"},
    )
    return XLMRobertaForSequenceClassification(config).eval()


def test_an_amharic_text_is_explained_word_by_word(sentence_pieces, bytes_tokenizer):
    text = "ይህ ፊልም በጣም ጥሩ ነው"
    for tokenizer in (sentence_pieces, bytes_tokenizer):
        explanation = explain(tiny_xlmr(tokenizer), [text], tokenizer=tokenizer, steps=32, target="hate")[0]
        assert explanation.text == text
        shown = [word for word in explanation.words if not word.special]
        assert [word.text for word in shown] == text.split()
        pieces = [
            score for score, word in zip(explanation.scores, explanation.word_ids, strict=True) if word is not None
        ]
        assert sum(word.score for word in shown) == pytest.approx(sum(pieces), abs=1e-5)
        assert explanation.completeness_gap < 0.1
        assert all(word in str(explanation) and word in explanation._repr_html_() for word in text.split())


# --- models without a pad or mask token


def test_a_model_without_pad_or_mask_token():
    tokenizer = GPT2Tokenizer().train_new_from_iterator([MIXED], 300, show_progress=False)
    assert tokenizer.pad_token is None and tokenizer.mask_token is None
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=2)
    config.initializer_range = 0.3
    model = GPT2ForSequenceClassification(config).eval()
    model.config.pad_token_id = tokenizer.eos_token_id
    found = explain(model, AMHARIC, tokenizer=tokenizer, steps=24, curves=True)
    alone = [explain(model, [text], tokenizer=tokenizer, steps=24)[0] for text in AMHARIC]
    for one, two, text in zip(found, alone, AMHARIC, strict=True):
        assert one.text == text and one.curves["none"]
        assert one.scores == pytest.approx(two.scores, abs=1e-4)
    ensure_pad_token(tokenizer)  # as a run does it
    with pytest.raises(InputError, match="delete"):
        Explainer(model, tokenizer, ExplainSettings({"random": {}}, operators=("mask",)))


def test_positions_from_scratch_are_those_that_were_asked_for(bytes_tokenizer):
    for kind in ("bert", "roberta", "xlm-roberta"):
        scratch = ScratchConfig(type=kind, layers=1, width=8, heads=2, max_positions=20)
        model = load_model(ModelConfig(scratch=scratch), ["a", "b"], bytes_tokenizer)
        assert longest_input(model.config) == 20
        row = bytes_tokenizer(" ".join(AMHARIC * 2), truncation=True, max_length=20, return_tensors="pt")
        assert row["input_ids"].shape[1] == 20
        assert model(**row).logits.isfinite().all()


# --- quotes around texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("'ሰላም ነው'", "ሰላም ነው"),
        ('"ሰላም" ', "ሰላም"),
        ("'tis fine", "'tis fine"),
        ("'a\"", "'a\""),
        ("''", "''"),
        (["'a'"], ["'a'"]),
    ],
)
def test_quotes_around_a_whole_text(text, expected):
    assert unquoted(text) == expected


def test_quotes_are_taken_off_where_asked(tmp_path):
    rows = [{"text": f"'text {i}'", "label": i % 2} for i in range(20)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    texts = {
        flag: {
            e.text for split in load_corpus(settings(path=path, strip_quotes=flag), 0).splits.values() for e in split
        }
        for flag in (False, True)
    }
    assert texts[True] == {f"text {i}" for i in range(20)} and texts[False] == {f"'text {i}'" for i in range(20)}
    spanned = write_jsonl(
        tmp_path / "y.jsonl", [{"text": "'a b'", "label": i % 2, "rationale": [[1, 2]]} for i in (0, 1)]
    )
    with pytest.raises(InputError, match=r"data.strip_quotes=true: the rationales \(column 'rationale'\) count"):
        load_corpus(settings(path=spanned, strip_quotes=True), 0)


@pytest.mark.skipif(not AFRISENTI.is_dir(), reason="the shared data are not here")
def test_afrisenti_reads_without_loss():
    data = settings(
        path=str(AFRISENTI),
        quoted=False,
        strip_quotes=True,
        columns=columns(text="tweet", label="label"),
        max_length=64,
    )
    corpus = load_corpus(data, 0)
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {"train": 5984, "val": 1497, "test": 1999}
    assert corpus.label_names == ["negative", "neutral", "positive"]
    quoted = [e for e in corpus.splits["test"] if e.text[0] == e.text[-1] and e.text[0] in "'\""]
    assert not quoted
    texts = [e.text for e in corpus.splits["train"][:400]]
    tokenizer = train_tokenizer("byte_bpe", texts, 1000, 64)
    for text in texts[:50]:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).split() == text.split()


def test_a_bert_without_token_types_reads_bytes(bytes_tokenizer):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(bytes_tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    explanation = explain(
        BertForSequenceClassification(config).eval(),
        ["😀 ነው"],
        tokenizer=bytes_tokenizer,
        method="integrated_gradients",
    )[0]
    assert explanation.text == "😀 ነው"
