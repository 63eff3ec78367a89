"""Examples to model inputs that know which word every token belongs to."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import BertTokenizer, PreTrainedTokenizerBase

from calig.datamodules.columns import Text
from calig.datamodules.examples import TextExample
from calig.datamodules.windows import WindowSettings
from calig.pipeline.errors import InputError

CHUNK = 512


def train_wordpiece(
    texts: Iterable[Text], vocab_size: int, max_length: int | None = None, lower_case: bool = True
) -> BertTokenizer:
    """Train a BERT word-piece tokenizer; the same texts in the same order give the same vocabulary in every process.

    Args:
        texts: The training texts, and only those: the vocabulary must not know the test split.
        vocab_size: Upper bound; frequent words stay whole, and all of them do where the bound allows.
        max_length: Stored as the tokenizer's ``model_max_length``.
        lower_case: Lower-case the texts and strip accents, as BERT uncased does.

    Raises:
        InputError: ``vocab_size`` does not even hold the characters of the texts.
    """
    lines = [joined(text) for text in texts]
    fresh = BertTokenizer(do_lower_case=lower_case)
    special = list(fresh.get_vocab())
    # The trainer numbers "##x" pieces in the order of a randomly seeded hash map, and breaks ties between merges by
    # these numbers: two processes would end with two vocabularies. Handed over as special tokens the characters
    # have fixed numbers; the vocabulary alone is kept, so that nothing of this role remains.
    pieces = _characters(fresh, lines)
    if vocab_size < len(special) + len(pieces):
        raise InputError(
            f"vocab_size={vocab_size} is too small: the texts hold {len(pieces)} characters "
            f"(as word beginnings and continuations), so at least {len(special) + len(pieces)} are needed."
        )
    batches = (lines[start : start + CHUNK] for start in range(0, len(lines), CHUNK))
    trained = fresh.train_new_from_iterator(batches, vocab_size, new_special_tokens=pieces, show_progress=False)
    tokenizer = BertTokenizer(vocab=trained.get_vocab(), do_lower_case=lower_case)
    if max_length is not None:
        tokenizer.model_max_length = max_length
    return tokenizer


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the end-of-sequence token pad where there is no pad token; the model's config must be told its id.

    Raises:
        InputError: There is neither.
    """
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"the tokenizer '{tokenizer.name_or_path}' has neither a pad nor an eos token, so texts cannot be batched. "
            "Add one (tokenizer.pad_token = ...) and save the tokenizer with the model."
        )
    tokenizer.pad_token = tokenizer.eos_token


# Models of these types number positions from padding_idx + 1, and their table holds the unused ones too.
_OFFSET_POSITIONS = (
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod", "camembert", "data2vec-text"),
    *("longformer", "mpnet", "luke", "mluke", "ibert", "esm", "layoutlmv3", "markuplm"),
)


def longest_input(config: Any) -> int | None:
    """How many tokens a model takes, from its Hugging Face config; None where its positions have no end."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    if getattr(config, "model_type", "") in _OFFSET_POSITIONS and config.pad_token_id is not None:
        return positions - config.pad_token_id - 1
    return positions


def check_length(
    tokenizer: PreTrainedTokenizerBase, max_length: int, pairs: bool = False, positions: int | None = None
) -> None:
    """Refuse a ``max_length`` that the model cannot take or that special tokens alone would fill.

    Args:
        tokenizer: Knows its special tokens and, often, its model's length.
        max_length: Tokens per text.
        pairs: Whether texts come in pairs.
        positions: How many tokens the model takes (see ``longest_input``); None: the tokenizer's word counts.
    """
    longest = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    if max_length > longest:
        model = tokenizer.name_or_path or "the model"
        raise InputError(
            f"data.max_length={max_length} is more than the {longest} tokens that '{model}' takes. "
            f"Set data.max_length={longest} or less; longer texts are truncated, and the share is reported."
        )
    special = tokenizer.num_special_tokens_to_add(pairs)
    if max_length <= special + pairs:
        raise InputError(f"data.max_length={max_length} leaves no room for text beside {special} special tokens.")


def encode(
    example: TextExample, tokenizer: PreTrainedTokenizerBase, max_length: int, windows: WindowSettings | None = None
) -> dict[str, Any]:
    """Tokenise one example; see ``encode_all``."""
    return next(encode_all([example], tokenizer, max_length, windows))


def encode_all(
    examples: Sequence[TextExample],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    windows: WindowSettings | None = None,
) -> Iterator[dict[str, Any]]:
    """Tokenise; one dict per example in order, with plain lists of length T and plain values.

    Keys:
    - what ``tokenizer.model_input_names`` lists (``input_ids``, ``attention_mask``, ``token_type_ids``);
    - ``special_tokens_mask``: 1 on what the tokenizer added;
    - ``word_ids``: the word of each token, -1 on special tokens. Words of a list are numbered as in the list; those of
      a string by the tokenizer's own splitting, or by white space where it does not split. A second text goes on
      counting where the first one ends;
    - ``rationale``: 0/1 by the token's word, -1 on special tokens, on the second text, and where unknown; a word is
      marked by a span of characters that shares one with it;
    - ``rationale_missed``: how many marked words truncation cut off as a whole;
    - ``segment``: 0 on the first text and 1 on the second, -1 on special tokens (only where there is a second);
    - ``truncated``: whether tokens were cut off, and ``tokens_cut``: how many;
    - ``labels`` (absent where there is none), ``sample_id``;
    - with ``windows``, which take the place of truncation: ``windows``, the [start, end) positions of the text's own
      tokens that each window holds, and ``char_start`` and ``char_end`` of every token, -1 on special ones.

    A list of words is tokenised as its words joined by single spaces: what a model met in training, and byte-level
    tokenizers need no special setting.

    Raises:
        InputError: The tokenizer is not a fast one (only those know word positions), a text gives no token, windows
            are asked for of pairs, or overlap too much.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"'{tokenizer.name_or_path}' ({type(tokenizer).__name__}) is a Python tokenizer and cannot tell which word "
            "a token comes from. A fast tokenizer (tokenizer.json) is needed."
        )
    special = tokenizer.num_special_tokens_to_add(False)
    longest = max_length if windows is None else windows.longest(special)
    stream = iter(examples)
    while chunk := list(islice(stream, CHUNK)):
        firsts = [joined(example.text) for example in chunk]
        pairs = [joined(example.text_pair) for example in chunk if example.text_pair is not None]
        if pairs and len(pairs) != len(chunk):
            raise InputError("some examples have a second text and some have none; give all of them one, or none.")
        if pairs and windows is not None:
            raise InputError(
                "windows are cut from one text, and these examples have two: set data.windows.overlap=null, which "
                "truncates, or leave the second text out (data.columns.text_pair=null)."
            )
        # Not verbose: longer than the model's window is what windows are for.
        encoded = tokenizer(firsts, pairs or None, truncation=longest is not None, max_length=longest, verbose=False)
        for row, example in enumerate(chunk):
            model_inputs = {name: encoded[name][row] for name in tokenizer.model_input_names if name in encoded}
            aligned = _aligned(example, encoded.encodings[row])
            if windows is not None:
                aligned |= _windowed(encoded.encodings[row], windows, special)
            yield model_inputs | aligned


def _aligned(example: TextExample, encoding: Any) -> dict[str, Any]:
    """Everything beside the model inputs, from a ``tokenizers.Encoding``."""
    sequences = encoding.sequence_ids  # the encoding builds its lists anew at every access
    if all(sequence is None for sequence in sequences):
        raise InputError(f"sample {example.sample_id}: the tokenizer finds no token in {str(example.text)[:60]!r}.")
    word_ids = [-1] * len(sequences)
    offset = 0
    for sequence, text in enumerate((example.text, example.text_pair)):
        if text is None:
            continue
        for position, word in _words(text, encoding, sequence).items():
            word_ids[position] = offset + word
        offset = len(text) if isinstance(text, list) else max(word_ids) + 1
    marks: Sequence[int] | Mapping[int, int] | None = example.rationale
    if isinstance(example.text, str) and example.spans is not None:
        marks = _spanned(example.text, example.spans, encoding)
    rationale = [-1] * len(sequences)
    missed = 0
    if marks is not None:
        rationale = [marks[word] if of == 0 else -1 for word, of in zip(word_ids, sequences, strict=True)]
        cut = {word for part in encoding.overflowing for word in _words(example.text, part, 0).values()}
        missed = sum(marks[word] for word in cut.difference(word_ids))
    result = {
        "special_tokens_mask": encoding.special_tokens_mask,
        "word_ids": word_ids,
        "rationale": rationale,
        "rationale_missed": missed,
        "truncated": bool(encoding.overflowing),
        "tokens_cut": _tokens_cut(encoding, sequences),
        "sample_id": example.sample_id,
    }
    if example.text_pair is not None:
        result["segment"] = [-1 if of is None else of for of in sequences]
    return result if example.label is None else result | {"labels": example.label}


def _windowed(encoding: Any, windows: WindowSettings, special: int) -> dict[str, Any]:
    sequences, offsets = encoding.sequence_ids, encoding.offsets
    own = [position for position, of in enumerate(sequences) if of == 0]
    places = [place if of == 0 else (-1, -1) for place, of in zip(offsets, sequences, strict=True)]
    return {
        "windows": windows.spans(own[0], own[-1] + 1, special),
        "char_start": [start for start, _ in places],
        "char_end": [end for _, end in places],
    }


def _tokens_cut(encoding: Any, sequences: Sequence[int | None]) -> int:
    if 1 not in sequences:
        return sum(of == 0 for part in encoding.overflowing for of in part.sequence_ids)
    # Of a pair every part of one text comes with every part of the other: count each token once.
    places = [
        {(of, *offset) for of, offset in zip(part.sequence_ids, part.offsets, strict=True) if of is not None}
        for part in (encoding, *encoding.overflowing)
    ]
    return len(set().union(*places[1:]) - places[0])


def _spanned(text: str, spans: Sequence[tuple[int, int]], encoding: Any) -> dict[int, int]:
    """Word index -> whether a span of characters touches the word, of all words, also those cut off."""
    marks: dict[int, int] = {}
    for part in (encoding, *encoding.overflowing):
        offsets = part.offsets
        for position, word in _words(text, part, 0).items():
            start, end = offsets[position]
            token = text[start:end]
            start += len(token) - len(token.lstrip())  # a token may begin with the space before its word
            marks[word] = marks.get(word, 0) | any(start < stop and begin < end for begin, stop in spans)
    return marks


def _words(text: Text, encoding: Any, sequence: int) -> dict[int, int]:
    """Position -> word index within ``text``, which is the first (0) or second (1) sequence of the encoding."""
    positions = [position for position, of in enumerate(encoding.sequence_ids) if of == sequence]
    if isinstance(text, str):
        word_ids = encoding.word_ids
        if any(word_ids[position] for position in positions):
            return {position: word_ids[position] for position in positions}
        # Tokenizers without pre-tokenisation (SentencePiece) call the whole text one word.
        ends = [match.end() for match in re.finditer(r"\S+", text)]
    else:
        ends, end = [], -1
        for word in text:
            end += 1 + len(word)
            ends.append(end)
    # A token may begin with the space before its word: position ends[k] belongs to word k + 1.
    offsets = encoding.offsets
    return {position: min(bisect_right(ends, offsets[position][0]), len(ends) - 1) for position in positions}


def joined(text: Text) -> str:
    """A text as tokenizers read it: a list of words by single spaces."""
    return text if isinstance(text, str) else " ".join(text)


def _characters(tokenizer: BertTokenizer, lines: Iterable[str]) -> list[str]:
    """The one-character pieces of the texts: "x" at the beginning of a word, "##x" inside one."""
    backend = tokenizer.backend_tokenizer
    first: set[str] = set()
    inside: set[str] = set()
    for line in lines:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(line)):
            first.add(word[0])
            inside.update(word[1:])
    return sorted(first | inside) + sorted(f"##{character}" for character in inside)
