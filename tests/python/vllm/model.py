"""Makes the model the tests run: a Llama of 3 million parameters, fixed-seed random weights, float32, a byte tokenizer.

Weights are drawn wide (`initializer_range` 0.08): logits lie so far apart that the greedy token does not depend on the
order of a sum, and wrong KV shows at once as other tokens. (vLLM's own dummy weights end in a loop of two tokens,
whatever the KV.)

    python model.py FOLDER [--hidden 256 --layers 4 …]
"""

import argparse

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>"]


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    words = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"<unused {i}>" for i in range(len(words), vocab_size)]
    bytewise = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--inner", type=int, default=704)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=512)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    torch.manual_seed(a.seed)
    config = LlamaConfig(
        vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.inner, num_hidden_layers=a.layers,
        num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, max_position_embeddings=a.positions,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, initializer_range=0.08,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(a.folder)
    tokenizer(a.vocab).save_pretrained(a.folder)


if __name__ == "__main__":
    main()
