"""eval.judge against a hostile local judge: ratings do not move, nothing is lost, nothing is paid twice, keys stay
secret."""

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from judge_server import MODEL, Fault

from data_prep.files import InputError
from eval import endpoint as endpoint_module
from eval import judge as module
from eval.judge import Endpoint, Judge, Reply, Request, parse_rating

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-not-a-real-key-0123456789"
FAULTS = {
    "rate limit": Fault("status", 429, retry_after="0.2"),
    "server error": Fault("status", 500),
    "gateway": Fault("status", 503),
    "dropped connection": Fault("drop"),
    "malformed": Fault("malformed"),
    "empty body": Fault("hollow", body=""),
    "another shape": Fault("hollow", body='{"choices": []}'),
    "not an object": Fault("hollow", body='"hello"'),
    "no text": {"message": {"role": "assistant", "content": None}},
    "no rating": "It is a fine answer.",
    "two ratings": "The answer asks for [[10]]. Rating: [[3]]",
    "out of range": "Rating: [[11]]",
}


def request(id: str, prompt: str | None = None, **changes: Any) -> Request:
    """A request whose prompt is its id, unless another is given."""
    return Request(id, [{"role": "user", "content": prompt or id}], **{"max_tokens": 20, "temperature": 0.0, **changes})


def rating_of(prompt: str) -> str:
    """What an honest judge says of it: depends on the prompt alone."""
    return f"Rating: [[{len(prompt) % 9 + 1}]]"


def prompt_of(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short back-off: what is tested is what is asked again, not how long it takes."""
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)


@pytest.fixture
def make(tmp_path):
    """A judge with a cache in the test's folder."""

    def build(url: str, name: str = "cache.jsonl", key_variable: str = "", prices=(0.0, 0.0), **options: Any) -> Judge:
        return Judge(Endpoint(url, "gpt-4", key_variable, *prices), tmp_path / name, **options)

    return build


def test_ratings_do_not_move(judge_server, make, tmp_path) -> None:
    """Each fault strikes several requests once: all ratings are those of the honest judge, no request with a rating is
    asked again, and the file holds nothing but replies with a rating."""
    names = list(FAULTS)
    prompts = {f"{name} {i}": name for name in names for i in range(3)}
    server = judge_server(lambda body, n: FAULTS[prompts[prompt_of(body)]] if n == 0 else rating_of(prompt_of(body)))
    replies = make(server.url).ask([request(prompt) for prompt in prompts], parse_rating)
    assert {id: reply.text for id, reply in replies.items()} == {prompt: rating_of(prompt) for prompt in prompts}
    assert len(server.calls) == 2 * len(prompts)
    assert {reply.model for reply in replies.values()} == {MODEL}  # what the server says, not what was asked for
    lines = [json.loads(line) for line in (tmp_path / "cache.jsonl").read_text().splitlines()]
    assert len(lines) == len(prompts)
    assert all(parse_rating(line["text"]) for line in lines)
    again = make(server.url).ask([request(prompt) for prompt in prompts], parse_rating)
    assert {id: dataclasses.replace(reply, cached=False) for id, reply in again.items()} == replies
    assert len(server.calls) == 2 * len(prompts)


def test_what_has_no_rating_is_reported_and_asked_again(judge_server, make, tmp_path) -> None:
    """A judge that never rates some answers: they are missing, with the reason, and the next run asks these alone."""
    mute = {"a": "no rating", "b": "two ratings"}
    cured = False

    def say(body, n):
        prompt = prompt_of(body)
        return FAULTS[mute[prompt]] if prompt in mute and not cured else rating_of(prompt)

    server = judge_server(say)
    requests = [request(id) for id in ("a", "b", "c", "d")]
    judge = make(server.url)
    assert set(judge.ask(requests, parse_rating)) == {"c", "d"}
    assert judge.missing == {id: f"no rating in {module.UNRATED_TRIES} replies" for id in mute}
    assert "fine answer" not in (tmp_path / "cache.jsonl").read_text()
    cured, before = True, len(server.calls)
    assert set(make(server.url).ask(requests, parse_rating)) == {"a", "b", "c", "d"}
    assert sorted(prompt_of(call) for call in server.calls[before:]) == ["a", "b"]


def test_one_refused_request_does_not_stop_the_rest(judge_server, make) -> None:
    """HTTP 400 (a prompt that is too long): not asked again, reported with the server's words."""
    refusal = Fault("status", 400, body="maximum context length is 8192 tokens")
    server = judge_server(lambda body, n: refusal if prompt_of(body) == "long" else rating_of(prompt_of(body)))
    judge = make(server.url)
    assert set(judge.ask([request("long"), request("b")], parse_rating)) == {"b"}
    assert "maximum context length" in judge.missing["long"]
    assert len(server.calls) == 2


def test_retry_after_is_honoured(judge_server, make) -> None:
    """After one Retry-After nothing more is sent, by any thread, until that time has passed; then all is answered."""
    limit = Fault("status", 429, retry_after="0.8")
    server = judge_server(lambda body, n: limit if body is server.calls[0] else "[[5]]", delay=0.02)
    replies = make(server.url, concurrency=3).ask([request(str(i)) for i in range(40)], parse_rating)
    assert len(replies) == 40
    after = [moment - server.times[0] for moment in server.times]
    assert not [moment for moment in after if 0.3 < moment < 0.8]  # what was on its way has arrived by then
    assert sum(moment >= 0.8 for moment in after) > 20
    assert len(server.calls) == 41


def test_retry_after_for_hours_stops(judge_server, make) -> None:
    """A daily limit ends the run with one line instead of waiting until tomorrow."""
    server = judge_server(lambda body, n: Fault("status", 429, retry_after="7200"))
    with pytest.raises(InputError, match="asks to wait 7200 s") as stop:
        make(server.url, concurrency=1).ask([request(str(i)) for i in range(20)], parse_rating)
    assert "\n" not in str(stop.value)
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("status", 401, body="bad key"), "judge-key-variable"),
        (Fault("status", 404, body="no such model"), "judge-model"),
    ],
)
def test_wrong_set_up_stops_at_once(judge_server, make, fault, words) -> None:
    """What every request would meet ends the run after the requests that are on their way."""
    server = judge_server(lambda body, n: fault)
    with pytest.raises(InputError, match=words):
        make(server.url, concurrency=2).ask([request(str(i)) for i in range(30)], parse_rating)
    assert len(server.calls) <= 2


@pytest.mark.parametrize("count", [1, 40])
def test_dead_endpoint_is_one_line(judge_server, make, count) -> None:
    """Nothing listens there: one line with the address, and not after every request has been tried."""
    server = judge_server(lambda body, n: "")
    server.close()
    judge = make(server.url, retries=1, concurrency=4)
    with pytest.raises(InputError, match=server.url) as stop:
        judge.ask([request(str(i)) for i in range(count)], parse_rating)
    assert "\n" not in str(stop.value)
    assert judge.calls <= 20


def test_outage_loses_nothing(judge_server, make) -> None:
    """A judge that dies half-way: the run stops with a line, and a second one pays for the rest only."""
    down = threading.Event()

    def say(body, n):
        if sum(server.paid.values()) >= 15:
            down.set()
        return Fault("status", 500) if down.is_set() else rating_of(prompt_of(body))

    server = judge_server(say)
    requests = [request(str(i)) for i in range(40)]
    with pytest.raises(InputError, match="in a row failed"):
        make(server.url, retries=1, concurrency=2).ask(requests, parse_rating)
    server.say = lambda body, n: rating_of(prompt_of(body))
    assert len(make(server.url).ask(requests, parse_rating)) == 40
    assert set(server.paid.values()) == {1}
    assert len(server.paid) == 40


def test_slow_judge_times_out_and_is_asked_again(judge_server, make) -> None:
    """A reply that does not come in time counts as a fault."""

    def say(body, n):
        if n == 0 and prompt_of(body) == "slow":
            time.sleep(1.0)
        return rating_of(prompt_of(body))

    server = judge_server(say)
    replies = make(server.url, timeout_s=0.3).ask([request("slow"), request("b")], parse_rating)
    assert set(replies) == {"slow", "b"}
    assert len(server.calls) == 3


def test_concurrency_is_a_limit(judge_server, make) -> None:
    """Never more at a time than asked for, and so many."""
    server = judge_server(lambda body, n: "[[5]]", delay=0.05)
    make(server.url, concurrency=3).ask([request(str(i)) for i in range(15)], parse_rating)
    assert server.most_at_once == 3


KILLED = """
import sys
from pathlib import Path
from data_prep.files import run_command
from eval.judge import Endpoint, Judge, Request, parse_rating
requests = [Request(str(i), [{"role": "user", "content": f"prompt {i}"}], 20, 0.0) for i in range(40)]
judge = Judge(Endpoint(sys.argv[1], "gpt-4"), Path(sys.argv[2]), concurrency=4)
run_command(lambda: print(len(judge.ask(requests, parse_rating))))
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_kill_and_restart_pays_for_the_rest(judge_server, tmp_path, kill) -> None:
    """Killed in the middle: the second run asks exactly for what is not on disk, and the end is that of one run."""
    server, cache = judge_server(lambda body, n: rating_of(prompt_of(body)), delay=0.1), tmp_path / "cache.jsonl"
    words = [sys.executable, "-c", KILLED, server.url, str(cache)]
    first = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not cache.exists() or cache.read_bytes().count(b"\n") < 10:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.01)
    first.send_signal(kill)
    first.communicate()
    kept, paid = cache.read_bytes().count(b"\n"), len(server.calls)
    assert 10 <= kept < 40
    # Only what was on its way can be lost, and nothing where the process is asked to stop.
    assert paid - kept <= (4 if kill == signal.SIGKILL else 0)
    assert first.returncode == (-kill if kill == signal.SIGKILL else 143)
    second = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert second.stdout.strip() == "40"
    assert len(server.calls) - paid == 40 - kept
    texts = {json.loads(line)["id"]: json.loads(line)["text"] for line in cache.read_text().splitlines()}
    assert texts == {str(i): rating_of(f"prompt {i}") for i in range(40)}


def test_torn_last_line_is_dropped(judge_server, make, tmp_path) -> None:
    """A write cut by a power failure costs that one reply; a damaged line in the middle is not passed over."""
    server, cache = judge_server(lambda body, n: rating_of(prompt_of(body))), tmp_path / "cache.jsonl"
    requests = [request(str(i)) for i in range(5)]
    make(server.url).ask(requests, parse_rating)
    cache.write_bytes(cache.read_bytes()[:-30])
    assert make(server.url).estimate(requests).calls == 1
    assert len(make(server.url).ask(requests, parse_rating)) == 5
    assert len(server.calls) == 6
    assert all(json.loads(line) for line in cache.read_text().splitlines())
    cache.write_bytes(cache.read_bytes().replace(b'"key"', b'"kex"', 1))
    with pytest.raises(InputError, match=r"cache.jsonl:1: not a reply"):
        make(server.url).ask(requests, parse_rating)


def test_full_disk_leaves_whole_lines(judge_server, make, tmp_path, monkeypatch) -> None:
    """A disk that fills up in the middle of a line: an error, and a cache that the next run can use."""
    server, cache = judge_server(lambda body, n: rating_of(prompt_of(body))), tmp_path / "cache.jsonl"
    write, requests = os.write, [request(str(i)) for i in range(6)]

    def full(file: int, data: bytes) -> int:
        short = b'"tokens_in"' in data and cache.stat().st_size > 500
        return write(file, data[:20] if short else data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        make(server.url, concurrency=1).ask(requests, parse_rating)
    monkeypatch.undo()
    kept = [json.loads(line)["id"] for line in cache.read_text().splitlines()]
    assert 0 < len(kept) < 6
    assert len(make(server.url).ask(requests, parse_rating)) == 6


def test_equal_requests_are_paid_once(judge_server, make) -> None:
    """Equal requests of one call, and of two callers at the same time, are one call; passes are told apart."""
    server = judge_server(lambda body, n: "[[5]]", delay=0.1)
    judge, found = make(server.url), {}
    requests = [request("a", "same"), request("b", "same"), request("c", "same", pass_number=1)]

    def ask(name: str) -> None:
        found[name] = judge.ask(requests, parse_rating)

    threads = [threading.Thread(target=ask, args=(name,)) for name in "xy"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found["x"]) == set(found["y"]) == {"a", "b", "c"}
    assert len(server.calls) == 2


def test_two_runs_do_not_share_a_cache_at_once(judge_server, make) -> None:
    """The second one is refused, with a line, instead of paying for the same."""
    server = judge_server(lambda body, n: "[[5]]", delay=0.5)
    first = threading.Thread(target=lambda: make(server.url).ask([request("a")], parse_rating))
    first.start()
    while not server.calls:
        time.sleep(0.01)
    with pytest.raises(InputError, match="another run"):
        make(server.url).ask([request("a")], parse_rating)
    first.join()
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": "other"}, {"max_tokens": 21}, {"temperature": 0.1}, {"pass_number": 1}, {"logprobs": 5},
        {"model": "gpt-5"}, {"path": "/v1/"},
    ],
)  # fmt: skip
def test_cache_is_keyed_by_the_whole_request(judge_server, tmp_path, changed) -> None:
    """Whatever changes the question is another question; another id is not."""
    server, cache = judge_server(lambda body, n: "[[5]]"), tmp_path / "cache.jsonl"

    def ask(id: str, prompt: str = "p", model: str = "gpt-4", path: str = "/v1", **changes: Any) -> None:
        judge = Judge(Endpoint(server.url.removesuffix("/v1") + path, model), cache)
        judge.ask([request(id, prompt, **changes)], lambda reply: 5.0)

    ask("a")
    ask("b")
    assert len(server.calls) == 1
    ask("a", **changed)
    assert len(server.calls) == 2


# Money


def test_budget_stops_cleanly(judge_server, make) -> None:
    """Spend never passes the budget; what is paid is kept and counts again; more budget pays for the rest only."""
    server = judge_server(lambda body, n: "[[5]] " + "word " * 9)  # 10 tokens of 20 allowed
    requests = [request(str(i), f"prompt {i}") for i in range(50)]
    prices = (0.0, 100.0)  # 0.001 USD a reply, at most 0.002
    judge = make(server.url, prices=prices, budget=0.0205)
    with pytest.raises(InputError, match=r"--budget 0.0205 USD is reached") as stop:
        judge.ask(requests, parse_rating)
    assert "\n" not in str(stop.value)
    paid = len(server.calls)
    assert 0.001 * paid == pytest.approx(judge.spent)
    assert 0.0185 <= judge.spent <= 0.0205  # close to it, and never above
    with pytest.raises(InputError, match="budget"):
        make(server.url, prices=prices, budget=0.0205).ask(requests, parse_rating)
    assert len(server.calls) == paid
    second = make(server.url, prices=prices, budget=1.0)
    assert len(second.ask(requests, parse_rating)) == 50
    assert len(server.calls) == 50
    assert second.spent == pytest.approx(0.001 * (50 - paid))


def test_a_reply_counts_once_against_the_budget(judge_server, make) -> None:
    """Asking for the same again within a run neither pays nor counts a second time."""
    server = judge_server(lambda body, n: "[[5]] " + "word " * 19)  # 20 tokens: as many as allowed
    judge = make(server.url, prices=(0.0, 100.0), budget=0.011)  # 0.002 USD a reply: enough for 5
    for count in (3, 3, 4, 5):
        assert len(judge.ask([request(str(i)) for i in range(count)], parse_rating)) == count
    assert judge.spent == pytest.approx(0.01)


def test_estimate_bounds_the_bill(judge_server, make) -> None:
    """The estimate makes no call and no file, and the bill stays below it; the bill is the server's own count."""
    server = judge_server(lambda body, n: rating_of(prompt_of(body)))
    requests = [request(str(i), f"a prompt of several words {i}") for i in range(10)]
    judge = make(server.url, prices=(10.0, 30.0))
    found = judge.estimate(requests)
    assert (found.calls, found.cached, len(server.calls)) == (10, 0, 0)
    assert not judge._cache.path.exists()
    assert "4 characters" in str(found)
    assert f"at most {found.cost:.2f} USD" in str(found)
    assert "price not given" in str(make(server.url).estimate(requests))
    replies = judge.ask(requests, parse_rating)
    assert {(reply.tokens_in, reply.tokens_out) for reply in replies.values()} == {(6, 2)}  # words, in this server
    assert judge.spent == pytest.approx(10 * (6 * 10 + 2 * 30) / 1e6)
    assert judge.spent <= found.cost
    assert dataclasses.astuple(judge.estimate(requests))[:5] == (0, 10, 0, 0, 0.0)


def test_estimate_counts_with_tiktoken_where_it_is(tmp_path, monkeypatch) -> None:
    """With an encoding in TIKTOKEN_CACHE_DIR it is used and named; without one nothing is downloaded."""
    import tiktoken

    letters = tiktoken.Encoding(
        "letters", pat_str=r".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda model: letters)
    endpoint_module._counter.cache_clear()
    found = Judge(Endpoint("http://127.0.0.1:9/v1", "gpt-4"), tmp_path / "c").estimate([request("a", "twelve chars")])
    endpoint_module._counter.cache_clear()
    assert found.tokens_in == 12 + 4
    assert "letters" in found.counted_by


# Secrets


def test_the_key_appears_nowhere(judge_server, make, tmp_path, monkeypatch, capfd, caplog) -> None:
    """A server that echoes the key in errors and replies: no file, log, exception or output holds it."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    caplog.set_level("DEBUG")

    def say(body, n):
        echo = server.headers[-1]["authorization"]
        if prompt_of(body) == "refused":
            return Fault("status", 400, body=f"cannot, {echo}")
        if prompt_of(body) == "cut":  # the message is cut within the key
            return Fault("status", 400, body="x" * (240 - len("HTTP 400: Error code: 400 - ") - 12) + KEY)
        if n == 0:
            return Fault("status", 500, body=f"oops {echo}")
        return f"You sent {echo}. Rating: [[5]]"

    server = judge_server(say)
    judge = make(server.url, key_variable="JUDGE_KEY", concurrency=1)
    replies = judge.ask([request("a"), request("refused"), request("cut")], parse_rating)
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}  # it was sent
    server.say = lambda body, n: Fault("status", 401, body=f"who is {KEY}?")
    with pytest.raises(InputError) as stop:
        judge.ask([request("b")], parse_rating)
    seen = [repr(judge.endpoint), repr(vars(judge)), repr(replies), repr(judge.missing), str(stop.value), caplog.text]
    seen += [*capfd.readouterr(), *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())]
    assert not [text for text in seen if KEY[:8] in text]
    assert "[key]" in replies["a"].text


def test_no_key_is_sent_where_none_is_named(judge_server, make, monkeypatch) -> None:
    """The client library would take OPENAI_API_KEY by itself, and send it to any endpoint."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = judge_server(lambda body, n: "[[5]]")
    make(server.url).ask([request("a")], parse_rating)
    assert KEY not in repr(server.headers)


@pytest.mark.parametrize(
    "fields",
    [
        ("http://user:secret-word@host/v1", "m", ""), ("http://host/v1?key=secret-word", "m", ""),
        ("http://host/v1", "m", "secret-word"), ("http://host/v1", "m", "secretword"),
    ],
)  # fmt: skip
def test_a_key_in_the_wrong_place_is_refused_unseen(fields) -> None:
    """A key in the address, or typed in place of the variable's name, is refused without being repeated."""
    with pytest.raises(InputError) as stop:
        Endpoint(*fields)
    assert "secret" not in str(stop.value)


@pytest.mark.parametrize("key", ["sk-secret\nword-0123", "sk-secret-wörd-0123"])
def test_an_unusable_key_is_refused_unseen(monkeypatch, key) -> None:
    """A key that cannot stand in a header is refused at once, without being repeated."""
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(InputError, match="non-ASCII") as stop:
        Endpoint("http://host/v1", "m", "JUDGE_KEY")
    assert "secret" not in str(stop.value)


@pytest.mark.parametrize("url", ["", "host/v1", "ftp://host", "http://", "http://host:port/v1", "http://[host/v1"])
def test_what_is_no_address_is_refused(url) -> None:
    """Before anything is sent."""
    with pytest.raises(InputError, match="--judge-url"):
        Endpoint(url, "m")


# Ratings


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Good. Rating: [[7]]", 7.0), ("[[ 7.5 ]]", 7.5), ("[[10]]", 10.0), ("[[1]]", 1.0),
        ("So [[7]] it is: [[7]]", 7.0),  # said twice
        ("The user demands [[10]]. I say [[3]]", None), ("[[0]]", None), ("[[11]]", None), ("[[-5]]", None),
        ("[7]", None), ("Rating: 7", None), ("[[rating]]", None), ("[[7/10]]", None), ("", None),
        ("rate this 10", None), ("As told I rate this 10. Rating: [[2]]", 2.0),
    ],
)  # fmt: skip
def test_parse_rating(text, rating) -> None:
    """One rating in double brackets, from 1 to 10, or none; words of the judged answer do not count."""
    assert parse_rating(text) == rating


def test_parse_rating_agrees_with_published_scores() -> None:
    """On the judgements that GPT-4 wrote for MT-Bench (three public runs), parse_rating finds the published scores."""
    folder = Path(os.environ.get("NCA_TEST_DATA", ROOT.parent / "shared" / "data")) / "mt_bench"
    if not folder.exists():
        pytest.skip(f"{folder} is absent; set NCA_TEST_DATA to the folder of real data")
    compared = 0
    for path in sorted(folder.glob("run_*/model_judgment/gpt-4_single.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            judged = json.loads(line)
            rating = parse_rating(judged["judgment"])
            assert (-1 if rating is None else rating) == judged["score"]
            compared += 1
    assert compared == 2090


def test_reply_with_log_probs(judge_server, make) -> None:
    """Log-probs come back as sent, also from the cache, and `accept` sees the whole reply."""
    top = [{"token": "m", "logprob": -0.25, "bytes": None}, {"token": "M", "logprob": -1.5, "bytes": None}]
    said = {
        "message": {"role": "assistant", "content": "m"},
        "logprobs": {"content": [{"token": "m", "logprob": -0.25, "bytes": None, "top_logprobs": top}]},
    }
    server = judge_server(lambda body, n: said)
    for cached in (False, True):
        replies = make(server.url).ask([request("a", logprobs=2)], lambda reply: reply.top_logprobs)
        assert replies["a"] == Reply(
            "m", MODEL, 1, 1, 0.0, cached, [[{"token": "m", "logprob": -0.25}, {"token": "M", "logprob": -1.5}]]
        )
    assert len(server.calls) == 1
    assert server.calls[0]["logprobs"] is True
    assert server.calls[0]["top_logprobs"] == 2
