"""Continuous batching over pages: transformers' tokens and the trainer's log-probabilities, whatever runs beside."""

import random
from dataclasses import replace

import pytest
import torch

import kernels
from wizard_engine.data.chat import Sample
from wizard_engine.generation.cuda_graphs import DecodeGraphs, batch_size, length_size
from wizard_engine.generation.engine import Engine, Sampling, cache_bytes
from wizard_engine.generation.scoring import token_logprobs
from wizard_engine.model import PRESETS, Transformer, load_hf

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
FAMILIES = ("Llama", "Mistral", "Mixtral")
EOS = 7


def pair(family, folder, seed, init_std=0.3):
    """A random model of transformers and the same in this engine; likelihoods far apart, so that nothing ties."""
    fields = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": init_std,
        "tie_word_embeddings": seed % 2 == 0,
    }
    if family == "Mistral":
        fields["sliding_window"] = 11
    if family == "Mixtral":
        fields |= {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    torch.manual_seed(seed)
    theirs = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**fields, attn_implementation="eager")
    ).eval()
    theirs.save_pretrained(folder)
    return theirs, load_hf(folder, dtype=torch.float32)


def prompts_of(seed, count, vocab_size=97, longest=60):
    draw = random.Random(seed)
    prompts = [[draw.randrange(vocab_size) for _ in range(draw.randint(1, longest))] for _ in range(count)]
    # Some begin like others, some are others.
    for i in range(0, count - 3, 4):
        prompts[i + 1] = prompts[i][: draw.randint(1, len(prompts[i]))] + prompts[i + 1][:9]
        prompts[i + 2] = list(prompts[i])
    return prompts


def by_transformers(model, prompt, count):
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=EOS,
            pad_token_id=EOS,
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_transformers_alone_and_in_any_batch(family, tmp_path):
    theirs, ours = pair(family, tmp_path, FAMILIES.index(family))
    prompts, draw = prompts_of(5, 14), random.Random(1)
    counts = [draw.randint(1, 40) for _ in prompts]
    expected = [by_transformers(theirs, p, n) for p, n in zip(prompts, counts)]
    for prompt, count, right in zip(prompts, counts, expected):
        single = Engine(ours, cache_tokens=160, max_sequences=1)
        (sequence,) = single.add(prompt, Sampling(count, eos_ids=(EOS,)))
        single.run()
        assert sequence.tokens == right and sequence.reason == ("stop" if right[-1] == EOS else "length")
    # Few pages: sequences give them back and are computed again.
    for pages, sequences, tokens in ((7, 14, 24), (12, 5, 9), (60, 14, 2048)):
        engine = Engine(ours, cache_tokens=16 * pages, max_sequences=sequences, max_tokens=tokens)
        batch = [engine.add(p, Sampling(n, eos_ids=(EOS,)))[0] for p, n in zip(prompts, counts)]
        engine.run()
        assert [s.tokens for s in batch] == expected
        assert (engine.scheduler.preemptions > 0) == (pages == 7)
        assert engine.pool.free == engine.pages


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_equal_the_training_forward(family, temperature, tmp_path):
    _, ours = pair(family, tmp_path, 3, init_std=0.15)
    engine = Engine(ours, cache_tokens=16 * 14, max_sequences=6, max_tokens=31)
    prompts = prompts_of(6, 12)
    rows = [engine.add(p, Sampling(25, temperature, seed=2, row=i, eos_ids=(EOS,)))[0] for i, p in enumerate(prompts)]
    engine.run()
    samples = [Sample(torch.tensor(s.ids).int().numpy(), torch.ones(len(s.ids)).numpy()) for s in rows]
    again = token_logprobs(ours, samples, temperature=temperature or 1.0)
    for sequence, logprobs in zip(rows, again):
        sampled = torch.tensor(sequence.logprobs)
        torch.testing.assert_close(sampled, torch.from_numpy(logprobs[-len(sampled) :]), rtol=0, atol=1e-5)


def tiny(name="tiny", **changes):
    return Transformer(replace(PRESETS[name], init_std=0.3, **changes), seed=4).eval()


# Catches: products whose code depends on the number of rows; attention whose sums depend on how a prompt was cut.
@pytest.mark.every(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny", "tiny-mistral", "demo"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU products of other sizes round otherwise")
def test_a_sequence_is_bit_equal_whatever_runs_beside_it(name, dtype):
    model = tiny(name).to(dtype)
    prompts = prompts_of(7, 16, vocab_size=model.config.vocab_size, longest=80)
    seen = []
    for pages, sequences, tokens in ((13, 1, 2048), (15, 24, 33), (300, 24, 2048), (40, 7, 7)):
        engine = Engine(model, cache_tokens=16 * pages, max_sequences=sequences, max_tokens=tokens)
        rows = [engine.add(p, Sampling(16, 1.0, seed=1, row=i))[0] for i, p in enumerate(prompts)]
        engine.run()
        seen.append([(s.tokens, s.logprobs) for s in rows])
    assert seen[0] == seen[1] == seen[2] == seen[3]


def test_samples_of_one_prompt_share_its_pages_and_prefill():
    model, prompt = tiny(), prompts_of(8, 1, longest=60)[0][:1] * 50
    one = [Engine(model, cache_tokens=1600, max_sequences=1) for _ in range(6)]
    single = [engine.add(prompt, Sampling(20, 1.0, seed=3, row=i))[0] for i, engine in enumerate(one)]
    for engine in one:
        engine.run()
    engine = Engine(model, cache_tokens=16 * 40, max_sequences=8)
    rows = engine.add(prompt, Sampling(20, 1.0, seed=3), n=6)
    engine.step()
    # Three full pages are shared, a copy of the last one is each one's own.
    assert engine.pool.free == 40 - 3 - 6 and engine.steps == 1 and [s.steps for s in rows] == [1] * 6
    engine.run()
    assert [s.tokens for s in rows] == [s.tokens for s in single] and len({tuple(s.tokens) for s in rows}) > 1
    assert [s.cached for s in rows] == [0] + [50] * 5 and engine.pool.free == 40


@pytest.mark.parametrize(("pages", "sequences"), [(8, 8), (40, 2), (40, 1)])
def test_samples_without_room_wait_for_it(pages, sequences):
    model, prompt = tiny(), [5] * 50
    rows = []
    for size, most in ((400, 8), (pages, sequences)):
        engine = Engine(model, cache_tokens=16 * size, max_sequences=most)
        rows.append(engine.add(prompt, Sampling(30, 1.0, seed=3), n=7))
        engine.run()
        assert engine.pool.free == size
    assert [s.tokens for s in rows[0]] == [s.tokens for s in rows[1]]


def test_each_sequence_keeps_its_sampling_settings():
    model, prompts = tiny(), prompts_of(9, 6)
    hows = [
        Sampling(12), Sampling(9, 1.0, seed=5), Sampling(12, 0.7, top_k=5, seed=6), Sampling(4, 1.3, top_p=0.6, seed=7),
        Sampling(12, 1.0, top_k=3, top_p=0.9, seed=8, row=4), Sampling(1),
    ]  # fmt: skip
    together = Engine(model, cache_tokens=1600, max_sequences=6)
    rows = [together.add(p, how)[0] for p, how in zip(prompts, hows)]
    together.run()
    for prompt, how, row in zip(prompts, hows, rows):
        single = Engine(model, cache_tokens=1600, max_sequences=1)
        (sequence,) = single.add(prompt, how)
        single.run()
        assert sequence.tokens == row.tokens and len(sequence.tokens) == how.max_new_tokens
        torch.testing.assert_close(torch.tensor(sequence.logprobs), torch.tensor(row.logprobs), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_top_logprobs_are_those_of_the_sampling_distribution(how):
    model = tiny()
    engine = Engine(model, cache_tokens=1600)
    (row,) = engine.add([3, 9, 4], Sampling(8, seed=1, top_logprobs=5, **how))
    engine.run()
    assert len(row.top) == len(row.tokens)
    for token, logprob, top in zip(row.tokens, row.logprobs, row.top):
        token_ids, values = zip(*top)
        assert list(values) == sorted(values, reverse=True) and 1 <= len(top) <= how.get("top_k", 5)
        assert sum(torch.tensor(values).exp()) <= 1 + 1e-4
        if token in token_ids:
            assert values[token_ids.index(token)] == pytest.approx(logprob, abs=1e-5)
        if how.get("temperature", 0) == 0:
            assert token_ids[0] == token and len(top) == 5
        elif "top_k" in how:
            assert token in token_ids and float(torch.tensor(values).exp().sum()) == pytest.approx(1, abs=1e-4)


def test_cancelled_sequences_free_their_pages_and_change_nothing_else():
    model, prompts = tiny(), prompts_of(10, 9)
    whole = Engine(model, cache_tokens=1600)
    expected = [whole.add(p, Sampling(20))[0] for p in prompts]
    whole.run()
    engine = Engine(model, cache_tokens=16 * 14, max_sequences=5)
    groups = [engine.add(p, Sampling(20), n=1 + i % 3) for i, p in enumerate(prompts)]
    for _ in range(3):
        engine.step()
    # One that runs, one that waits, and the first of a group whose others wait for it.
    for sequence in (groups[0][0], groups[8][0], groups[8][1], groups[1][1]):
        engine.cancel(sequence)
        engine.cancel(sequence)
    engine.run()
    for group, right in zip(groups, expected):
        for sequence in group:
            assert sequence.reason == "cancelled" or sequence.tokens == right.tokens
    assert [s.reason for s in groups[8]] == ["cancelled", "cancelled", "length"]
    assert engine.pool.free == 14 and not engine.has_work


def test_engine_releases_memory_and_accepts_new_weights():
    model, prompt = tiny(), [4] * 40
    engine = Engine(model, cache_tokens=160)
    (first,) = engine.add(prompt, Sampling(5))
    with pytest.raises(ValueError, match="expected no sequences that have not ended"):
        engine.release()
    engine.run()
    engine.release()
    assert engine.keys is None
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight.mul_(1.5)
    engine.restore()
    (second,) = engine.add(prompt, Sampling(5))
    engine.run()
    fresh = Engine(model, cache_tokens=160)
    (right,) = fresh.add(prompt, Sampling(5))
    fresh.run()
    assert second.cached == 0 and second.logprobs == right.logprobs != first.logprobs
    # Without new weights the pages are found again.
    (third,) = engine.add(prompt, Sampling(5))
    engine.run()
    assert third.cached == 32 and third.logprobs == right.logprobs
    engine.forget()
    (fourth,) = engine.add(prompt, Sampling(5))
    engine.run()
    assert fourth.cached == 0


def test_bytes_of_the_cache():
    model = tiny("tiny-mistral").to(torch.bfloat16)
    engine = Engine(model, cache_tokens=320)
    assert cache_bytes(model, 320 + 16) == engine.keys.nbytes + engine.values.nbytes


@pytest.mark.parametrize(
    ("prompt", "how", "message"),
    [
        ([], {"max_new_tokens": 4}, "prompt: expected 1 to 92 tokens beside 4 new ones, got 0"),
        ([1] * 93, {"max_new_tokens": 4}, "prompt: expected 1 to 92 tokens beside 4 new ones, got 93"),
        ([1], {"max_new_tokens": 96}, "prompt: expected 1 to 0 tokens beside 96"),
        ([1, 600], {"max_new_tokens": 4}, "prompt: expected ids of 0 to 511, got 1 to 600"),
        ([-1], {"max_new_tokens": 4}, "prompt: expected ids of 0 to 511"),
        ([1], {"max_new_tokens": 4, "top_logprobs": -1}, "top_logprobs: expected >= 0"),
    ],
)
def test_what_has_no_room_is_refused(prompt, how, message):
    engine = Engine(tiny(), cache_tokens=96)
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, Sampling(**how))
    assert not engine.has_work


@pytest.mark.parametrize("options", [{"page_size": 24}, {"max_sequences": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="expected"):
        Engine(tiny(), cache_tokens=160, **options)


def test_sizes_of_graphs_cover_every_step():
    for count in range(1, 200):
        size = batch_size(count, 200)
        assert count <= size <= max(200, count) and size - count < 16
    assert {batch_size(n, 200) for n in range(1, 9)} == {1, 2, 4, 8}
    assert [length_size(n, 4096) for n in (1, 512, 513, 2049, 4096)] == [512, 512, 2048, 4096, 4096]


class Eager(DecodeGraphs):
    """What a graph computes, without one."""

    def run(self, step):
        return self.function(step)


# Catches: sequences that are not there and write into somebody's page, or that a larger table reads.
@pytest.mark.parametrize("name", ["tiny", "tiny-mistral", "tiny-mixtral"])
def test_padded_steps_of_graphs_change_nothing(name):
    model, prompts = tiny(name), prompts_of(11, 11)
    rows = []
    for graphs in (False, True):
        engine = Engine(model, cache_tokens=16 * 12, max_sequences=11)
        if graphs:
            engine.graphs = Eager(engine._blocks, engine.device, sequences=11, length=192)
        rows.append([engine.add(p, Sampling(25, 1.0, seed=i))[0] for i, p in enumerate(prompts)])
        engine.run()
    assert [s.tokens for s in rows[0]] == [s.tokens for s in rows[1]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", ["tiny", "tiny-mistral", "tiny-mixtral"])
def test_graphs_give_the_tokens_of_eager_steps(name):
    model, prompts = tiny(name).cuda(), prompts_of(11, 11)
    rows = []
    for graphs in (False, True):
        engine = Engine(model, cache_tokens=64 * 12, max_sequences=11, use_graphs=graphs)
        rows.append([engine.add(p, Sampling(25, 1.0, seed=i))[0] for i, p in enumerate(prompts)])
        engine.run()
    assert [s.tokens for s in rows[0]] == [s.tokens for s in rows[1]]


@pytest.mark.every(3)
@pytest.mark.parametrize("name", ["tiny", "tiny-mistral", "tiny-mixtral"])
def test_the_kernels_of_a_gpu_give_the_same_tokens(name):
    if not (torch.cuda.is_available() or kernels.backend.is_interpreted()):
        pytest.skip("Triton needs a GPU or its interpreter")
    model, prompts = tiny(name), prompts_of(12, 4, longest=20)
    rows = []
    for backend in ("reference", "triton"):
        with kernels.use_backend(backend):
            engine = Engine(model, cache_tokens=16 * 9, max_sequences=4, max_tokens=16)
            rows.append([engine.add(p, Sampling(4))[0] for p in prompts])
            engine.run()
    assert [s.tokens for s in rows[0]] == [s.tokens for s in rows[1]]
    for a, b in zip(*rows):
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=2e-5)
