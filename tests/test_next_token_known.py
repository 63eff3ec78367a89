"""Language models that learnt a rule, so that the token that decides what comes next is known.

Ten words of a prompt are fillers but for one key and one value; the last word asks for either, and the model writes it
again. Shapes: B prompts, T tokens.
"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from calig.datamodules.tokenization import train_wordpiece
from calig.pipeline import explain_next_token

KEYS, VALUES, FILLERS = ([f"{kind}{letter}" for letter in "abcdefgh"] for kind in "kvf")
ASKS = ["askk", "askv"]
LENGTH = 10
SHAPE = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def make(family, size):
    torch.manual_seed(0)
    if family == "gpt2":
        drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        config = GPT2Config(vocab_size=size, n_embd=64, n_layer=2, n_head=4, n_positions=32, **drop, **SHAPE)
        return GPT2LMHeadModel(config)
    config = LlamaConfig(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, **SHAPE
    )
    return LlamaForCausalLM(config)


def draw(tokenizer, count, generator):
    """Prompts (B, T), the token that comes next and the one not asked for (B,), and where the two stand (B,)."""

    def ids(words):
        return torch.tensor([tokenizer.convert_tokens_to_ids(word) for word in words])

    def number(high):
        return torch.randint(high, (count,), generator=generator)

    rows = torch.arange(count)
    body = ids(FILLERS)[torch.randint(8, (count, LENGTH), generator=generator)]
    places = torch.stack([torch.randperm(LENGTH, generator=generator)[:2] for _ in range(count)])
    pair = torch.stack([ids(KEYS)[number(8)], ids(VALUES)[number(8)]], dim=1)
    body[rows[:, None], places] = pair
    asked = number(2)
    prompts = torch.cat([torch.full((count, 1), tokenizer.cls_token_id), body, ids(ASKS)[asked][:, None]], dim=1)
    return prompts, pair[rows, asked], pair[rows, 1 - asked], places[rows, asked] + 1, places[rows, 1 - asked] + 1


def train(model, tokenizer):
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(600):
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, step / 100)
        prompts, following, *_ = draw(tokenizer, 128, generator)
        loss = torch.nn.functional.cross_entropy(model(prompts).logits[:, -1], following)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss < 0.02:
            return model.eval()
    raise AssertionError(f"the rule was not learnt: loss {loss:.3f}")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_token_that_is_copied_is_found(family):
    tokenizer = train_wordpiece([" ".join([*KEYS, *VALUES, *FILLERS, *ASKS])] * 5, 200)
    model = train(make(family, len(tokenizer)), tokenizer)
    prompts, following, other, source, rest = draw(tokenizer, 48, torch.Generator().manual_seed(9))
    texts = [tokenizer.decode(row[1:]) for row in prompts]

    def share(explanations, places, sign=1):
        """How often the strongest word, the question left out, is the one at its place; a tenth by chance."""
        words = [torch.tensor(explanation.scores[1:-1]) for explanation in explanations]
        return sum(int((sign * w).argmax()) + 1 == int(p) for w, p in zip(words, places, strict=True)) / len(words)

    for method, least in (("ca_lig", 0.95), ("integrated_gradients", 0.95)):
        found = explain_next_token(model, texts, tokenizer=tokenizer, method=method)
        assert [explanation.target for explanation in found] == following.tolist()
        assert share(found, source) >= least, method
        assert max(explanation.completeness_gap for explanation in found) < 0.03
    # Rather than the other one: that one's place speaks against it.
    pairs = [
        explain_next_token(
            model, [text], target=int(one), versus=int(two), tokenizer=tokenizer, method="integrated_gradients"
        )[0]
        for text, one, two in zip(texts, following, other, strict=True)
    ]
    assert share(pairs, source) >= 0.95 and share(pairs, rest, sign=-1) >= 0.7
    controls = explain_next_token(model, texts, tokenizer=tokenizer, method="random")
    assert share(controls, source) < 0.4
