"""One call to a judge: what is asked, where, what comes back, and which faults may pass.

The key is read from the environment when it is needed, and taken out of whatever a server says.
"""

import contextlib
import dataclasses
import email.utils
import functools
import json
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from data_prep.files import InputError, to_json

PRICED_PER = 1_000_000  # tokens


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where the judge is. key_variable: environment variable that holds the key, "" for none. Prices: USD for a
    million tokens. InputError for an address that could carry a secret, and for a variable that is not set."""

    base_url: str
    model: str
    key_variable: str = ""
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.base_url)
            known = url.scheme in ("http", "https") and url.hostname and url.port != 0
        except ValueError:  # brackets or a port that are none
            raise InputError("--judge-url is not an address; write http(s)://HOST[:PORT]/v1") from None
        if url.username or url.password or url.query or url.fragment:  # it is recorded: no word of it is repeated here
            raise InputError("--judge-url holds a user, a password or a query; give the plain address, and the key "
                             "through --judge-key-variable")  # fmt: skip
        if not known:
            raise InputError(f"--judge-url {self.base_url}: write http(s)://HOST[:PORT]/v1")
        if not self.model:
            raise InputError("--judge-model is empty; name the judge's exact version")
        if not (self.price_in >= 0 and self.price_out >= 0):
            raise InputError("--judge-price-in and --judge-price-out must be at least 0 (USD for a million tokens)")
        # A key typed in place of the variable's name must not be echoed.
        if self.key_variable and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            raise InputError("--judge-key-variable takes the name of an environment variable, not the key")
        if self.key_variable and not os.environ.get(self.key_variable, "").strip():
            raise InputError("the variable named by --judge-key-variable is not set; export it")
        if not re.fullmatch(r"[!-~]*", self.key):  # the HTTP library would repeat it in its complaint
            raise InputError(
                "the key in the variable named by --judge-key-variable has a blank or a non-ASCII character"
            )

    @property
    def key(self) -> str:
        """The key, or "" for an endpoint without."""
        return os.environ.get(self.key_variable, "").strip() if self.key_variable else ""

    def price(self, tokens_in: int, tokens_out: int) -> float:
        """USD for so many tokens."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / PRICED_PER


@dataclasses.dataclass(frozen=True)
class Request:
    """One question to the judge. id: the caller's, unique in a call. pass_number tells apart repeated judgements of
    the same. logprobs: how many top log-probs to ask for at each token of the reply (0: none)."""

    id: str
    messages: list[dict[str, str]]
    max_tokens: int
    temperature: float
    pass_number: int = 0
    logprobs: int = 0


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the judge said. model: the exact name the server returned. cost: USD. cached: from an earlier run.
    top_logprobs: for each token of the reply its candidates {token, logprob}; None where the server gives none."""

    text: str
    model: str
    tokens_in: int
    tokens_out: int
    cost: float
    cached: bool = False
    top_logprobs: list[list[dict[str, Any]]] | None = None


class Again(Exception):
    """A fault that may pass. after: seconds the server asks to wait, or None."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Refused(Exception):
    """The server will not take this one request."""


class Halt(Exception):
    """Nothing more can be asked."""


class Connection:
    """Sends requests to one endpoint; for any number of threads. counted_by: how tokens are counted beforehand."""

    def __init__(self, endpoint: Endpoint, timeout_s: float) -> None:
        self.endpoint, self.timeout_s = endpoint, timeout_s
        self.counted_by, self.count = _counter(endpoint.model)
        self._lock = threading.Lock()
        self._client: Any = None

    def call(self, request: Request) -> Reply:
        """Send it once; Again, Refused or Halt where that brings no reply. Tokens are those the server counts, or,
        where it counts none, estimates."""
        import openai

        extra = {"logprobs": True, "top_logprobs": request.logprobs} if request.logprobs else {}
        try:
            found = self._connected().chat.completions.create(
                model=self.endpoint.model, messages=request.messages, max_tokens=request.max_tokens,
                temperature=request.temperature, **extra,
            )  # fmt: skip
        except openai.APIStatusError as error:
            status, said = error.status_code, self._say(f"HTTP {error.status_code}: {error.message}")
            if status in (401, 403):
                raise Halt(f"{said}; check the variable named by --judge-key-variable") from None
            if status == 404:
                raise Halt(f"{said}; check --judge-url and --judge-model") from None
            if status == 429 and error.code == "insufficient_quota":
                raise Halt(f"{said}; all replies are kept, run again when there is credit") from None
            if status in (408, 409, 425, 429) or status >= 500:
                raise Again(said, _retry_after(error.response.headers)) from None
            raise Refused(said) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            kind = "timed out" if isinstance(error, openai.APITimeoutError) else "connection failed"
            raise Again(self._say(f"{kind}{f' ({cause})' if cause else ''}")) from None
        except (openai.APIError, ValueError) as error:  # a body that is not what the protocol says
            raise Again(self._say(f"malformed reply ({error})")) from None
        return self._parse(request, found)

    def _parse(self, request: Request, found: Any) -> Reply:
        """The reply in a completion; the client library does not check what the server sent."""
        try:
            choice = found.choices[0]
            text = choice.message.content or ""
            logprobs = None
            if request.logprobs and choice.logprobs is not None and choice.logprobs.content:
                logprobs = [
                    [{"token": str(top.token), "logprob": float(top.logprob)} for top in position.top_logprobs]
                    for position in choice.logprobs.content
                ]
            logprobs = json.loads(self._redact(to_json(logprobs)))  # refuses NaN and infinities
            usage = found.usage
            tokens_in = self.tokens(request) if usage is None else int(usage.prompt_tokens)
            tokens_out = self.count(text) if usage is None else int(usage.completion_tokens)
            if not isinstance(text, str) or min(tokens_in, tokens_out) < 0:
                raise TypeError("wrong types")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            raise Again("malformed reply (not a chat completion)") from None
        named = found.model if isinstance(found.model, str) and found.model else f"{self.endpoint.model} (not named)"
        # A server may echo what it was sent; neither the cache nor a table may carry the key.
        cost = self.endpoint.price(tokens_in, tokens_out)
        return Reply(self._redact(text), self._redact(named), tokens_in, tokens_out, cost, top_logprobs=logprobs)

    def _connected(self) -> Any:
        import openai

        with self._lock:
            if self._client is None:
                # Without a variable named, the library would take OPENAI_API_KEY and send it anywhere.
                self._client = openai.OpenAI(
                    api_key=self.endpoint.key or "none", base_url=self.endpoint.base_url, max_retries=0,
                    timeout=self.timeout_s,
                )  # fmt: skip
            return self._client

    def tokens(self, request: Request) -> int:
        """Tokens of the request's messages, counted as `counted_by` says."""
        return sum(self.count(message["content"]) + 4 for message in request.messages)  # 4: role and separators

    def _redact(self, text: str) -> str:
        key = self.endpoint.key
        return text.replace(key, "[key]") if len(key) >= 8 else text  # shorter ones are dummies of local servers

    def _say(self, text: str) -> str:
        """One line of moderate length; without the key, also where the line is cut."""
        return " ".join(self._redact(text).split())[:240]


@functools.cache
def _counter(model: str) -> tuple[str, Callable[[str], int]]:
    """How tokens are counted, and the count: the model's own encoding if it is on this machine, else a guess."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    if folder:  # elsewhere tiktoken would download
        import tiktoken

        with contextlib.suppress(Exception):
            encoding = tiktoken.encoding_for_model(model)
            return f"counted with {encoding.name}", lambda text: len(encoding.encode(text, disallowed_special=()))
    return "estimated at 4 characters a token", lambda text: -(-len(text) // 4)


def _retry_after(headers: Any) -> float | None:
    """Seconds in a Retry-After header, which holds a number or a date."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(seconds, 0.0) if seconds == seconds else None
