"""One judge for all benchmarks: a model behind any endpoint that speaks the OpenAI chat protocol.

    judge = Judge(Endpoint("https://api.openai.com/v1", "gpt-4-0613", "OPENAI_API_KEY", 30, 60), Path("cache.jsonl"))
    print(judge.estimate(requests))                     # calls, tokens and money; nothing is sent
    replies = judge.ask(requests, accept=parse_rating)  # {id: Reply}; what is missing is in judge.missing

Every accepted reply is one line of the cache, on disk before it counts, keyed by the whole request (address, model,
messages, parameters, pass number). Failures and replies without a rating are never stored, so a second run asks, and
pays, for the rest only. The key is read from the environment and written nowhere.
"""

import argparse
import dataclasses
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.files import InputError, sha256_text, to_json
from eval.endpoint import Again, Connection, Endpoint, Halt, Refused, Reply, Request
from eval.reply_cache import ReplyCache

__all__ = [
    "Endpoint",
    "Estimate",
    "Judge",
    "Reply",
    "Request",
    "add_arguments",
    "from_arguments",
    "models_of",
    "parse_rating",
]

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds before another try: doubled each time
LONGEST_RETRY_AFTER = 300.0  # a server that asks for more is left for today
UNRATED_TRIES = 3  # replies to one request, all paid, before it is given up as without a rating


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What asking would take. tokens_out and cost are upper limits: replies as long as they may be, none retried."""

    calls: int
    cached: int
    tokens_in: int
    tokens_out: int
    cost: float
    counted_by: str

    def __str__(self) -> str:
        """One line for --dry-run."""
        money = f"at most {self.cost:.2f} USD" if self.cost or not self.calls else "price not given"
        return (
            f"{self.calls} calls to make ({self.cached} in the cache), {self.tokens_in:,} tokens in and at most "
            f"{self.tokens_out:,} out ({self.counted_by}), {money}"
        )


class Judge:
    """Asks one endpoint, several requests at a time. missing: for each id of the last `ask` without a reply, why."""

    def __init__(
        self,
        endpoint: Endpoint,
        cache: Path | str,
        *,
        concurrency: int = 8,
        retries: int = 5,
        timeout_s: float = 120.0,
        budget: float | None = None,
    ) -> None:
        """budget: USD for all that is asked of this object, what earlier runs paid for it included."""
        if concurrency < 1 or retries < 0:
            raise InputError("--concurrency must be at least 1 and retries at least 0")
        if budget is not None and not budget > 0:
            raise InputError(f"--budget {budget:g} must be above 0 USD")
        if budget is not None and endpoint.price_in == endpoint.price_out == 0:
            raise InputError("--budget needs --judge-price-in and --judge-price-out (USD for a million tokens)")
        self.endpoint, self.concurrency, self.retries = endpoint, concurrency, retries
        self.budget = budget
        self._connection = Connection(endpoint, timeout_s)
        self.missing: dict[str, str] = {}
        self.calls, self.spent = 0, 0.0  # requests sent by this object, and their price
        self._cache = ReplyCache(cache)
        self._asking = threading.Lock()  # one `ask` at a time, so that equal requests are paid once
        self._lock = threading.Lock()  # guards what follows
        self._replies: dict[str, Reply] = {}
        self._prices: dict[str, float] = {}  # price of each reply of an earlier run that was asked for again
        self._paid: set[str] = set()  # keys of the replies that this object paid
        self._on_way, self._reserved = 0, 0.0  # calls that are not answered yet, and their price at most
        self._in_row = 0  # requests given up since the last reply
        self._resume_at = 0.0
        self._stopped = ""  # why no more calls are made
        self._wake = threading.Event()

    # Before any spend

    def estimate(self, requests: Iterable[Request]) -> Estimate:
        """Calls, tokens and money that `ask` would take; sends and writes nothing."""
        cache, todo, cached = self._cache.read(), {}, 0
        for request in requests:
            key = self._key_of(request)
            cached += key in cache
            if key not in cache:
                todo[key] = request
        tokens_in = sum(self._connection.tokens(request) for request in todo.values())
        tokens_out = sum(request.max_tokens for request in todo.values())
        cost = self.endpoint.price(tokens_in, tokens_out)
        return Estimate(len(todo), cached, tokens_in, tokens_out, cost, self._connection.counted_by)

    # Asking

    def ask(self, requests: Iterable[Request], accept: Callable[[Any], Any]) -> dict[str, Reply]:
        """Replies by request id; `missing` says why an id is absent.

        accept(text) returns None for a reply without a rating, which is then asked for again (of a request with
        logprobs > 0, accept gets the whole Reply). Equal requests are sent once. InputError, with all paid replies
        kept, when the endpoint is dead, refuses the key, or the budget is spent.
        """
        requests = list(requests)
        if len({request.id for request in requests}) != len(requests):
            raise ValueError("request ids must be unique")
        with self._asking, self._cache.open() as lines:
            cache = {key: self._from_line(line) for key, line in lines.items()}
            self._replies, self.missing, self._in_row = cache, {}, 0
            self._stopped, self._wake = "", threading.Event()
            by_key: dict[str, list[Request]] = {}
            for request in requests:
                by_key.setdefault(self._key_of(request), []).append(request)
            todo = {}
            for key, (first, *_) in by_key.items():
                if key in cache and _accepted(accept, first, cache[key]):
                    if key not in self._paid:
                        self._prices[key] = cache[key].cost
                else:
                    todo[key] = first
            reasons = self._ask_all(todo, accept, len(by_key))
            self.missing = {request.id: reasons[key] for key in reasons for request in by_key[key]}
            if self._stopped:
                raise InputError(self._stopped)
            if reasons and len(reasons) == len(by_key) and self._in_row:
                raise InputError(f"{self.endpoint.base_url}: no reply ({next(iter(reasons.values()))}); is the judge "
                                 "running, and the address right?")  # fmt: skip
            kept = {key: found for key, found in self._replies.items() if key not in reasons}
            return {request.id: kept[key] for key in by_key if key in kept for request in by_key[key]}

    def _ask_all(self, todo: dict[str, Request], accept: Callable[[Any], Any], total: int) -> dict[str, str]:
        """Ask with `concurrency` threads; the reason for each key that got no reply."""
        if not todo:
            return {}
        reasons: dict[str, str] = {}
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        try:
            futures = {pool.submit(self._one, key, request, accept): key for key, request in todo.items()}
            bar = tqdm(as_completed(futures), desc="judge", unit="call", initial=total - len(todo), total=total)
            for future in bar:
                reason = future.result()
                if reason:
                    reasons[futures[future]] = reason
                bar.set_postfix_str(f"{self.spent:.2f} USD, {len(reasons)} missing", refresh=False)
        except BaseException:
            self._halt("interrupted")
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # what is on its way is paid: it is waited for and kept
        return reasons

    def _one(self, key: str, request: Request, accept: Callable[[Any], Any]) -> str:
        """Ask until there is a rating; "" then, else why not."""
        failed = unrated = 0
        while True:
            held, cost = self._reserve(request), 0.0
            if held is None:
                return self._stopped
            try:
                reply = self._connection.call(request)
                cost = reply.cost
            except Halt as reason:
                self._halt(f"{self.endpoint.base_url}: {reason}")
                return str(reason)
            except Refused as reason:
                return str(reason)
            except Again as fault:
                failed += 1
                if failed > self.retries:
                    return self._give_up(str(fault))
                self._wait(failed, fault.after)
                continue
            finally:
                with self._lock:
                    self._reserved, self._on_way = self._reserved - held, self._on_way - 1
                    self.spent += cost
            self._in_row = 0
            if _accepted(accept, request, reply):
                self._store(key, request, reply)
                return ""
            unrated += 1
            if unrated == UNRATED_TRIES:
                return f"no rating in {unrated} replies"

    def _reserve(self, request: Request) -> float | None:
        """Wait for a pause to pass and set aside the price of one call; None if no more calls are to be made."""
        price = self.endpoint.price(self._connection.tokens(request), request.max_tokens)
        while not self._stopped:
            with self._lock:
                pause = self._resume_at - time.monotonic()
                if pause <= 0:
                    committed = self.spent + sum(self._prices.values()) + self._reserved
                    if self.budget is None or committed + price <= self.budget:
                        self._reserved, self._on_way = self._reserved + price, self._on_way + 1
                        self.calls += 1
                        return price
                    if not self._on_way:  # replies on their way may cost less than was set aside for them
                        self._stopped = (
                            f"--budget {self.budget:g} USD is reached: {committed:.4g} paid, the next call may take "
                            f"{price:.4g}; all replies are kept, raise the budget to go on"
                        )
                        self._wake.set()
                        return None
                    pause = 0.05
            self._wake.wait(pause)
        return None

    def _wait(self, failed: int, after: float | None) -> None:
        """Back off, with jitter so that threads do not return together. A Retry-After holds for all of them."""
        if after is not None and after > LONGEST_RETRY_AFTER:
            self._halt(f"{self.endpoint.base_url}: the judge asks to wait {after:.0f} s; all replies are kept, run "
                       "the same command then")  # fmt: skip
            return
        wait = min(FIRST_WAIT * 2 ** (failed - 1), LONGEST_WAIT) * random.uniform(0.5, 1.0)
        if after is not None:
            with self._lock:
                self._resume_at = max(self._resume_at, time.monotonic() + after)
            wait = after + random.uniform(0, 0.1) * min(1.0, after)
        self._wake.wait(wait)

    def _give_up(self, reason: str) -> str:
        with self._lock:
            self._in_row += 1
            down = self._in_row >= self.concurrency
        if down:
            self._halt(f"{self.endpoint.base_url}: {self.concurrency} requests in a row failed {self.retries + 1} "
                       f"times each ({reason}); all replies are kept, run again when the judge is back")  # fmt: skip
        return reason

    def _halt(self, reason: str) -> None:
        with self._lock:
            self._stopped = self._stopped or reason
        self._wake.set()

    # What is cached

    def _key_of(self, request: Request) -> str:
        asked = {**dataclasses.asdict(request), "base_url": self.endpoint.base_url, "model": self.endpoint.model}
        del asked["id"]
        return sha256_text(to_json(asked, sort_keys=True))

    def _from_line(self, line: dict[str, Any]) -> Reply:
        """A reply of an earlier run, at today's prices."""
        try:
            tokens = int(line["tokens_in"]), int(line["tokens_out"])
            return Reply(line["text"], line["model"], *tokens, self.endpoint.price(*tokens), True, line["top_logprobs"])
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{self._cache.path}: key {line['key']} is not a reply; remove its line") from None

    def _store(self, key: str, request: Request, reply: Reply) -> None:
        fields = ("text", "model", "tokens_in", "tokens_out", "top_logprobs")
        self._cache.append({
            "key": key, "id": request.id, "pass_number": request.pass_number,
            **{name: getattr(reply, name) for name in fields},
        })  # fmt: skip
        with self._lock:
            self._replies[key] = reply
            self._paid.add(key)


def parse_rating(text: str) -> float | None:
    """The rating in a reply that ends with `[[x]]`: a number from 1 to 10. None where there is none, or where the
    reply holds two different ones (it may quote a rating that the judged answer planted)."""
    found = {float(number) for number in re.findall(r"\[\[\s*(-?\d+(?:\.\d+)?)\s*\]\]", text)}
    rating = found.pop() if len(found) == 1 else None
    return rating if rating is not None and 1 <= rating <= 10 else None


def models_of(replies: Iterable[Reply]) -> str:
    """The exact judge for a record: the names the server returned, joined by + if its alias moved meanwhile."""
    return "+".join(sorted({reply.model for reply in replies}))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every command that asks a judge."""
    group = parser.add_argument_group("judge")
    group.add_argument("--judge-url", help="address of an OpenAI-compatible endpoint, such as http://HOST:PORT/v1")
    group.add_argument("--judge-model", help="the judge's exact version")
    group.add_argument("--judge-key-variable", default="", metavar="NAME", help="environment variable with the key")
    group.add_argument("--judge-price-in", type=float, default=0.0, metavar="USD", help="for a million tokens read")
    group.add_argument("--judge-price-out", type=float, default=0.0, metavar="USD", help="for a million tokens written")
    group.add_argument("--concurrency", type=int, default=8, help="requests at a time")
    group.add_argument("--budget", type=float, metavar="USD", help="stop before this is exceeded")
    group.add_argument("--dry-run", action="store_true", help="print calls, tokens and money; send nothing")


def from_arguments(arguments: argparse.Namespace, cache: Path | str) -> Judge:
    """The judge of a command line with the options of `add_arguments`."""
    if not arguments.judge_url or not arguments.judge_model:
        raise InputError("no judge: give --judge-url and --judge-model")
    endpoint = Endpoint(
        arguments.judge_url.rstrip("/"), arguments.judge_model, arguments.judge_key_variable,
        arguments.judge_price_in, arguments.judge_price_out,
    )  # fmt: skip
    return Judge(endpoint, cache, concurrency=arguments.concurrency, budget=arguments.budget)


def _accepted(accept: Callable[[Any], Any], request: Request, reply: Reply) -> bool:
    return accept(reply if request.logprobs else reply.text) is not None
