"""Train a small GPT on text with any number of workers, and let it write.

    headwater demo                            # a server, two workers and a minute, live
    headwater run -n 2 examples/gpt.py        # the same without the display
    python examples/gpt.py                    # one worker, the server inside its process

What Headwater adds to an ordinary training script: `main` connects, loads and saves, `make_optimizer` hands over the model, `train`
takes this worker's part of the data and reports, and `Run` agrees with the other workers on when to stop.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from schedule import Run, adamw
from text import VOCABULARY, Tokenizer, read_text
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import headwater as hw

CONTEXT = 64  # tokens that the model sees, about 190 characters
BATCH = 8  # sequences per worker and step
PEAK_RATE = 2e-3
EVALUATE_EVERY = 50  # steps
HELD_OUT = 48  # windows to evaluate, at most
TEMPERATURE = 0.7  # the lower, the less of what is written is left to chance


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


def train(
    session: hw.Session, model: nn.Module, optimizer: Optimizer, tokenizer: Tokenizer, text: str, options: Namespace
) -> None:
    """Learn the first nine tenths of the text; look now and then how well the last tenth is foreseen."""
    cut = len(text) * 9 // 10
    tokens, held_out = tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:])
    part = session.shard(tokens.unfold(0, CONTEXT + 1, 1))  # this worker's windows of all, one at each token
    per_character = len(tokens) / cut  # losses are shown per character, comparable whatever the tokens are
    run = Run(session, options.steps, options.minutes)
    schedule = LambdaLR(optimizer, lambda _: run.rate)
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
        nats = loss.item() * per_character
        session.report(loss=nats, tokens=count, **run.figures())
        if session.index == 0 and (run.is_over or session.clock % EVALUATE_EVERY == 0):
            unseen = evaluate(model, tokenizer, held_out)
            session.report(held_out=unseen, lr=optimizer.param_groups[0]["lr"])
            print(f"step {session.clock}: loss {nats:.3f}, held out {unseen:.3f} nats per character")


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Tokenizer, tokens: Tensor) -> float:
    """Return the mean loss in nats per character over a few evenly spaced windows, always the same."""
    windows = tokens.unfold(0, CONTEXT + 1, CONTEXT)
    windows = windows[:: math.ceil(len(windows) / HELD_OUT)]
    nats: float = sum(float(loss_of(model, some)) * some[:, 1:].numel() for some in windows.split(32))
    return nats / len(tokenizer.decode(windows[:, 1:].flatten()))


@torch.no_grad()
def sample(model: Callable[[Tensor], Tensor], tokenizer: Tokenizer, prompt: str, length: int, seed: int = 0) -> str:
    """Continue the prompt by `length` characters."""
    generator = torch.Generator().manual_seed(seed)
    tokens, written = tokenizer.encode(prompt), ""
    while len(written) < length:
        logits = model(tokens[None, -CONTEXT:])[0, -1, : len(tokenizer.pieces)]
        chances = torch.softmax(logits / TEMPERATURE, dim=0)
        chances[chances < 0.05 * chances.max()] = 0.0  # what is far less likely than the likeliest is mostly noise
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)])
        written = tokenizer.decode(tokens)[len(prompt) :]
    return prompt + written[:length]


def parse_options(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(description="Train a small GPT on text with Headwater, and let it write.")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to learn; default: Python's own help")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to train, about; default 1")
    parser.add_argument("--steps", type=int, help="how many steps to train instead")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"sequences per worker and step; default {BATCH}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try things out in seconds")
    parser.add_argument("--transformers", action="store_true", help="train the Transformers library's GPT2LMHeadModel")
    parser.add_argument("--save", type=Path, metavar="DIR", help="save the job there at the end")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with a saved job: to its end, or --minutes")
    parser.add_argument("--sample", type=int, metavar="N", help="train nothing: let the saved model write N characters")
    parser.add_argument("--prompt", default="The", help="how what it writes begins")
    return parser.parse_args(arguments)


def make_optimizer(model: nn.Module, session: hw.Session) -> Optimizer:
    """Put the model's parameters under the job's care: from here on they are the same in all workers."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]  # norms: they are not to decay
    settings = adamw(session, PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1, clip_norm=1.0)
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer: Optimizer = hw.torch.Optimizer(model, settings, groups=groups, session=session)
    return optimizer


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    torch.manual_seed(options.seed)
    size = {"width": 64, "depth": 2} if options.small else {"width": 192, "depth": 4}
    if options.transformers:
        from huggingface import GPT2

        model: nn.Module = GPT2(VOCABULARY, CONTEXT, **size)
    else:
        model = GPT(**size)
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
