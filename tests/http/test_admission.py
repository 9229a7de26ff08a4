"""Places, queue and deadlines, as clients see them."""

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from ochat_serve.admission import Admission
from ochat_serve.app import create_app
from ochat_serve.errors import InvalidRequest
from ochat_serve.generation import Delta, Update
from ochat_serve.serving import Serving
from ochat_serve.settings import Settings
from tests.fakes import ScriptedEngine, Wait, service, words
from tests.live import RawClient, eventually, live

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "one two"}]}
BOTH = pytest.mark.parametrize("stream", [False, True])


class Busy:
    """A server with few places, whose engine answers when it is told to."""

    def __init__(self, **settings: object) -> None:
        self.wait = Wait()
        self.engine = ScriptedEngine(script=[self.wait, *words("done")])
        self.settings = Settings(max_inflight=1, **settings)
        self.chat = service(self.engine, self.settings)
        self.clients = ThreadPoolExecutor(16)

    @contextlib.contextmanager
    def running(self) -> Iterator["Busy"]:
        with live(create_app(self.settings, Serving(chat=self.chat))) as self.server:
            try:
                yield self
            finally:
                self.release()
                self.clients.shutdown()

    def release(self) -> None:
        self.server.loop.call_soon_threadsafe(self.wait.go.set)

    def ask(self, *, key: str = "", **fields: object) -> "Future[httpx.Response]":
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return self.clients.submit(
            httpx.post, self.server.url + CHAT, json={**ASK, **fields}, headers=headers, timeout=30
        )

    def occupied(self, *, running: int = 1, waiting: int = 0) -> bool:
        admission = self.chat.admission
        return eventually(lambda: (admission.running, admission.waiting) == (running, waiting))


def error_of(answer: httpx.Response) -> dict:
    """The error body, or the error event of a stream."""
    if answer.status_code != 200:
        return answer.json()["error"]
    *_, event, done = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert done == "data: [DONE]"
    return json.loads(event[6:])["error"]


@BOTH
def test_a_full_queue_is_told_at_once(stream: bool) -> None:
    with Busy(max_queue=1).running() as busy:
        first = busy.ask()
        assert busy.occupied()
        second = busy.ask(stream=stream)
        assert busy.occupied(waiting=1)
        third = busy.ask(stream=stream).result()
        assert third.status_code == 503
        assert int(third.headers["retry-after"]) >= 1
        assert error_of(third)["code"] == "overloaded"
        assert "queue is full" in error_of(third)["message"]
        busy.release()
        assert first.result().status_code == second.result().status_code == 200
        assert busy.occupied(running=0)
        assert len(busy.engine.requests) == 2


@BOTH
def test_who_waits_too_long_never_reaches_the_engine(stream: bool) -> None:
    with Busy(queue_timeout_s=0.2).running() as busy:
        first = busy.ask()
        assert busy.occupied()
        late = busy.ask(stream=stream).result()
        assert late.status_code == 503
        assert error_of(late)["code"] == "queue_timeout"
        assert "retry-after" in late.headers
        busy.release()
        assert first.result().status_code == 200
        assert len(busy.engine.requests) == 1


def test_the_queues_deadline_ends_with_the_queue() -> None:
    with Busy(queue_timeout_s=0.4).running() as busy:
        second = Wait()
        first = busy.ask()
        assert busy.occupied()
        waited = busy.ask()
        assert busy.occupied(waiting=1)
        busy.engine.script = [second, *words("slow")]
        busy.release()
        assert first.result().status_code == 200
        assert not eventually(waited.done, within_s=0.8)
        busy.server.loop.call_soon_threadsafe(second.go.set)
        assert waited.result().status_code == 200


@pytest.mark.parametrize(("front_ends", "most"), [(1, 3), (2, 1)])
def test_no_request_has_more_choices_than_there_are_places(front_ends: int, most: int) -> None:
    settings = Settings(max_inflight=3, api_server_count=front_ends)
    engine = ScriptedEngine(script=[s for n in range(most) for s in words("a", index=n)])
    with live(create_app(settings, Serving(chat=service(engine, settings)))) as server:
        for n, status in ((most, 200), (most + 1, 400)):
            answer = httpx.post(server.url + CHAT, json={**ASK, "n": n, "temperature": 1})
            assert answer.status_code == status
        assert answer.json()["error"]["param"] == "n"
        engine.script += words("a", index=most)
        for greedy in ({"temperature": 0}, {"temperature": 1, "top_p": 0}):  # copies of one
            answered = httpx.post(server.url + CHAT, json={**ASK, "n": most + 1, **greedy})
            assert answered.status_code == 200
        assert f"at most {most} choices, not {most + 1}" in answer.json()["error"]["message"]
    assert [options.n for _, options in engine.requests] == [most, most + 1, most + 1]


def test_a_first_token_lets_the_next_prompt_in() -> None:
    """No more than two steps' worth of prompts are in prefill."""
    with Busy().running() as busy:
        begun = Wait()
        busy.engine.script = [begun, Update([Delta(0, "a", 1)]), busy.wait, *words("b")]
        busy.chat.admission = Admission(slots=8, max_queue=8, max_queue_tokens=100, step_tokens=1)
        answers = [busy.ask() for _ in range(2)]  # of two tokens each
        assert busy.occupied(waiting=1)
        busy.server.loop.call_soon_threadsafe(begun.go.set)
        assert busy.occupied(running=2)
        busy.release()
        assert [answer.result().status_code for answer in answers] == [200, 200]


@BOTH
def test_a_request_has_its_time(stream: bool) -> None:
    with Busy(request_timeout_s=0.3).running() as busy:
        late = busy.ask(stream=stream).result()
        assert late.status_code == 504
        assert error_of(late) == {
            "message": "The request took longer than 0.3 seconds.",
            "type": "timeout_error",
            "param": None,
            "code": "deadline_exceeded",
        }
        assert eventually(lambda: busy.engine.running == 0)
        assert busy.occupied(running=0)


def test_a_stream_out_of_time_ends_in_an_error_and_in_no_false_length() -> None:
    with Busy(request_timeout_s=0.5).running() as busy:
        busy.engine.script = [Update([Delta(0, "begun", 1)]), busy.wait]
        late = busy.ask(stream=True).result()
        assert late.status_code == 200
        assert "begun" in late.text
        assert error_of(late)["code"] == "deadline_exceeded"
        assert '"length"' not in late.text
        assert '"stop"' not in late.text
        assert eventually(lambda: busy.engine.running == 0)


def test_a_client_may_ask_for_less() -> None:
    with Busy().running() as busy:
        url = busy.server.url + CHAT
        late = httpx.post(url, json=ASK, headers={"x-ochat-timeout-s": "0.2"})
        assert late.status_code == 504
        assert "0.2 seconds" in error_of(late)["message"]
        for wrong in ("soon", "0", "-1", "nan", ""):
            refused = httpx.post(url, json=ASK, headers={"x-ochat-timeout-s": wrong})
            assert refused.status_code == 400
            assert error_of(refused)["param"] == "x-ochat-timeout-s"
        busy.release()
        for fine in ("inf", "1e9", "30"):
            answer = httpx.post(url, json=ASK, headers={"x-ochat-timeout-s": fine})
            assert answer.status_code == 200


def test_who_waits_is_kept_alive_and_served_in_the_end() -> None:
    with Busy(ping_interval_s=0.1).running() as busy:
        first = busy.ask()
        assert busy.occupied()
        with RawClient(busy.server.port) as client:
            client.post(CHAT, json.dumps({**ASK, "stream": True}).encode())
            client.read_until(b": ping\n\n")
            assert busy.occupied(waiting=1)
            busy.release()
            assert b'"content":"done"' in client.read_until(b"[DONE]")
        assert first.result().status_code == 200


@BOTH
def test_hanging_up_leaves_the_queue(stream: bool) -> None:
    with Busy().running() as busy:
        first = busy.ask()
        assert busy.occupied()
        with RawClient(busy.server.port) as client:
            client.post(CHAT, json.dumps({**ASK, "stream": stream}).encode())
            assert busy.occupied(waiting=1)
        assert busy.occupied(waiting=0)
        busy.release()
        assert first.result().status_code == 200
        assert len(busy.engine.requests) == 1


@BOTH
@pytest.mark.parametrize(
    ("error", "status"), [(InvalidRequest("No."), 400), (ZeroDivisionError("secret"), 500)]
)
def test_what_the_engine_refuses_after_the_queue(
    stream: bool, error: Exception, status: int
) -> None:
    with Busy().running() as busy:
        first = busy.ask()
        assert busy.occupied()
        late = busy.ask(stream=stream)
        assert busy.occupied(waiting=1)
        busy.engine.refuses = error
        busy.release()
        assert first.result().status_code == 200
        assert late.result().status_code == status
        assert "secret" not in late.result().text
        assert busy.occupied(running=0)


def test_a_flood_by_one_key_is_not_in_the_way_of_another() -> None:
    with Busy(api_keys=("sk-a", "sk-b")).running() as busy:
        flood = [busy.ask(key="sk-a", user=f"a{n}") for n in range(8)]
        assert busy.occupied(waiting=7)
        other = busy.ask(key="sk-b", user="b", n=2, temperature=0)
        assert busy.occupied(waiting=8)
        busy.release()
        assert [answer.result().status_code for answer in (*flood, other)] == [200] * 9
    choices = [options.n for _, options in busy.engine.requests]
    assert choices.index(2) <= 1


def test_a_place_is_given_back_whatever_happens() -> None:
    """As many places as there are, more requests than that, every kind of end."""
    with Busy(max_queue=0).running() as busy:
        busy.release()
        for fields in ({}, {"stream": True}, {"messages": []}, {"max_tokens": 0}, {"n": 99}):
            busy.ask(**fields).result()
            assert busy.ask().result().status_code == 200
        busy.engine.script = [ZeroDivisionError()]
        assert busy.ask().result().status_code == 500
        assert busy.ask(stream=True).result().status_code == 500
        busy.engine.script = words("fine")
        assert busy.ask().result().status_code == 200
        assert busy.occupied(running=0)


def test_front_ends_together_never_pass_the_most() -> None:
    admission = service(ScriptedEngine(), Settings(max_inflight=10, api_server_count=4)).admission
    for _ in range(3):
        admission.enter(None, 1, 1)
    assert (admission.running, admission.waiting) == (2, 1)
