"""Train a small GPT on text with any number of workers, and let it write.

    headwater demo                            # a server, two workers and a minute, live
    headwater run -n 2 examples/gpt.py        # the same without the display
    python examples/gpt.py                    # one worker, the server inside its process

What Headwater adds to an ordinary training script: `main` connects, loads and saves, `make_optimizer` hands over the model, `train`
takes this worker's part of the data and reports, and `Run` agrees with the other workers on when to stop.
"""

from __future__ import annotations

import argparse
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional

import headwater as hw

VOCABULARY = 1024  # tokens: 256 bytes and the pieces of text that save the most
CONTEXT = 64  # tokens that the model sees, about 190 characters
BATCH = 8  # sequences per worker and step
PEAK_RATE = 2e-3
WARM_UP = 40  # steps
FAR = 10**9  # steps: an end that is not known yet
EVALUATE_EVERY = 50  # steps
HELD_OUT = 48  # windows to evaluate, at most


class Tokenizer:
    """Text to token ids and back. A token stands for a few bytes; each single byte is a token too, so any text has tokens."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = list(pieces)  # as Latin-1: one character per byte
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        longest_first = sorted(self.pieces, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    @classmethod
    def learn(cls, text: str, size: int = VOCABULARY) -> Tokenizer:
        """Start from bytes; join the neighbours that are most often side by side within words, again and again."""
        counts = Counter(re.findall(r" ?\w+| ?[^\w\s]+|\s+(?= )|\s+", _spell(text))).most_common(5000)
        tokenizer = cls([chr(byte) for byte in range(256)])
        for _ in range(256, size, 32):
            pairs = Counter[str]()
            for word, count in counts:
                for left, right in pairwise(tokenizer._pattern.findall(word)):
                    pairs[left + right] += count
            joined = [pair for pair, _ in pairs.most_common(32)]
            tokenizer = cls(tokenizer.pieces + joined)
        return tokenizer

    def encode(self, text: str) -> Tensor:  # int64, (tokens,)
        return torch.tensor([self._ids[piece] for piece in self._pattern.findall(_spell(text))])

    def decode(self, tokens: Tensor) -> str:
        spelled = "".join(self.pieces[i] for i in tokens.tolist())
        return spelled.replace("\n ", "\n").encode("latin-1").decode("utf-8", errors="replace")


def _spell(text: str) -> str:
    """Return the text's bytes as Latin-1, one space more at the start of each line: its first word then looks more like the others."""
    return text.encode().decode("latin-1").replace("\n", "\n ")


class Block(nn.Module):
    """Attention to the past, then a small network at each position; both are added to what came in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 32
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.network = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:  # float32, (batch, time, width), as is the result
        projected = self.attention_in(self.attention_norm(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # each (batch, heads, time, channels)
        seen = functional.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True)
        x = x + self.attention_out(seen.transpose(1, 2).flatten(2))
        result: Tensor = x + self.network(self.network_norm(x))
        return result


def rotate(x: Tensor) -> Tensor:  # float32, (batch, heads, time, channels), as is the result
    """Turn pairs of channels by angles that grow with the position, so that attention sees how far apart two positions are."""
    time_steps, channels = x.shape[-2:]
    speeds = 1000.0 ** (-torch.arange(0, channels, 2) / channels)
    angles = torch.arange(time_steps)[:, None] * speeds
    left, right = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class GPT(nn.Module):
    """From tokens to logits of the next token, at every position; the same matrix embeds tokens and predicts them."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = 192, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # int64 (batch, time) → float32 (batch, time, vocabulary)
        x = self.norm(self.blocks(self.embedding(tokens)))
        return functional.linear(x, self.embedding.weight)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Return the mean loss in nats per token; windows: int64, (batch, time + 1)."""
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


class Run:
    """How long this run lasts, and the learning rate at each step: the same in all workers, as their steps are taken together.

    Nobody knows how many steps a minute has. Worker 0 finds out during the warm-up and tells the others, and those who join later
    or resume, through the job's state.
    """

    def __init__(self, session: hw.Session, steps: int | None, minutes: float) -> None:
        self._session, self._minutes = session, minutes
        self._start, self._start_s = session.clock, time.monotonic()
        self.begin: int  # included
        self.end: int  # not included
        self.begin, self.end = session.state.get("run", (0, 0))
        if self.end <= session.clock:  # not a run that is under way
            self.begin, self.end = session.clock, session.clock + (steps or FAR)
            if session.index == 0:
                session.state["run"] = self.begin, self.end

    def update(self) -> None:
        """Find out when the run ends, until it is known; to be called after each step."""
        if self.has_end:
            return
        if self._session.index > 0:
            self.begin, self.end = self._session.state["run"]
        elif self._session.clock == self._start + WARM_UP // 2:
            self.end = self._start + round(60 * self._minutes / self._step_s)
            self._session.state["run"] = self.begin, self.end

    @property
    def has_end(self) -> bool:
        return self.end < self.begin + FAR

    @property
    def is_over(self) -> bool:
        return self._session.clock >= self.end

    @property
    def rate(self) -> float:
        """The share of the peak learning rate: a warm-up, then half a cosine down to a tenth."""
        done, total = self._session.clock - self.begin, self.end - self.begin
        progress = max(0, done - WARM_UP) / max(1, total - WARM_UP)
        return min(1.0, (done + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * progress))

    @property
    def _step_s(self) -> float:  # the mean so far
        return (time.monotonic() - self._start_s) / (self._session.clock - self._start)

    def figures(self) -> dict[str, float]:
        """How far the run is, for the display."""
        if not self.has_end:
            return {}
        left = max(0, self.end - self._session.clock)
        return {"progress": 1 - left / (self.end - self.begin), "seconds_left": left * self._step_s}


def train(
    session: hw.Session,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    text: str,
    options: argparse.Namespace,
) -> None:
    """Learn the first nine tenths of the text; look now and then how well the last tenth is foreseen."""
    cut = len(text) * 9 // 10
    tokens, held_out = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
    part = session.shard(tokens.unfold(0, CONTEXT + 1, 1))  # this worker's windows of all, one at each token
    per_character = len(tokens) / cut  # losses are shown per character, comparable whatever the tokens are
    run = Run(session, options.steps, options.minutes)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: run.rate)
    count = 0
    while not run.is_over:
        seed = hash((options.seed, session.clock, session.index))  # other windows in each worker; a resumed job goes on
        chance = torch.Generator().manual_seed(seed)
        places = torch.randint(len(part), (options.batch,), generator=chance)
        loss = loss_of(model, torch.stack([part[place] for place in places.tolist()]))
        loss.backward()
        optimizer.step()  # push gradients, pull parameters
        optimizer.zero_grad()
        run.update()
        schedule.step()
        count += options.batch * CONTEXT
        session.report(loss=loss.item() * per_character, tokens=count, **run.figures())
        if session.index == 0 and (run.is_over or session.clock % EVALUATE_EVERY == 0):
            nats = evaluate(model, tokenizer, held_out)
            session.report(held_out=nats, lr=optimizer.param_groups[0]["lr"])
            print(
                f"step {session.clock}: loss {loss.item() * per_character:.3f}, held out {nats:.3f} nats per character"
            )


@torch.no_grad()
def evaluate(model: GPT, tokenizer: Tokenizer, tokens: Tensor) -> float:
    """Return the mean loss in nats per character over a few evenly spaced windows, always the same."""
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    windows = windows[:: math.ceil(len(windows) / HELD_OUT)]
    nats: float = sum(float(loss_of(model, some)) * some[:, 1:].numel() for some in windows.split(32))
    return nats / len(tokenizer.decode(windows[:, 1:].flatten()))


@torch.no_grad()
def sample(model: GPT, tokenizer: Tokenizer, prompt: str, length: int, temperature: float = 0.7, seed: int = 0) -> str:
    """Continue the prompt by `length` characters; the lower the temperature, the less is left to chance."""
    generator = torch.Generator().manual_seed(seed)
    tokens, written = tokenizer.encode(prompt), ""
    while len(written) < length:
        logits = model(tokens[None, -CONTEXT:])[0, -1, : len(tokenizer.pieces)]
        chances = torch.softmax(logits / temperature, dim=0)
        chances[chances < 0.05 * chances.max()] = 0.0  # what is far less likely than the likeliest is mostly noise
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)])
        written = tokenizer.decode(tokens)[len(prompt) :]
    return prompt + written[:length]


def read_text(path: Path | None) -> str:
    """Return the file's text; without one, Python's own help, in which paragraphs that come again are left out."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    return "\n\n".join(dict.fromkeys(paragraphs))


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small GPT on text with Headwater, and let it write.")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to learn; default: Python's own help")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to train, about; default 1")
    parser.add_argument("--steps", type=int, help="how many steps to train instead")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"sequences per worker and step; default {BATCH}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try things out in seconds")
    parser.add_argument("--save", type=Path, metavar="DIR", help="save the job there at the end")
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with a saved job: to its end, or for another --minutes"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="train nothing: let the saved model write N characters")
    parser.add_argument("--prompt", default="The", help="how what it writes begins")
    return parser.parse_args(arguments)


def make_optimizer(model: GPT, session: hw.Session) -> torch.optim.Optimizer:
    """Put the model's parameters under the job's care: from here on they are the same in all workers."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]  # norms: they are not to decay
    settings = hw.optim.AdamW(lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0)
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer: torch.optim.Optimizer = hw.torch.Optimizer(model, settings, groups=groups, session=session)
    return optimizer


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.manual_seed(options.seed)
    model = GPT(width=64, depth=2) if options.small else GPT()
    text = read_text(options.text)[: 50_000 if options.small else None]
    with hw.connect() as session:  # $HEADWATER_ADDRESS, or a server inside this process
        if options.resume:
            session.load(options.resume)
        optimizer = make_optimizer(model, session)
        pieces = session.state.get("pieces")  # of a job that is under way, or resumed
        tokenizer = Tokenizer(pieces) if pieces else Tokenizer.learn(text)
        if options.sample:
            print(sample(model, tokenizer, options.prompt, options.sample, seed=options.seed))
            return
        if session.index == 0:
            session.state["pieces"] = tokenizer.pieces
        train(session, model, optimizer, tokenizer, text, options)
        if options.save and session.index == 0:
            session.save(options.save)


if __name__ == "__main__":
    main()
