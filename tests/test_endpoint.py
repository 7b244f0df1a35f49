"""Calls to a model server: a real one on the loopback address that answers, refuses, stalls and breaks off."""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from pathlib import Path

import pytest
from loopback_server import Said, asked, error, serving

from piggyback_lens.errors import LensError
from piggyback_lens.files import read_jsonl
from piggyback_lens.measuring.endpoint import Endpoint, Failure, Reply, Request

pytest.importorskip("openai")

KEY = "sk-test-4f9c2a71d0e8"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-somebody-else")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    """The client's own waiting, shortened; what a server asks for with Retry-After is not."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.02)


def endpoint(server, **changes):
    return Endpoint(server.url, "m", **{"key_variable": "TEST_KEY", "retries": 1, "timeout": 5.0, **changes})


def echo(body, _):
    return f"you said {asked(body)}"


def texts(outcomes):
    return [outcome.text for outcome in outcomes]


# ---------------------------------------------------------------- replies


def test_replies_come_in_order_with_what_was_asked():
    with serving(echo) as server:
        found = endpoint(server).ask([f"q{i}" for i in range(30)])
    assert texts(found) == [f"you said q{i}" for i in range(30)]
    assert found[0] == Reply("you said q0", "stop", None, 7, 3)
    assert server.seen[0] == {
        "model": "m", "messages": server.seen[0]["messages"], "max_tokens": 600, "temperature": 0.0, "top_p": 1.0,
    }  # fmt: skip


def test_settings_of_a_request_reach_the_server_and_a_field_can_be_left_out():
    request = Request([{"role": "user", "content": "x"}], 9, 0.5, 0.9, seed=3, top=5)
    with serving(echo) as server:
        own = endpoint(server, limit_field="max_completion_tokens", parameters={"top_p": None, "reasoning": "low"})
        own.ask([request])
    assert {name: value for name, value in server.seen[0].items() if name != "messages"} == {
        "model": "m", "max_completion_tokens": 9, "temperature": 0.5, "seed": 3, "logprobs": True, "top_logprobs": 5,
        "reasoning": "low",
    }  # fmt: skip


def test_log_probabilities_of_the_first_token_come_back_and_nonsense_among_them_is_left_out():
    top = {"90": -0.1, "80": -2.5, "x": 7.0, "y": float("nan")}
    with serving(lambda body, n: Said("90", top)) as server:
        (found,) = endpoint(server).ask([Request([{"role": "user", "content": "x"}], top=20)])
    assert found.top == (("90", -0.1), ("80", -2.5))


def test_it_can_be_asked_inside_a_running_loop():
    async def notebook(own):
        return own.ask(["a"])

    with serving(echo) as server:
        assert texts(asyncio.run(notebook(endpoint(server)))) == ["you said a"]


def test_no_more_calls_run_at_once_than_was_allowed():
    with serving(lambda body, n: Said("x", wait=0.03)) as server:
        endpoint(server, concurrency=4).ask([f"{i}" for i in range(24)])
    assert server.peak == 4


# ---------------------------------------------------------------- failures


def test_after_429_the_client_waits_as_long_as_the_server_says():
    def busy_once(body, number):
        return error(429, "slow down", Retry_After="0.6") if number == 0 else "fine"

    with serving(busy_once) as server:
        began = time.monotonic()
        found = endpoint(server).ask(["a"])
    assert texts(found) == ["fine"]
    assert time.monotonic() - began >= 0.6
    assert server.calls == 2


BAD = {
    "busy": (error(429, "slow down", Retry_After="0.01"), "status 429: .*slow down"),
    "broken": (error(500, "it broke"), "status 500: .*it broke"),
    "too long": (error(400, "maximum context length is 8"), "status 400: .*context length"),
    "slow": (Said("late", wait=0.8), "no whole answer within 0.3 seconds, 2 times"),
    "cut": (Said("text", cut=20), "Connection error. .*"),
    "malformed": (Said(body=b'{"choices": ['), "the body is no readable JSON"),
    "not utf-8": (Said(body=b'{"a": "\xff"}'), "the body is no readable JSON"),
    "deep": (Said(body=b"[" * 100_000), "the body is no readable JSON"),
    "a page": (Said(body=b"<html>hi</html>", headers={"Content-Type": "text/html"}), "no readable JSON"),
    "another shape": (Said(body=b'{"choices": []}'), "no chat completion: .*choices"),
    "a list": (Said(body=b"[1, 2]"), "no chat completion"),
    "no text": (Said(None, ended="length"), "no whole text came; it ended with length"),
    "a number": (Said(7), "no whole text came"),
    "filtered": (Said("so fa", ended="content_filter"), "no whole text came; it ended with content_filter"),
    "huge": (Said("x" * 1_000_001), "the text has 1,000,001 characters"),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_row_has_a_reason_and_the_others_their_replies(kind):
    said, reason = BAD[kind]
    with serving(lambda body, n: said if asked(body) == "bad" else "good") as server:
        found = endpoint(server, timeout=0.3).ask(["a", "bad", "b"])
    assert [type(outcome) for outcome in found] == [Reply, Failure, Reply]
    assert re.search(reason, found[1].reason), found[1].reason


def test_a_text_that_cannot_be_encoded_fails_alone():
    with serving(echo) as server:
        found = endpoint(server).ask(["a", "half \ud800"])
    assert isinstance(found[0], Reply)
    assert isinstance(found[1], Failure)
    assert "surrogates" in found[1].reason


def test_a_server_that_drips_does_not_keep_a_place_for_ever():
    with serving(lambda body, n: Said("x", drip=0.05)) as server:
        began = time.monotonic()
        (found,) = endpoint(server, timeout=0.4, retries=0).ask(["a"])
    assert time.monotonic() - began < 2
    assert "no whole answer" in found.reason


STOPS = {
    "key": (error(401, f"Incorrect key: {KEY}"), r"the API key is refused by .*401.*\[key\].*check TEST_KEY"),
    "forbidden": (error(403, "not yours"), "the API key is refused by .*403"),
    "model": (error(404, "no such model"), "model 'm' is not known at .*404: .*no such model"),
    "model at 400": (error(400, "nope", "model_not_found"), "model 'm' is not known"),
    "credit": (error(429, "quota", "insufficient_quota", Retry_After="0.01"), "there is no credit left"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STOPS)
def test_what_no_row_survives_stops_the_run_at_once(kind):
    said, told = STOPS[kind]
    with serving(lambda body, n: said) as server, pytest.raises(LensError, match=told) as caught:
        endpoint(server, concurrency=3).ask([f"{i}" for i in range(200)])
    assert server.calls <= 3 * 2
    assert "\n" not in str(caught.value)
    below = caught.value.__traceback__.tb_next  # of this frame, whose server knows the key
    whole = traceback.TracebackException(type(caught.value), caught.value, below, capture_locals=True)
    told = "".join(whole.format())
    assert "in _work" in told
    assert KEY not in told


def test_a_refusal_of_one_text_with_403_after_other_replies_is_that_rows():
    with serving(lambda body, n: error(403, "flagged") if asked(body) == "bad" else "good") as server:
        found = endpoint(server, concurrency=1).ask(["a", "bad", "b"])
    assert [type(outcome) for outcome in found] == [Reply, Failure, Reply]


def test_a_server_that_is_not_there_ends_the_run_and_a_few_requests_have_reasons():
    with serving(echo) as server:
        pass
    with pytest.raises(LensError, match="cannot be reached: 5 requests failed and none was answered"):
        endpoint(server, concurrency=2).ask([f"{i}" for i in range(500)])
    assert [type(outcome) for outcome in endpoint(server).ask(["a", "b"])] == [Failure, Failure]


# ---------------------------------------------------------------- the key


def test_the_key_is_sent_and_is_in_no_file_no_message_and_no_log(tmp_path, caplog, capfd):
    cache = tmp_path / "cache.jsonl"

    def leaky(body, number):
        return error(400, f"bad key {KEY}") if asked(body) == "bad" else f"your key is {KEY}"

    with caplog.at_level(logging.DEBUG), serving(leaky) as server:
        own = endpoint(server, cache=cache)
        found = own.ask(["a", "bad"], progress="asking")
    assert server.keys[0] == f"Bearer {KEY}"
    assert found[0].text == "your key is [key]"
    told = [repr(own), repr(found), caplog.text, *capfd.readouterr(), *(p.read_text() for p in tmp_path.iterdir())]
    assert not [text for text in told if KEY in text]


def test_without_a_variable_no_key_of_the_surroundings_is_sent():
    with serving(echo) as server:
        endpoint(server, key_variable=None).ask(["a"])
    assert server.keys == ["Bearer none"]


def test_a_key_in_place_of_a_variables_name_is_refused_without_being_shown():
    for key in (KEY, "0123abcd" * 5):
        with pytest.raises(LensError, match="no name of an environment variable") as caught:
            Endpoint("http://h/v1", "m", key_variable=key)
        assert key not in str(caught.value)
    with pytest.raises(LensError, match="no address such as") as caught:
        Endpoint(f"http://user:{KEY}@h/v1", "m")
    assert KEY not in str(caught.value)


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    with serving(echo) as server, pytest.raises(LensError, match="variable TEST_KEY holds no API key"):
        endpoint(server).ask(["a"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"concurrency": 0}, "concurrency is 0"), ({"timeout": 0.0}, "timeout is 0"), ({"model": " "}, "model is ' '"),
     ({"retries": -1}, "retries is -1"), ({"budget_calls": -1}, "budget_calls is -1"),
     ({"parameters": {"model": "other"}}, "parameters is"), ({"concurrency": "many"}, "concurrency is 'many'")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes, told, unchecked):
    with pytest.raises(LensError, match=told):
        Endpoint("http://h/v1", **{"model": "m", **changes})


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(LensError, match=r"pip install 'piggyback-lens\[openai\]'"):
        Endpoint("http://127.0.0.1:9/v1", "m", key_variable=None).ask(["a"])


# ---------------------------------------------------------------- budgets and spend


def test_a_run_over_the_budget_is_refused_before_its_first_call():
    with serving(echo) as server:
        for budget in ({"budget_calls": 2}, {"budget_tokens": 1800}):
            with pytest.raises(LensError, match=r"may take 3 calls and 1,8\d\d tokens; budget_.* raise it"):
                endpoint(server, **budget).ask(["a", "b", "c", "a"])
        assert endpoint(server).estimate(["a", "b", "c", "a"]).calls == 3
    assert server.calls == 0


def test_repeated_calls_count_and_end_a_run_that_they_make_too_expensive():
    with serving(lambda body, n: error(500, "it broke")) as server:
        found = endpoint(server, retries=2, concurrency=1, budget_calls=4).ask(["a", "b", "c", "d"])
    assert [outcome.reason[:12] for outcome in found] == [
        "status 500: ",
        "status 500: ",
        "budget_calls",
        "budget_calls",
    ]
    assert server.calls == 6


def test_what_was_spent_is_said(capfd):
    with serving(echo) as server:
        endpoint(server).ask(["a", "b", "b"], progress="asking")
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "asking: at most 2 calls, 1,226 tokens, 1 requests without a call",
        "asking: 2 calls, 20 tokens, 0 requests without a call, 0 requests failed",
    ]


# ---------------------------------------------------------------- the cache


def test_a_rerun_makes_no_call_and_failures_are_tried_again(tmp_path):
    broken = {"on": True}

    def some(body, number):
        return error(500, "it broke") if asked(body) == "c" and broken["on"] else Said("r", {"90": -0.1})

    with serving(some) as server:
        own = endpoint(server, cache=tmp_path / "c.jsonl")
        first = own.ask(["a", "b", "c"])
        broken["on"], before = False, server.calls
        second = own.ask(["a", "b", "c"])
        assert server.calls == before + 1
        third = own.ask(["c", "b", "a"])
        assert server.calls == before + 1
    assert isinstance(first[2], Failure)
    assert [reply.cached for reply in second] == [True, True, False]
    assert all(reply.cached and reply.top == (("90", -0.1),) for reply in third)


def test_everything_that_decides_an_answer_is_in_the_key():
    plain, message = Endpoint("http://h/v1", "m"), [{"role": "user", "content": "x"}]
    asked_of = [
        (plain, Request(message)),
        (Endpoint("http://other/v1", "m"), Request(message)),
        (Endpoint("http://h/v1", "m2"), Request(message)),
        (Endpoint("http://h/v1", "m", parameters={"min_p": 0.1}), Request(message)),
        (plain, Request([{"role": "system", "content": "x"}])),
        (plain, Request([{"role": "user", "content": "y"}])),
        *((plain, Request(message, **change)) for change in (
            {"max_tokens": 5}, {"temperature": 1.0}, {"top_p": 0.5}, {"seed": 1}, {"sample": 1}, {"top": 20})),
    ]  # fmt: skip
    assert len({own.key_of(request) for own, request in asked_of}) == len(asked_of)
    same = Endpoint("http://h/v1/", "m", concurrency=1, timeout=1.0, retries=0, budget_calls=9)
    assert same.key_of(Request(message)) == plain.key_of(Request(message))


def test_a_cache_with_a_line_of_something_else_is_refused_and_a_torn_one_is_not(tmp_path):
    cache = tmp_path / "c.jsonl"
    with serving(echo) as server:
        own = endpoint(server, cache=cache)
        own.ask(["a", "b"])
        with cache.open("a") as file:
            file.write('{"key": "half')
        own.ask(["a", "b", "c"])
        assert server.calls == 3
        assert len(read_jsonl(cache)) == 3
        rows = read_jsonl(cache)
        cache.write_text("".join(json.dumps(row | {"read": "many"}) + "\n" for row in rows))
        with pytest.raises(LensError, match="has a row that is no reply"):
            own.ask(["a"])


def test_a_full_disk_ends_the_run_with_its_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with serving(echo) as server, pytest.raises(LensError, match="cannot be written"):
        endpoint(server, cache=tmp_path / "file" / "c.jsonl").ask(["a", "b"])


def test_replies_are_handed_over_as_they_come():
    got = []
    with serving(echo) as server:
        endpoint(server).ask(["a", "b", "a"], keep=got.extend)
    assert sorted((place, reply.text) for place, reply in got) == [
        (0, "you said a"), (1, "you said b"), (2, "you said a"),
    ]  # fmt: skip


CHILD = """
from piggyback_lens.measuring.endpoint import Endpoint
own = Endpoint({url!r}, "m", key_variable=None, cache={cache!r}, concurrency={concurrency})
own.ask([f"{{i}}" for i in range({n})])
"""


def child(server, cache, n, concurrency=4):
    code = textwrap.dedent(CHILD.format(url=server.url, cache=str(cache), concurrency=concurrency, n=n))
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "NO_PROXY": "127.0.0.1"})


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_process_loses_no_more_than_the_calls_in_flight(tmp_path):
    cache = tmp_path / "c.jsonl"
    with serving(lambda body, n: Said("x", wait=0.02)) as server:
        process = child(server, cache, 400)
        while server.calls < 60:
            time.sleep(0.01)
        process.kill()
        process.wait()
        began = server.calls
        assert began - 4 <= len(read_jsonl(cache)) <= began < 400
        own = Endpoint(server.url, "m", key_variable=None, cache=cache)
        assert all(isinstance(reply, Reply) for reply in own.ask([f"{i}" for i in range(400)]))
        assert 400 <= server.calls <= 404


def test_two_processes_share_a_cache_and_no_row_is_lost(tmp_path):
    cache = tmp_path / "c.jsonl"
    with serving(echo) as server:
        processes = [child(server, cache, n, concurrency=8) for n in (150, 200)]
        assert [process.wait(60) for process in processes] == [0, 0]
        calls = server.calls
        own = Endpoint(server.url, "m", key_variable=None, cache=cache)
        assert texts(own.ask([f"{i}" for i in range(200)])) == [f"you said {i}" for i in range(200)]
        assert server.calls == calls
    assert len(read_jsonl(cache)) == calls


def test_a_key_press_gives_up_the_calls_in_flight(tmp_path):
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        pytest.skip("no signals here")

    def press(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGVTALRM, press)
    with serving(lambda body, n: Said("x", wait=3)) as server:
        began = time.monotonic()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGVTALRM)).start()
        with pytest.raises(KeyboardInterrupt):
            endpoint(server).ask(["a", "b"])
        assert time.monotonic() - began < 2
    signal.signal(signal.SIGVTALRM, before)


def test_importing_the_module_imports_no_client():
    code = "import sys, piggyback_lens.measuring.endpoint; print([m for m in ('openai', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
    assert Path(__file__).name == "test_endpoint.py"
