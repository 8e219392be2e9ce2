"""Models for tests of conversations: Doges that say what they are made to say, and a Llama."""

from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from doge_lm import DogeForCausalLM
from doge_lm.data.tokenizer import END_INST, EOS, encode_text, load_tokenizer
from tests.small_model import make_model


def make_chain(place: Path, answer: str, *, ends: bool = True, positions: int = 256) -> Path:
    """A Doge that says `answer` to everything and then ends its turn; or begins again, if it does not end.

    Its layers add nothing, so that the next token follows from the last one alone: each token of the chain has a
    direction of its own as its embedding, and its successor answers to that direction. No token of the answer may
    occur in it twice.
    """
    make_model(place, positions=positions)
    tokenizer = load_tokenizer(place)
    said = encode_text(tokenizer, answer)
    begin, end = tokenizer.convert_tokens_to_ids([END_INST, EOS])
    chain = [begin, *said, end if ends else said[0]]
    model = DogeForCausalLM.from_pretrained(place)
    assert len(set(said)) == len(said) < model.config.hidden_size
    with torch.no_grad():
        for layer in model.model.layers:
            layer.attn.o_proj.weight.zero_()
            layer.feed_forward.up_embed.weight.zero_()
        model.model.word_embed.weight.zero_()
        model.lm_head.weight.zero_()
        for direction, (token, successor) in enumerate(pairwise(chain)):
            model.model.word_embed.weight[token, direction] = 1
            model.lm_head.weight[successor, direction] = 20
    model.save_pretrained(place)
    return place


LLAMA_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA_CONTROL = ["<|end|>", "<|stop|>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_llama(place: Path, template: str | None = LLAMA_TEMPLATE) -> Path:
    """A random Llama with a byte-level tokenizer, in which two tokens end a turn."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=LLAMA_CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat, the dog ate"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": LLAMA_CONTROL[1:]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(place)
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        eos_token_id=[0, 1],
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [0, 1]
    model.save_pretrained(place)
    return place
