"""The OpenAI API of a server: shapes of answers and streams, every field, and one shape of errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerFast

from fake_engine import FakeRunner, Live, live, spoken
from foreword.base import BaseModel
from foreword.engine import Finished, Request
from tiny import tiny_model, tiny_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def chatty_base() -> BaseModel:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer()._tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return BaseModel(tiny_model("llama"), tokenizer, "tiny-llama")


def script(request: Request) -> list[int | Finished]:
    """What `answers` says for a prompt, else the prompt over and over."""
    said = answers.get(request.prompt)
    if said is None:
        return [request.prompt[k % len(request.prompt)] for k in range(request.max_new_tokens)]
    return said[: request.max_new_tokens]


answers: dict[tuple[int, ...], list[int | Finished]] = {}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(chatty_base(), FakeRunner(script), tmp_path_factory.mktemp("api") / "store") as running:
        yield running


def says(server: Live, prompt: str, *answer: str | int | Finished) -> str:
    """Let the engine answer a prompt."""
    codec = server.service.codec
    said: list[int | Finished] = []
    for each in answer:
        said += codec.encode(each, special=False) if isinstance(each, str) else [each]
    answers[tuple(codec.encode(prompt))] = said
    return prompt


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a stream, which ends as it should."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def streamed(server: Live, **body: Any) -> tuple[str, str | None]:
    """The text of a stream's first choice, and why it ended."""
    found = events(server.complete(stream=True, **body))
    reasons = [each["choices"][0]["finish_reason"] for each in found]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    return "".join(each["choices"][0]["text"] for each in found), reasons[-1]


def test_a_completion_has_the_shape_of_openai(server: Live) -> None:
    prompt = says(server, "A foreword", " is short.", 2)
    answer = server.complete(prompt=prompt, max_tokens=30)
    told = answer.json()
    assert answer.status_code == 200
    assert told["object"] == "text_completion" and told["id"].startswith("cmpl-") and told["model"] == "tiny-llama"
    assert told["choices"] == [{"index": 0, "text": " is short.", "finish_reason": "stop", "logprobs": None}]
    count = len(server.service.codec.encode(" is short.", special=False))
    prompts = len(server.service.codec.encode(prompt))
    assert told["usage"] == {"prompt_tokens": prompts, "completion_tokens": count, "total_tokens": prompts + count}


def test_defaults_are_those_of_openai(server: Live) -> None:
    assert server.complete(prompt="defaults").json()["choices"][0]["finish_reason"] == "length"
    request = server.runner.requests[-1]
    assert request.max_new_tokens == 16
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.seed) == (1.0, 1.0, None)
    assert request.prefix is None and request.tenant == "" and 2 in request.stop_tokens


def test_options_reach_the_engine(server: Live) -> None:
    options = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "presence_penalty": 1, "frequency_penalty": -1.5, "seed": 11,
        "logit_bias": {"5": -100, "7": 1.5}, "logprobs": 3, "max_tokens": 4, "ignore_eos": True, "user": "somebody",
        "metadata": {"a": 1}, "store": True, "best_of": 1,
    }  # fmt: skip
    assert server.complete(prompt="options", **options).status_code == 200
    request = server.runner.requests[-1]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.5, 0.25, 7, 11)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1.0, -1.5)
    assert sampling.logit_bias == {5: -100.0, 7: 1.5} and sampling.logprobs == 3
    assert request.stop_tokens == frozenset() and 0 < request.deadline_seconds <= 600


def test_no_mass_leaves_the_likeliest(server: Live) -> None:
    assert server.complete(prompt="greedy", top_p=0).status_code == 200
    assert server.runner.requests[-1].sampling.temperature == 0


def test_choices_have_seeds_of_their_own(server: Live) -> None:
    told = server.complete(prompt=["abc", "xyz"], n=3, seed=5, max_tokens=1).json()
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2, 3, 4, 5]
    assert [request.sampling.seed for request in server.runner.requests[-6:]] == [5, 6, 7, 5, 6, 7]
    assert [choice["text"] for choice in told["choices"]] == ["a", "a", "a", "x", "x", "x"]
    assert told["usage"]["completion_tokens"] == 6
    assert told["usage"]["prompt_tokens"] == sum(len(server.service.codec.encode(each)) for each in ("abc", "xyz"))
    edge = (1 << 63) - 1
    assert server.complete(prompt="x", n=2, seed=edge).status_code == 200
    assert server.runner.requests[-1].sampling.seed == 0


def test_a_stream_says_what_the_whole_answer_says(server: Live) -> None:
    prompt = says(server, "stream", "Many hands 🙂 make light work.", 2)
    whole = server.complete(prompt=prompt, max_tokens=50).json()["choices"][0]
    assert streamed(server, prompt=prompt, max_tokens=50) == (whole["text"], whole["finish_reason"])


def test_usage_comes_last_in_a_stream_that_asks_for_it(server: Live) -> None:
    prompt = says(server, "usage", "abc", 2)
    found = events(server.complete(prompt=prompt, stream=True, stream_options={"include_usage": True}))
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == 3
    assert all(each["usage"] is None for each in found[:-1])
    assert all("usage" not in each for each in events(server.complete(prompt=prompt, stream=True)))


def test_a_stream_of_several_choices_tells_each(server: Live) -> None:
    found = events(server.complete(prompt=["abc", "xyz"], n=2, max_tokens=3, stream=True))
    texts = ["", "", "", ""]
    for each in found:
        texts[each["choices"][0]["index"]] += each["choices"][0]["text"]
    assert texts == ["abc", "abc", "xyz", "xyz"]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_the_text_and_the_engine(server: Live, stream: bool) -> None:
    prompt = says(server, "stop", "one END", " two", *["three"] * 8)
    for stop in ("END", ["XX", "END"], [" END two", "three"]):
        if stream:
            text, reason = streamed(server, prompt=prompt, stop=stop, max_tokens=50)
        else:
            choice = server.complete(prompt=prompt, stop=stop, max_tokens=50).json()["choices"][0]
            text, reason = choice["text"], choice["finish_reason"]
        assert (text, reason) == ("one" if isinstance(stop, list) and "three" in stop else "one ", "stop")
        assert server.runner.wait_idle()


def test_a_stop_string_that_never_comes_is_told_at_the_end(server: Live) -> None:
    prompt = says(server, "nearly", "one EN", 2)
    assert streamed(server, prompt=prompt, stop="END") == ("one EN", "stop")


def test_log_probabilities_of_completions(server: Live) -> None:
    prompt = says(server, "logprobs", "a🙂b END", 2)
    told = server.complete(prompt=prompt, logprobs=2, stop=" END", max_tokens=50).json()["choices"][0]
    assert told["text"] == "a🙂b"
    tokens, offsets = told["logprobs"]["tokens"], told["logprobs"]["text_offset"]
    assert tokens[0] == "a" and tokens[-1] == "b" and all(each.startswith("bytes:\\x") for each in tokens[1:-1])
    assert offsets == [0, *[1] * (len(tokens) - 2), 2]
    assert told["logprobs"]["token_logprobs"] == [-0.5] * len(tokens)
    names = [server.service.codec.piece(3)[0], server.service.codec.piece(4)[0]]
    assert told["logprobs"]["top_logprobs"][0] == {names[0]: -1.0, names[1]: -2.0, "a": -0.5}
    found = events(server.complete(prompt=prompt, logprobs=2, stop=" END", max_tokens=50, stream=True))
    parts = [each["choices"][0]["logprobs"] for each in found]
    assert [name for part in parts for name in part["tokens"]] == tokens
    assert [offset for part in parts for offset in part["text_offset"]] == offsets
    none = server.complete(prompt=prompt, logprobs=0).json()["choices"][0]["logprobs"]
    assert none["top_logprobs"][0] == {"a": -0.5}


def test_echo_begins_with_the_prompt(server: Live) -> None:
    told = server.complete(prompt=["abc", "xyz"], echo=True, max_tokens=3).json()
    assert [choice["text"] for choice in told["choices"]] == ["abcabc", "xyzxyz"]
    found = events(server.complete(prompt="abc", echo=True, max_tokens=3, stream=True))
    assert "".join(each["choices"][0]["text"] for each in found) == "abcabc"
    ids = server.service.codec.encode("xyz", special=False)
    assert server.complete(prompt=ids, echo=True, max_tokens=3).json()["choices"][0]["text"] == "xyzxyz"


def test_prompts_may_be_token_ids(server: Live) -> None:
    assert server.complete(prompt=[5, 6, 7], max_tokens=1).status_code == 200
    assert server.runner.requests[-1].prompt == (5, 6, 7)
    assert server.complete(prompt=[[5, 6], [7]], max_tokens=1).status_code == 200
    assert [request.prompt for request in server.runner.requests[-2:]] == [(5, 6), (7,)]


def chat(server: Live, content: Any = "Hi.", **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": content}]
    return server.ask("POST", "/v1/chat/completions", json={"model": "tiny-llama", "messages": messages, **body})


def test_a_chat_has_the_shape_of_openai(server: Live) -> None:
    says(server, "[user]Hi.>", "Hello.", 2)
    told = chat(server).json()
    assert told["object"] == "chat.completion" and told["id"].startswith("chatcmpl-")
    (choice,) = told["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello.", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    request = server.runner.requests[-1]
    assert len(request.prompt) + request.max_new_tokens == 64  # what is left of the context


def test_a_chat_streams(server: Live) -> None:
    says(server, "[user]Hi.>", "Hello.", 2)
    found = events(chat(server, stream=True, stream_options={"include_usage": True}))
    assert found[0]["object"] == "chat.completion.chunk"
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [each["choices"][0]["delta"] for each in found[1:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello."
    assert found[-2]["choices"][0]["finish_reason"] == "stop" and found[-2]["choices"][0]["delta"] == {}
    assert found[-1]["usage"]["completion_tokens"] == len(server.service.codec.encode("Hello.", special=False))


def test_a_chat_tells_log_probabilities(server: Live) -> None:
    says(server, "[user]Hi.>", "Hé.", 2)
    content = chat(server, logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for each in content for byte in each["bytes"]).decode() == "Hé."
    assert all(each["logprob"] == -0.5 and len(each["top_logprobs"]) == 1 for each in content)
    assert chat(server, logprobs=True).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    found = events(chat(server, logprobs=True, top_logprobs=1, stream=True))
    told = [each["choices"][0]["logprobs"] for each in found]
    assert [each for part in told if part for each in part["content"]] == content


def test_a_chat_takes_parts_and_developers(server: Live) -> None:
    messages = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}], "name": "me"},
    ]
    body = {"model": "tiny-llama", "messages": messages, "max_completion_tokens": 2, "tools": [], "tool_choice": "none"}
    assert server.ask("POST", "/v1/chat/completions", json=body).status_code == 200
    assert server.service.codec.decode(server.runner.requests[-1].prompt) == "[system]Be short.[user]AB>"
    assert server.runner.requests[-1].max_new_tokens == 2


def test_text_and_tokens(server: Live) -> None:
    told = server.ask("POST", "/tokenize", json={"prompt": "A prefix 🙂"}).json()
    assert told["count"] == len(told["tokens"]) and told["max_model_len"] == 64
    back = server.ask("POST", "/detokenize", json={"model": "tiny-llama", "tokens": told["tokens"]}).json()
    assert back == {"prompt": "A prefix 🙂"}
    messages = [{"role": "user", "content": "A"}]
    told = server.ask("POST", "/tokenize", json={"messages": messages}).json()
    assert server.service.codec.decode(told["tokens"]) == "[user]A>"
    long = "long " * 3000  # tokenized beside the event loop
    assert server.ask("POST", "/tokenize", json={"prompt": long}).json()["tokens"] == server.service.codec.encode(long)


def test_state(server: Live) -> None:
    assert server.ask("GET", "/health").json() == {"status": "ok"}
    assert server.ask("GET", "/ready").json() == {"status": "ready"}
    assert set(server.ask("GET", "/version").json()) == {"version"}


def test_metrics(server: Live) -> None:
    server.complete(prompt="measured", max_tokens=3)
    answer = server.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    for line in (
        "foreword_num_requests_running 0", "foreword_num_requests_waiting 0", "foreword_prefix_bank_hits_total 4",
        "foreword_prefix_bank_misses_total 5", "foreword_prefix_bank_evictions_total 0", "foreword_prefix_bank_bytes 0",
        "foreword_time_to_first_token_seconds_count", "foreword_inter_token_latency_seconds_count",
        "foreword_e2e_request_latency_seconds_count", "foreword_prompt_tokens_total",
        "foreword_generation_tokens_total",
        'foreword_request_success_total{finished_reason="length"}',
    ):  # fmt: skip
        assert line in answer.text
    server.ask("GET", "/v1/models/tiny-llama:a-name")
    assert "a-name" not in server.ask("GET", "/metrics").text
    assert 'foreword_requests_refused_total{reason="model_not_found"}' in server.ask("GET", "/metrics").text


# Errors

WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"max_tokens": "5"}, "max_tokens", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, "max_tokens", "invalid_value"),
    ({"max_tokens": 10**30}, "max_tokens", "invalid_value"),
    ({"max_tokens": 100}, "prompt", "context_length_exceeded"),
    ({"prompt": "long " * 100}, "prompt", "context_length_exceeded"),
    ({"prompt": ""}, "prompt", "invalid_value"),
    ({"prompt": []}, "prompt", "invalid_value"),
    ({"prompt": [[]]}, "prompt", "invalid_value"),
    ({"prompt": None}, "prompt", "invalid_value"),
    ({"prompt": [1, "a"]}, "prompt", "invalid_value"),
    ({"prompt": [300]}, "prompt", "invalid_value"),
    ({"prompt": [-1]}, "prompt", "invalid_value"),
    ({"prompt": {"a": 1}}, "prompt", "invalid_value"),
    ({"temperature": -0.1}, "temperature", "invalid_value"),
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"top_p": 1.1}, "top_p", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 129}, "n", "invalid_value"),
    ({"n": 100, "prompt": ["a", "b"]}, "n", "invalid_value"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": [""]}, "stop", "invalid_value"),
    ({"stop": 5}, "stop", "invalid_value"),
    ({"logprobs": 21}, "logprobs", "invalid_value"),
    ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_value"),
    ({"logit_bias": {"300": 1}}, "logit_bias", "invalid_value"),
    ({"seed": 1 << 63}, "seed", "invalid_value"),
    ({"presence_penalty": 3}, "presence_penalty", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_field"),
    ({"echo": True, "logprobs": 1}, "echo", "invalid_value"),
    ({"best_of": 3}, "best_of", "invalid_value"),
    ({"suffix": "the end"}, "suffix", "invalid_value"),
    ({"repetition_penalty": 1.1}, "repetition_penalty", "unknown_field"),
    ({"guided_json": "{}"}, "guided_json", "unknown_field"),
    ({"kv_transfer_params": {}}, "kv_transfer_params", "unknown_field"),
    ({"model": 5}, "model", "invalid_value"),
    ({"model": ""}, "model", "invalid_value"),
]


@pytest.mark.parametrize(("change", "param", "code"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_is_refused_by_name(server: Live, change: dict[str, Any], param: str, code: str) -> None:
    before = len(server.runner.requests)
    answer = server.complete(**change)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
    assert len(server.runner.requests) == before


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"), ({"functions": []}, "functions"),
        ({"modalities": ["audio"]}, "modalities.0"), ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": []}, "messages"), ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "messages.0.tool_calls"),
        ({"max_tokens": 64}, "messages"), ({"echo": True}, "echo"), ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_a_chat_cannot_do_is_refused_by_name(server: Live, change: dict[str, Any], param: str) -> None:
    answer = chat(server, **change)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(param), answer.text


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400), (b"", {}, 400), (b"[1]", {}, 400), (b"null", {}, 400), (b'"x"', {}, 400),
        (b"\xff\xfe", {}, 400), (b"[" * 100_000, {}, 400), (b'{"a":' * 100_000, {}, 400),
        (b'{"model": "tiny-llama", "prompt": "x", "temperature": NaN}', {}, 400),
        (b'{"model": "tiny-llama", "prompt": "x", "temperature": Infinity}', {}, 400),
        (b'{"model": "tiny-llama", "prompt": "x", "temperature": 1e999}', {}, 400),
        (b'{"model": "tiny-llama", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", {}, 400),
        (b'{"model": "tiny-llama", "prompt": "\\ud800"}', {}, 400),
        (b'{"model": "\\ud800", "prompt": "x"}', {}, 400),
        (b'{"model": "tiny-llama", "prompt": "x", "\\ud800": 1}', {}, 400),
        (b'{"model": "tiny-llama", "prompt": "x", "stop": ["\\udfff"]}', {}, 400),
        (b'{"model": "tiny-llama", "prompt": "x"}', {"content-type": "text/plain"}, 400),
        (b'{"model": "tiny-llama", "prompt": "x"}', {"content-type": "multipart/form-data"}, 400),
        (b'{"model": "tiny-llama", "prompt": "x", "user": "\\u0000"}', {}, 200),
        (b'{"model": "tiny-llama", "prompt": "x", "metadata": {"a": "\\ud800"}}', {}, 200),
        (b'{"model": "tiny-llama", "prompt": "x", "prompt": "y"}', {}, 200),
    ],
    ids=lambda value: repr(value)[:50],
)  # fmt: skip
def test_malformed_bodies(server: Live, content: bytes, headers: dict[str, str], status: int) -> None:
    answer = server.ask(
        "POST", "/v1/completions", content=content, headers={"content-type": "application/json", **headers}
    )
    assert answer.status_code == status, answer.text
    if status != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert server.ask("GET", "/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405), ("GET", "/nope", 404),
        ("GET", "/v1/models/", 404), ("GET", "/docs", 404), ("PUT", "/tokenize", 405), ("GET", "//v1/models", 404),
        ("GET", "/v1/models/tiny-llama:none", 404), ("GET", "/v1/models/%ff%00", 404), ("GET", "/", 404),
    ],
)  # fmt: skip
def test_wrong_paths_and_methods(server: Live, method: str, path: str, status: int) -> None:
    answer = server.ask(method, path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_an_engine_that_fails_tells_nothing_of_its_inside(server: Live) -> None:
    prompt = says(server, "failing", "ab", Finished("error", "secret detail"))
    answer = server.complete(prompt=prompt)
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["code"] == "generation_failed"
    found = events(server.complete(prompt=prompt, stream=True))
    assert found[-1]["error"]["code"] == "generation_failed"
    first = says(server, "failing at once", Finished("error", "secret detail"))
    assert server.complete(prompt=first, stream=True).status_code == 500


def test_a_mistake_of_the_server_is_a_plain_500(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.service, "resolve", fail)
    answer = server.complete()
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


def test_a_base_that_no_template_knows_has_no_chats(tmp_path: Path) -> None:
    base = BaseModel(tiny_model("llama"), tiny_tokenizer(), "tiny-llama")
    with live(base, FakeRunner(spoken([5])), tmp_path / "store") as running:
        answer = chat(running)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_chat_template"
        assert "/v1/completions" in answer.json()["error"]["message"]


def test_the_client_of_openai(server: Live) -> None:
    says(server, "[user]Hi.>", "Hello.", 2)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny-llama"]
        assert client.models.retrieve("tiny-llama").max_model_len == 64
        told = client.chat.completions.create(model="tiny-llama", messages=[{"role": "user", "content": "Hi."}])
        assert told.choices[0].message.content == "Hello." and told.usage.completion_tokens > 0
        parts = client.chat.completions.create(
            model="tiny-llama", messages=[{"role": "user", "content": "Hi."}], stream=True, logprobs=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        found = list(parts)
        assert "".join(each.choices[0].delta.content or "" for each in found if each.choices) == "Hello."
        assert found[-1].usage.completion_tokens == told.usage.completion_tokens
        plain = client.completions.create(
            model="tiny-llama", prompt="abc", max_tokens=3, logprobs=1, echo=False, seed=1
        )
        assert plain.choices[0].text == "abc" and plain.choices[0].logprobs.tokens == ["a", "b", "c"]
        pieces = client.completions.create(model="tiny-llama", prompt="abc", max_tokens=3, stream=True)
        assert "".join(each.choices[0].text for each in pieces) == "abc"
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="tiny-llama:none", prompt="x")
        assert missing.value.code == "model_not_found" and missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(model="tiny-llama", prompt="x", max_tokens=1000)
        assert wrong.value.code == "context_length_exceeded"
        prompt = says(server, "broken", "ab", Finished("error"))
        with pytest.raises(openai.APIError, match="failed"):
            list(client.completions.create(model="tiny-llama", prompt=prompt, stream=True))
