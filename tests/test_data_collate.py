"""Padding."""

import pickle

import pytest
import torch

from calig.datamodules.collate import TextCollator


def row(length, sample_id, **more):
    return {
        "input_ids": list(range(10, 10 + length)),
        "attention_mask": [1] * length,
        "special_tokens_mask": [0] * length,
        "word_ids": list(range(length)),
        "rationale": [1] * length,
        "rationale_missed": 2,
        "truncated": False,
        "sample_id": sample_id,
        **more,
    }


@pytest.mark.parametrize("side", ["right", "left"])
def test_fill_values_and_types(side):
    collator = pickle.loads(pickle.dumps(TextCollator(pad_token_id=99, padding_side=side)))
    batch = collator([row(3, 2**40, labels=1), row(1, 5, labels=0)])
    expected = {
        "input_ids": [[10, 11, 12], [10, 99, 99]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "special_tokens_mask": [[0, 0, 0], [0, 1, 1]],
        "word_ids": [[0, 1, 2], [0, -1, -1]],
        "rationale": [[1, 1, 1], [1, -1, -1]],
        "sample_id": [2**40, 5],
        "rationale_missed": [2, 2],
        "labels": [1, 0],
    }
    assert batch.keys() == expected.keys()
    for key, values in expected.items():
        if side == "left" and isinstance(values[0], list):
            values = [values[0], values[1][::-1]]
        assert batch[key].dtype == torch.int64 and batch[key].tolist() == values, key


def test_token_types_only_where_given_and_labels_only_where_all_have_one():
    collator = TextCollator(0, pad_token_type_id=3)
    batch = collator([row(1, 0, token_type_ids=[1], labels=1), row(2, 1, token_type_ids=[1, 1])])
    assert batch["token_type_ids"].tolist() == [[1, 3], [1, 1]] and "labels" not in batch
    assert "token_type_ids" not in collator([row(1, 0)])
    assert "token_type_ids" not in TextCollator(0, model_keys=("input_ids",))([row(1, 0, token_type_ids=[1])])
