"""The GPT of gpt.py behind HTTP: what the server builds, and a client that lets it write and swaps versions under load.

headwater demo                                                                          # does all of this at its end
PYTHONPATH=examples headwater serve --model gpt_serving:build --store headwater-demo/versions
python examples/gpt_serving.py http://127.0.0.1:8000 --store headwater-demo/versions --next latest
"""

from __future__ import annotations

import json
import threading
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import torch
from gpt import CONTEXT, GPT, sample
from text import Tokenizer
from torch import Tensor

import headwater as hw

PROMPT = "The"


class NextToken(GPT):
    """Answers with the last position's logits alone: all that writing needs."""

    example_input_array = torch.zeros(1, CONTEXT, dtype=torch.int64)

    def forward(self, tokens: Tensor) -> Tensor:  # int64 (batch, time) → float32 (batch, vocabulary)
        return super().forward(tokens)[:, -1]


def build() -> NextToken:
    return NextToken()


class Client:
    """One connection to the server; counts which version has answered how often."""

    def __init__(self, url: str) -> None:
        self._connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
        self.answers = Counter[str]()

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token, (1, 1, vocabulary); tokens: (1, time). Raises OSError or ValueError on a bad answer."""
        context = tokens[0].tolist()
        asked = {"name": "tokens", "datatype": "INT64", "shape": [1, len(context)], "data": context}
        self._connection.request("POST", "/v2/models/gpt_serving/infer", json.dumps({"inputs": [asked]}))
        answer = self._connection.getresponse()
        body = json.loads(answer.read())
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {body.get('error')}")
        self.answers[body["model_version"]] += 1
        return torch.tensor(body["outputs"][0]["data"])[None, None]


def swap(url: str, versions: hw.Versions, tag: str, number: int) -> tuple[float, Counter[str]]:
    """Move the tag while requests are sent one after another; returns the seconds until the new version answers, and who has answered."""
    client, tokens = Client(url), torch.zeros(1, CONTEXT, dtype=torch.int64)
    moved_s: list[float] = []

    def move() -> None:
        versions.tag(tag, number)
        moved_s.append(time.perf_counter())

    mover = threading.Timer(0.3, move)
    mover.start()
    while not client.answers[str(number)]:
        client(tokens)
    taken_s = time.perf_counter() - moved_s[0]
    for _ in range(20):
        client(tokens)
    return taken_s, client.answers


def describe(version: hw.Version) -> str:
    held_out = version.metrics.get("held_out")
    return f"version {version.id}, of step {version.commit}" + (f", held out {held_out:.3f}" if held_out else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description="Let a served GPT write; then move the tag, and let it write again.")
    parser.add_argument("url", help="the server's, such as http://127.0.0.1:8000")
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="where its versions are")
    parser.add_argument("--tag", default="prod", help="that the server follows")
    parser.add_argument("--next", metavar="VERSION", help="move the tag there, under load")
    parser.add_argument("--characters", type=int, default=300)
    options = parser.parse_args(arguments)
    versions, client = hw.Versions(options.store), Client(options.url)
    first = versions.get(versions.resolve(options.tag))
    held = next(held for held in first.attached if held.name == "tokenizer.json")
    tokenizer = Tokenizer(json.loads(Path(versions.folder(held.version), held.name).read_text()))
    print(
        f"{options.tag} is {describe(first)}. Over HTTP it writes:\n\n{sample(client, tokenizer, PROMPT, options.characters)}\n"
    )
    if options.next is not None and versions.resolve(options.next) != first.id:
        second = versions.get(versions.resolve(options.next))
        seconds, answers = swap(options.url, versions, options.tag, second.id)
        counts = ", ".join(f"{count} by version {each}" for each, count in sorted(answers.items()))
        print(f"Now {options.tag} is {describe(second)}: it answers after {seconds:.2f} s.")
        print(f"Of {answers.total()} requests meanwhile none failed ({counts}). It writes:\n")
        print(sample(client, tokenizer, PROMPT, options.characters), end="\n\n")


if __name__ == "__main__":
    main()
