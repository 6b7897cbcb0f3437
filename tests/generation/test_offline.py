"""Generation against whole forward passes, whatever the batch."""

import pytest
import torch

from wizard_engine.data.chat import CHAT_ATOMS, Sample, encode_prompt
from wizard_engine.data.records import Message, conversation
from wizard_engine.data.tokenizer import train_tokenizer
from wizard_engine.generation import answer_texts, generate, perplexities, sequence_logprobs
from wizard_engine.generation.scoring import packed_groups, token_logprobs
from wizard_engine.model import ModelConfig, Transformer

NEVER = -7
CONFIG = {"vocab_size": 23, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 4, "ffn_width": 24}
PROMPTS = [[1, 5, 9], [2], [1, 5, 9], [3, 3, 3, 3, 3, 3, 8], [22, 0], [4, 17, 11, 2, 6]]


def model(**changes):
    return Transformer(ModelConfig(**CONFIG, max_positions=40, init_std=0.4, **changes), seed=2)


def forward(net, tokens):
    """(n, V) logits of one sequence by a whole forward pass."""
    n = len(tokens)
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32)
    with torch.no_grad():
        return net.logits(net(torch.tensor(tokens), torch.arange(n), cu_seqlens, n))


def naive(net, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(forward(net, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("changes", [{}, {"window": 4}, {"window": 1}, {"tied": False}])
def test_greedy_generation_equals_whole_forward_passes(changes):
    net = model(**changes)
    answers = generate(net, PROMPTS, max_new_tokens=12, eos_ids=(NEVER,))
    assert answers.tokens == [naive(net, prompt, 12) for prompt in PROMPTS]
    assert answers.finished == [False] * len(PROMPTS) and len({tuple(t) for t in answers.tokens}) > 3


@pytest.mark.parametrize(("temperature", "scored"), [(0.0, 1.0), (1.0, 1.0), (0.6, 0.6)])
def test_generated_logprobs_equal_those_of_training(temperature, scored):
    net = model(window=6)
    answers = generate(net, PROMPTS, max_new_tokens=9, temperature=temperature, seed=4, eos_ids=(5,))
    samples = [
        Sample(torch.tensor([*p, *t]).int().numpy(), torch.ones(len(p) + len(t)).numpy())
        for p, t in zip(PROMPTS, answers.tokens)
    ]
    for logprobs, again in zip(answers.logprobs, token_logprobs(net, samples, temperature=scored)):
        torch.testing.assert_close(torch.tensor(logprobs), torch.from_numpy(again[-len(logprobs) :]), rtol=0, atol=2e-5)


def test_sampled_tokens_follow_seed_and_row_and_not_the_batch():
    net = model()
    options = {"max_new_tokens": 10, "temperature": 1.0, "eos_ids": (3,)}
    whole = generate(net, PROMPTS, seed=1, **options)
    for batch_size in (1, 2, 4, 5):
        assert generate(net, PROMPTS, seed=1, batch_size=batch_size, **options).tokens == whole.tokens
    assert generate(net, PROMPTS, seed=2, **options).tokens != whole.tokens
    assert whole.tokens[0] != whole.tokens[2]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_tokens_have_the_distribution_of_the_model(temperature):
    net, count = model(), 6000
    answers = generate(net, [[1, 5, 9]] * count, max_new_tokens=1, temperature=temperature, seed=0, eos_ids=(NEVER,))
    frequency = torch.bincount(torch.tensor(answers.tokens)[:, 0], minlength=23) / count
    exact = (forward(net, [1, 5, 9])[-1] / temperature).softmax(-1)
    assert float(((frequency - exact) / (exact * (1 - exact) / count).sqrt()).abs().max()) < 4.5


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 4, "top_p": 0.7}])
def test_truncated_tokens_have_the_logprobs_of_the_truncated_distribution(options):
    net = model()
    answers = generate(net, PROMPTS, max_new_tokens=6, temperature=0.8, seed=3, eos_ids=(NEVER,), **options)
    for prompt, tokens, logprobs in zip(PROMPTS, answers.tokens, answers.logprobs):
        probability = (forward(net, [*prompt, *tokens])[len(prompt) - 1 : -1].double() / 0.8).softmax(-1)
        for token, logprob, p in zip(tokens, logprobs, probability):
            ranked = p.sort(descending=True).values[: options.get("top_k", 23)]
            before = (ranked.cumsum(0) - ranked) / ranked.sum()
            kept = ranked[before < options.get("top_p", 1.0)]
            assert float(p[token]) >= float(kept[-1]) - 1e-9
            assert logprob == pytest.approx(float((p[token] / kept.sum()).log()), abs=1e-4)


def test_truncation_to_one_token_is_greedy():
    net = model()
    greedy = generate(net, PROMPTS, max_new_tokens=8, eos_ids=(NEVER,))
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        answers = generate(net, PROMPTS, max_new_tokens=8, temperature=1.0, seed=5, eos_ids=(NEVER,), **options)
        assert answers.tokens == greedy.tokens and {p for row in answers.logprobs for p in row} == {0.0}


def test_generation_ends_at_eos_and_at_the_limit():
    net = model()
    free = generate(net, PROMPTS, max_new_tokens=12, eos_ids=(NEVER,)).tokens
    eos = free[3][4]
    answers = generate(net, PROMPTS, max_new_tokens=12, eos_ids=(eos,))
    for tokens, logprobs, finished, whole in zip(answers.tokens, answers.logprobs, answers.finished, free):
        expected = whole[: whole.index(eos) + 1] if eos in whole else whole
        assert tokens == expected and finished == (eos in whole) and len(logprobs) == len(tokens)
    assert True in answers.finished and False in answers.finished
    assert generate(net, PROMPTS, max_new_tokens=1, eos_ids=(NEVER,)).tokens == [row[:1] for row in free]
    assert generate(net, [], max_new_tokens=3, eos_ids=(0,)).tokens == []
    full = generate(net, [[1] * 28], max_new_tokens=12, eos_ids=(NEVER,))
    assert len(full.tokens[0]) == 12


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, r"prompts\[1\]: expected 1 to 35 tokens, got 0"),
        ([[1] * 36], {}, r"prompts\[0\]: expected 1 to 35 tokens, got 36"),
        ([[1]], {"temperature": -0.1}, "temperature: expected >= 0 and finite, got -0.1"),
        ([[1]], {"temperature": float("inf")}, "temperature: expected >= 0 and finite, got inf"),
        ([[1]], {"top_k": -1}, "top_k: expected >= 0, got -1"),
        ([[1]], {"top_p": 0.0}, r"top_p: expected in \(0, 1\], got 0.0"),
        ([[1]], {"top_p": 1.1}, r"top_p: expected in \(0, 1\], got 1.1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected >= 1, got 0"),
    ],
)
def test_generation_refuses_what_it_cannot_do(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model(), prompts, **{"max_new_tokens": 5, "eos_ids": (0,), **options})


def test_packed_groups_hold_every_index_once_within_capacity():
    lengths = [5, 1, 9, 30, 2, 2, 7]
    groups = list(packed_groups(lengths, 10))
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert all(sum(lengths[i] for i in group) <= 10 or len(group) == 1 for group in groups)
    assert list(packed_groups([], 10)) == []


def chat():
    tokenizer = train_tokenizer(["What is two and two? It is four."], vocab_size=300, atoms=CHAT_ATOMS)
    config = ModelConfig(**{**CONFIG, "vocab_size": tokenizer.vocab_size}, max_positions=48, init_std=0.3)
    return Transformer(config, seed=1), tokenizer


def test_sequence_logprobs_sum_the_supervised_tokens():
    net, _ = chat()
    tokens, weights = torch.tensor([0, 5, 7, 9, 2]), torch.tensor([0.0, 0, 1, 1, 0])
    logprobs = forward(net, tokens.tolist())[:-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    sample = Sample(tokens.int().numpy(), weights.numpy())
    expected = float(logprobs[1] + logprobs[2])
    assert sequence_logprobs(net, [sample])[0] == pytest.approx(expected, rel=1e-5)
    assert sequence_logprobs(net, [sample], mean=True)[0] == pytest.approx(expected / 2, rel=1e-5)


def test_perplexities_of_answers_and_of_rows_over_the_context():
    net, tokenizer = chat()
    rows = [conversation("What is two and two?", text) for text in ("It is four.", "four " * 50, "two")]
    values = perplexities(net, tokenizer, rows)
    assert values[1] != values[1] and values[0] > 1
    prompt = encode_prompt(tokenizer, rows[2].messages[:-1])
    answer = [*tokenizer.encode(" two"), tokenizer.eos_id]
    logprobs = forward(net, prompt + answer).log_softmax(-1)
    picked = [logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(answer)]
    assert values[2] == pytest.approx(float(torch.stack(picked).mean().neg().exp()), rel=1e-4)


def test_answer_texts_decode_what_is_generated():
    net, tokenizer = chat()
    messages = [(Message("user", "What is two?"),), (Message("user", "It is four."),)]
    ids = [encode_prompt(tokenizer, m) for m in messages]
    answers = generate(net, ids, max_new_tokens=8, eos_ids=tokenizer.eos_ids)
    texts = [tokenizer.decode(t).strip() for t in answers.tokens]
    assert answer_texts(net, tokenizer, messages, max_new_tokens=8) == texts
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        assert answer_texts(net, tokenizer, messages, max_new_tokens=8, temperature=1.0, **options) == texts
