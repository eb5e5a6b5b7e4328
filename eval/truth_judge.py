"""A judge for the miniature that needs no model: a local server that speaks the OpenAI chat protocol and judges by
the truth.

    python -m eval.truth_judge --prompts WORLD/prompts-test.jsonl --port 0      prints its address and serves

It knows the questions of --prompts by their text. A grading prompt, with questions and answers between <question> and
<answer> tags (of JUDGE_PROMPTS below), gets the reward of the last answer as "Rating: [[x]]"; a ranking prompt of the
alpaca_eval package gets the two answers ranked by reward. Everything between the answers and the tables is then what a
paid judge goes through. Only this machine can reach it.
"""

import argparse
import json
import re
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from data_prep.files import InputError, run_command, to_json
from data_prep.manifest import code_digest
from data_prep.miniature.world import score
from data_prep.rows import read_prompts

LONGEST_BODY = 10_000_000  # bytes
# What eval.mt_bench asks this judge, in the layout of FastChat's judge_prompts.jsonl.
_TURN = "<question>{{question{0}}}</question>\n<answer>{{answer{0}}}</answer>\n"
_GRADE = "Grade the last answer from 1 to 10, as Rating: [[x]].\n"
JUDGE_PROMPTS = [
    {
        "name": f"single{kind}-v1{ending}",
        "system_prompt": "You grade answers.",
        "prompt_template": _GRADE + (f"Reference: {{ref_answer_{last}}}\n" if kind else "") + turns,
    }
    for kind in ("", "-math")
    for ending, last, turns in (
        ("", 1, _TURN.format("")),
        ("-multi-turn", 2, _TURN.format("_1") + _TURN.format("_2")),
    )
]
GRADED = re.compile(r"<question>(.*?)</question>\n<answer>(.*?)</answer>\n", re.DOTALL)
# The data that the package's ranking template is filled with.
RANKED = re.compile(r'"instruction": """(.*?)""".*?"answer": """(.*?)"""\n.*?"answer": """(.*?)"""\n', re.DOTALL)


class TruthJudge:
    """The server, and what it says. truths: of each question, by its text."""

    def __init__(self, prompts: Sequence[Path], port: int = 0) -> None:
        """Listen on 127.0.0.1 (port 0: any free one); InputError for prompts without truths and a port in use."""
        self.truths = {}
        for path in prompts:
            items = read_prompts(path)
            if not all("truth" in item for item in items):
                raise InputError(f"{path}: prompts without a truth; give those of the miniature world")
            self.truths |= {item["prompt"][-1]["content"]: item["truth"] for item in items}
        self.model = f"truth-{code_digest('data_prep.miniature.world')[:12]}"
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                status, body = owner.answer(self.rfile.read(min(self._length(), LONGEST_BODY)))
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _length(self) -> int:
                length = self.headers.get("Content-Length", "")
                return int(length) if length.isdigit() else 0

            def log_message(self, *words: Any) -> None:
                """Nothing: a line for each call would bury what matters."""

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except (OSError, OverflowError):
            raise InputError(f"--port {port}: cannot be listened on; choose another, or 0 for any") from None
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def serve(self) -> None:
        """Answer until the process is stopped."""
        self._server.serve_forever()

    def start(self) -> None:
        """Serve in a thread of its own, until `close`."""
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        """Stop what `start` began."""
        self._server.shutdown()
        self._server.server_close()

    def answer(self, body: bytes) -> tuple[int, bytes]:
        """Status and body of the reply to one request's body; 400, with the reason, for what it cannot judge."""
        try:
            prompt = json.loads(body)["messages"][-1]["content"]
            text = self.say(prompt)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            return 400, to_json({"error": {"message": f"not a chat request ({error!r})", "code": None}}).encode()
        except InputError as error:
            return 400, to_json({"error": {"message": str(error), "code": None}}).encode()
        tokens = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        reply = {
            "id": "truth", "object": "chat.completion", "created": 0, "model": self.model,
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            ],
            "usage": {**tokens, "total_tokens": sum(tokens.values())},
        }  # fmt: skip
        return 200, to_json(reply).encode()

    def say(self, prompt: str) -> str:
        """The rating or the ranking that a prompt asks for; InputError for other prompts and unknown questions."""
        if graded := GRADED.findall(prompt):
            question, answer = graded[-1]
            return f"By the truth. Rating: [[{self._score(question, answer):g}]]"
        if ranked := RANKED.search(prompt):
            first, second = (self._score(ranked[1], ranked[i]) for i in (2, 3))
            # The protocol knows no draw. The package shows the answers in an order that a hash of the question
            # decides, so that ranking the first shown one higher is a coin flip for each question.
            ranks = (1, 2) if first >= second else (2, 1)
            return to_json([{"model": f"model_{i}", "rank": rank} for i, rank in zip((1, 2), ranks, strict=True)])
        raise InputError("neither a grading nor a ranking prompt")

    def _score(self, question: str, answer: str) -> float:
        if question not in self.truths:
            raise InputError(f"unknown question {question[:80]!r}; start the judge with its prompts")
        return score(self.truths[question], answer)


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m eval.truth_judge")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", required=True, help="prompts of the miniature world, with truths"
    )
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    arguments = parser.parse_args()
    judge = TruthJudge(arguments.prompts, arguments.port)
    print(judge.url, flush=True)
    judge.serve()


if __name__ == "__main__":
    run_command(main)
