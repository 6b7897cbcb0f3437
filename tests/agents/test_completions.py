"""What endpoints answer beside a text: every field of a reply is understood or named, no failure becomes a text."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wizard_engine.agents.completions import read_answer, wrong_endpoint
from wizard_engine.agents.missing import check_missing, check_share, shown_reasons
from wizard_engine.agents.protocol import Reply


def completion(content="fine", finish="stop", choices=1, **message):
    said = {"role": "assistant", "content": content, **message}
    return {"choices": [{"index": 0, "message": said, "finish_reason": finish}] * choices}


@pytest.mark.parametrize(
    ("sent", "text", "finish", "error", "extras"),
    [
        (completion(" fine\n"), "fine", "stop", "", ()),
        (completion(finish=None), "fine", "stop", "", ()),
        (completion(finish="eos"), "fine", "stop", "", ()),
        (completion(finish="length"), "fine", "length", "", ()),
        (completion(finish="max_tokens"), "fine", "length", "", ()),
        (completion("", "length"), "", "stop", "length: all of max_tokens=9", ()),
        (
            completion(None, "length", reasoning_content="hm"),
            "",
            "stop",
            "length: .*on reasoning",
            ("reasoning_content",),
        ),
        (completion(finish="content_filter"), "", "stop", "content_filter: ", ()),
        (completion(None, "content_filter"), "", "stop", "content_filter: ", ()),
        (completion(None, refusal="I may not"), "", "stop", "refusal: I may not", ()),
        (completion(None, "tool_calls", tool_calls=[{"id": 1}]), "", "stop", "tool_calls: ", ("tool_calls",)),
        (completion("I look", tool_calls=[{"id": 1}]), "", "stop", "tool_calls: ", ("tool_calls",)),
        (completion(None, function_call={"name": "f"}), "", "stop", "tool_calls: ", ("tool_calls",)),
        (completion(finish="abort"), "", "stop", "finish_reason abort: ", ()),
        (completion(None), "", "stop", "no text: .*nothing in it", ()),
        (completion(""), "", "stop", "no text: .*nothing in it", ()),
        (completion(" \n", reasoning_content="hm"), "", "stop", "no text: .*reasoning_content", ("reasoning_content",)),
        (completion("is \ud800 3"), "", "stop", "invalid text: .*surrogate", ()),
        (completion(None, reasoning="hm"), "", "stop", "no text: an answer with reasoning", ("reasoning",)),
        (completion(reasoning_content="hm", audio={"id": 1}), "fine", "stop", "", ("reasoning_content", "audio")),
        (completion(reasoning_content=None, tool_calls=[], audio=None), "fine", "stop", "", ()),
        (completion([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]), "a b", "stop", "", ()),
        (
            completion([{"type": "thinking"}, {"type": "text", "text": "b"}]),
            "b",
            "stop",
            "",
            ("content part thinking",),
        ),
        (
            completion([{"type": "image_url"}]),
            "",
            "stop",
            "no text: .*content part image_url",
            ("content part image_url",),
        ),
        (completion(choices=2), "fine", "stop", "", ("more than one choice",)),
        ({"choices": []}, "", "stop", "no text: ", ()),
        ("<html>", "", "stop", "no text: ", ()),
    ],
)
def test_every_field_of_a_reply_is_understood_or_named(sent, text, finish, error, extras):
    answer = read_answer(sent, 9)
    assert (answer.text, answer.finish, answer.extras) == (text, finish, extras)
    assert (answer.error == "") == (error == "")
    assert re.match(error, answer.error)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20), st.one_of(st.none(), st.text(max_size=20)))
def test_an_unknown_finish_reason_is_never_an_answer_and_unknown_fields_are_named(finish, content):
    answer = read_answer(completion(content, f"x{finish}", citations=["u"]), 9)
    assert answer.error and answer.text == "" and "citations" in answer.extras


OURS = {"model", "max_tokens", "temperature", "seed"}


@pytest.mark.parametrize(
    ("status", "message", "body", "why"),
    [
        (404, "Not Found", None, "does not know the model or the address"),
        (404, "The model `m` does not exist", {"code": "model_not_found"}, "does not know the model"),
        (401, "bad key", None, "refuses the key"),
        (402, "no credits", None, "wants a payment"),
        (405, "Method Not Allowed", None, "does not take such calls"),
        (429, "slow down", {"code": "rate_limit_exceeded"}, ""),
        (429, "You exceeded your current quota", {"code": "insufficient_quota"}, "quota is spent"),
        (
            400,
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
            {"param": "max_tokens", "code": "unsupported_parameter"},
            "refuses the option max_tokens; give #token_limit=max_completion_tokens",
        ),
        (
            400,
            "Unsupported value: 'temperature' does not support 0.0 with this model.",
            {"param": "temperature", "code": "unsupported_value"},
            "refuses the option temperature; give #temperature=no",
        ),
        (
            422,
            "extra_forbidden: body.seed: Extra inputs are not permitted",
            {"detail": []},
            "option seed; give #seed=no",
        ),
        (400, "model m is unknown", None, "refuses the option model"),
        (
            400,
            "'max_tokens' is too large: 4096. This model's maximum context length is 4096",
            {"param": "max_tokens"},
            "",
        ),
        (400, "your messages are too long", None, ""),
        (400, "content not allowed by policy", None, ""),
        (500, "unsupported max_tokens", None, ""),
    ],
)
def test_refusals_of_the_endpoint_are_told_from_those_of_a_request(status, message, body, why):
    found = wrong_endpoint(status, message, {"error": body} if body else None, OURS)
    assert why in found and bool(why) == bool(found)
    assert wrong_endpoint(status, message, body, OURS) == found


def test_replies_say_their_reason_in_a_word():
    assert (Reply("a").reason, Reply("a", finish="length").reason) == ("", "length")
    assert Reply("", "status 400: too long: by 3").reason == "status 400"
    assert Reply("", "timed out").reason == "timed out" and Reply("", "x" * 80).reason == "call failed"
    assert not Reply("", "x", finish="length").is_cut


def test_more_than_the_share_of_missing_replies_is_an_error_that_says_why():
    check_missing("answers of m", {"length": 5}, 100, 0.05)
    check_missing("answers of m", {}, 0, 0.0)
    with pytest.raises(
        ValueError, match=r"answers of m: expected at most 5 % missing, got 6 of 100 \(length 5, status 400 1"
    ):
        check_missing("answers of m", {"status 400": 1, "length": 5}, 100, 0.05)
    with pytest.raises(ValueError, match="raise --max-tokens, or mend"):
        check_missing("answers of m", {"length": 1}, 1, 0.05, "raise --max-tokens")
    with pytest.raises(ValueError, match="max_missing: expected a share from 0 to 1, got 5"):
        check_share(5)
    assert shown_reasons({"a\x1b": 1, "b": 2}) == "b 2, a\\x1b 1"
