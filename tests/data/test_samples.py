"""Row files to samples: places of bad rows, and counts of those left out."""

import json

import pytest

from wizard_engine.data.samples import answer_pair, read_pairs, read_samples
from wizard_engine.data.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["how many apples are there", "there are two apples"] * 4, vocab_size=300)
SHORT = json.dumps({"question": "how many?", "answer": "two"})
LONG = json.dumps({"question": "how many?", "answer": "apples " * 200})


def read(tmp_path, *files: str, on_error: str = "skip"):
    paths = []
    for index, text in enumerate(files):
        paths.append(tmp_path / f"{index}.jsonl")
        paths[-1].write_text(text)
    rejects = tmp_path / "rejects.jsonl"
    return read_samples(paths, TOKENIZER, kind="conversation", max_length=260, on_error=on_error, rejects=rejects)


def test_read_samples_names_the_line_of_a_sample_that_is_too_long(tmp_path):
    with pytest.raises(ValueError, match=r"0.jsonl:3: sample: expected at most 260 tokens, got \d+; .*--on-error skip"):
        read(tmp_path, f"{SHORT}\n\n{LONG}\n", on_error="raise")


def test_read_samples_counts_unreadable_records_of_every_file_and_refused_samples(tmp_path):
    samples, rejected = read(tmp_path, f"{SHORT}\nbroken\n{LONG}\n", f"nonsense\n{SHORT}\n")
    assert (len(samples), rejected) == (2, 3)
    refused = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    unread = [json.loads(line) for line in (tmp_path / "unread_rejects.jsonl").read_text().splitlines()]
    assert [line["where"] for line in refused] == [f"{tmp_path}/0.jsonl:3"]
    assert [(line["path"], line["line"]) for line in unread] == [
        (f"{tmp_path}/0.jsonl", 2),
        (f"{tmp_path}/1.jsonl", 1),
    ]


def test_read_pairs_counts_unreadable_records_too(tmp_path):
    pair = {"prompt": [{"role": "user", "content": "how many?"}], "chosen": "two", "rejected": "three"}
    same = pair | {"rejected": "two"}
    (tmp_path / "p.jsonl").write_text("\n".join([json.dumps(pair), "{", json.dumps(same)]))
    pairs, rejected = read_pairs(
        [tmp_path / "p.jsonl"],
        lambda row: answer_pair(TOKENIZER, row, 260, 1024),
        on_error="skip",
        rejects=tmp_path / "rejects.jsonl",
    )
    assert (len(pairs), rejected) == (1, 2)


def read_text(tmp_path, text, **options):
    path = tmp_path / "text.jsonl"
    path.write_bytes(text.encode())
    options = {"kind": "text", "max_length": 20, "on_error": "skip", "rejects": tmp_path / "rejects.jsonl"} | options
    return read_samples([path], TOKENIZER, **options)


def test_read_samples_of_texts_counts_bad_lines_and_keeps_separators_of_unicode_in_the_text(tmp_path):
    lines = [{"text": "two\u2028 apples\x85"}, "nonsense", {"other": 1}, {"text": "apples " * 40}, {"text": "two"}]
    text = "\r\n\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    samples, rejected = read_text(tmp_path, "\ufeff" + text)
    assert (len(samples), rejected) == (2, 3)
    assert TOKENIZER.decode(samples[0].tokens[1:-1].tolist()) == "two\u2028 apples\x85"
    with pytest.raises(ValueError, match=r"text\.jsonl:3: record: expected an object, got str 'nonsense'"):
        read_text(tmp_path, text, on_error="raise")
    samples, rejected = read_text(tmp_path, text, truncate=True)
    assert (len(samples), rejected) == (3, 2)
    assert [bool(sample.cut) for sample in samples] == [False, True, False] and len(samples[1].tokens) == 20
    assert samples[1].tokens[-1] != TOKENIZER.eos_id


def test_read_samples_truncates_conversations_and_says_how_much(tmp_path):
    (tmp_path / "0.jsonl").write_text(f"{SHORT}\n{LONG}\n")
    options = {"kind": "conversation", "on_error": "raise", "rejects": tmp_path / "r.jsonl", "truncate": True}
    samples, rejected = read_samples([tmp_path / "0.jsonl"], TOKENIZER, max_length=260, **options)
    assert rejected == 0 and samples[0].cut == 0 and samples[1].cut > 0 and len(samples[1].tokens) == 260


def test_read_samples_does_not_train_answers_of_weight_0(tmp_path):
    turns = [("user", "how many?"), ("assistant", "two"), ("user", "how many?"), ("assistant", "apples")]
    messages = [{"role": role, "content": text} for role, text in turns]
    messages[1]["weight"] = 0
    (tmp_path / "0.jsonl").write_text(json.dumps({"messages": messages}))
    options = {"kind": "conversation", "on_error": "raise", "rejects": tmp_path / "r.jsonl"}
    (sample,), _ = read_samples([tmp_path / "0.jsonl"], TOKENIZER, max_length=260, **options)
    assert TOKENIZER.decode(sample.tokens[sample.weights > 0].tolist()).strip() == "apples"
