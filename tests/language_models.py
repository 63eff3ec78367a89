"""Tiny random causal language models with tokenizers of several kinds."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Tokenizer, LlamaTokenizer

TEXTS = [
    "the capital of France is Paris",
    "the capital of England is London",
    "a good film, but the ending was not good",
    "London and Paris are far from the film",
]
SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,
}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 3, "n_inner": 32},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED,
    "gemma": GROUPED,
    "mistral": GROUPED | {"sliding_window": 4},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 24},
}


def byte_level_tokenizer():
    """GPT-2's: no token in front, no pad token."""
    tokenizer = GPT2Tokenizer().train_new_from_iterator([TEXTS * 20], 500, show_progress=False)
    assert tokenizer.pad_token is None
    return tokenizer


def sentence_piece_tokenizer():
    """Llama's: `<s>` in front, words that begin with a blank spelled `▁word`."""
    words = sorted({word for text in TEXTS for word in text.replace(",", " ,").split()})
    letters = sorted(set("".join(words)))
    pieces = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    merges = []
    for word in words:
        for stem in ("▁", ""):
            pieces_so_far = stem or word[0]
            for letter in word if stem else word[1:]:
                merges.append((pieces_so_far, letter))
                pieces_so_far += letter
                pieces.append(pieces_so_far)
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return LlamaTokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)), pad_token="<pad>", add_bos_token=True)


def make_language_model(family, tokenizer, *, dtype=torch.float32, seed=0):
    """A random model whose pad row is no zero, in front of which a norm without a bias would have no baseline."""
    torch.manual_seed(seed)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **ids, **SHAPE, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(0.5 * torch.randn(embedding.shape))
    return model.to(dtype).eval()


def make_folder(path, family="gpt2", tokenizer=None):
    tokenizer = tokenizer or byte_level_tokenizer()
    model = make_language_model(family, tokenizer)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer
