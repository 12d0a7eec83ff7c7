"""Train a small BERT on Python's own help: first to guess words that are masked, then to tell which topic a paragraph is from.

    headwater run -n 2 examples/bert.py                     # a server and two workers
    headwater run -n 2 examples/bert.py --transformers      # the same with the Transformers library's BertForMaskedLM
    python examples/bert.py                                 # one worker, the server inside its process

Both trainings are one job, of one model with two heads. What Headwater adds to an ordinary script, all in `main` and `train`: it connects,
hands the model to the job's optimizer, and `session.shard` leases the batches of each epoch to whoever asks.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from schedule import set_rate, share_of_batch, share_of_peak
from text import VOCABULARY, Tokenizer, paragraphs_of_topics, read_text
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import headwater as hw

if TYPE_CHECKING:
    import huggingface

PAD, START, STOP, MASK = range(VOCABULARY, VOCABULARY + 4)  # tokens beside those of text
CONTEXT = 64  # tokens that the model sees, START and STOP among them
WIDTH, DEPTH = 64, 2
TOPICS = 7  # the longest ones
PEAK_RATES = 2e-3, 1e-3  # for text, for topics
EVALUATE_EVERY = 250  # steps


class Layer(nn.Module):
    """Attention to all of the text, then a small network at each position; each is added to what came in, and the sum normalised."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads = width // 32
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, is_text: Tensor) -> Tensor:  # float32 (batch, time, width); bool (batch, time)
        query, key, value = self.attention_in(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=is_text[:, None, None])
        x = self.attention_norm(x + self.dropout(self.attention_out(seen.transpose(1, 2).flatten(2))))
        result: Tensor = self.network_norm(x + self.dropout(self.network(x)))
        return result


class Bert(nn.Module):
    """The encoder of Devlin et al. (2018), without pairs of sentences, and a head that guesses tokens by the matrix that embeds them."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, dropout) for _ in range(depth))
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, is_text: Tensor) -> Tensor:
        """Return float32 (batch, time, width). tokens: int64 (batch, time); is_text: bool, false where there is only padding."""
        x: Tensor = self.dropout(self.norm(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]))
        for layer in self.layers:
            x = layer(x, is_text)
        return x

    def guess(self, hidden: Tensor) -> Tensor:  # float32 (…, width) → logits, (…, vocabulary)
        return functional.linear(self.transform(hidden), self.tokens.weight, self.bias)


class Reader(nn.Module):
    """A BERT with a head that classifies texts by what stands at START."""

    def __init__(self, bert: Bert | huggingface.Bert, width: int, classes: int) -> None:
        super().__init__()
        self.bert = bert
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, classes))

    def classify(self, tokens: Tensor) -> Tensor:  # int64 (batch, time) → logits, float32 (batch, classes)
        logits: Tensor = self.head(self.bert(tokens, tokens != PAD)[:, 0])
        return logits

    def guess(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mask tokens, and return logits, float32 (masked, vocabulary), and what had stood there, int64 (masked,).

        15 % of the tokens are chosen; of these 80 % are masked, 10 % replaced by others and 10 % left, as in the paper.
        """
        is_chosen = (torch.rand(tokens.shape) < 0.15) & (tokens < VOCABULARY)
        fate = torch.rand(tokens.shape)
        seen = torch.where(is_chosen & (fate < 0.8), MASK, tokens)
        seen = torch.where(is_chosen & (fate >= 0.9), torch.randint(VOCABULARY, tokens.shape), seen)
        return self.bert.guess(self.bert(seen, tokens != PAD)[is_chosen]), tokens[is_chosen]


class Data:
    """Python's help as tokens, and its paragraphs with the topic that each is from; every fifth of these is kept from all training."""

    def __init__(self) -> None:
        pairs = paragraphs_of_topics(TOPICS)
        unseen = {paragraph for paragraph, _ in pairs[::5]}
        text = "\n\n".join(paragraph for paragraph in read_text().split("\n\n") if paragraph not in unseen)
        tokenizer = Tokenizer.learn(text)

        def encode(some: list[tuple[str, int]]) -> tuple[Tensor, Tensor]:
            framed = torch.stack([frame(tokenizer.encode(paragraph)) for paragraph, _ in some])
            return framed, torch.tensor([number for _, number in some])

        self.text = TensorDataset(torch.stack([frame(some) for some in tokenizer.encode(text).split(CONTEXT - 2)]))
        self.known = TensorDataset(*encode([pair for i, pair in enumerate(pairs) if i % 5]))
        self.held_out = encode(pairs[::5])  # int64 (count, CONTEXT) and (count,)


def frame(tokens: Tensor) -> Tensor:
    """Return START, as many of the tokens as there is room for, STOP, and padding: int64 (CONTEXT,)."""
    framed = torch.cat([torch.tensor([START]), tokens[: CONTEXT - 2], torch.tensor([STOP])])
    return functional.pad(framed, (0, CONTEXT - len(framed)), value=PAD)


@torch.no_grad()
def evaluate(model: Reader, data: Data, what: str) -> float:
    """Return which share of the masked tokens ("text"), or of the topics, is named rightly in the paragraphs held out."""
    tokens, labels = data.held_out
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same masks each time
        logits, expected = model.guess(tokens) if what == "text" else (model.classify(tokens), labels)
    model.train()
    return float((logits.argmax(1) == expected).float().mean())


def train(session: hw.Session, model: Reader, data: Data, options: Namespace) -> None:
    """Learn to guess masked tokens, then to tell topics; worker 0 looks now and then how well."""
    settings = hw.optim.AdamW(weight_decay=0.01, clip_norm=1.0)
    optimizer = hw.torch.Optimizer(model, settings, session=session)  # the changed line
    begin = 0
    for i, name in enumerate(("text", "topics")):
        loader = DataLoader((data.text, data.known)[i], options.batch, shuffle=True, drop_last=True)
        epochs, rate = options.epochs[i], PEAK_RATES[i] * share_of_batch(session) ** 0.5
        steps = epochs * len(loader) // session.workers
        for tokens, *labels in session.shard(loader, epochs=epochs, name=name, seed=options.seed):
            logits, expected = model.guess(tokens) if name == "text" else (model.classify(tokens), *labels)
            loss = functional.cross_entropy(logits, expected)
            loss.backward()  # the head that is not in use has no gradients: it stays as it is
            set_rate(optimizer, rate * share_of_peak(session.clock - begin, steps))
            optimizer.step()  # push gradients, pull parameters
            optimizer.zero_grad()
            session.report(loss=loss.item())
            if session.index == 0 and session.clock % EVALUATE_EVERY == 0:
                found = evaluate(model, data, name)
                session.report(held_out=found)
                print(f"step {session.clock}: {name}, loss {loss.item():.3f}, held out {found:.1%} right")
        begin += steps  # as planned, and so the same in all workers


def parse_options(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(
        description="Train a small BERT on Python's own help with Headwater, and let it tell topics."
    )
    parser.add_argument("--epochs", type=int, nargs=2, default=(10, 12), metavar="N", help="of text, then of topics")
    parser.add_argument("--batch", type=int, default=4, help="sequences per worker and step; default 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--transformers", action="store_true", help="train the Transformers library's BertForMaskedLM")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    data = Data()
    torch.manual_seed(options.seed)
    size = VOCABULARY + 4, CONTEXT, WIDTH, DEPTH
    if options.transformers:
        import huggingface

        model = Reader(huggingface.Bert(*size), WIDTH, TOPICS)
    else:
        model = Reader(Bert(*size), WIDTH, TOPICS)
    with hw.connect() as session:  # $HEADWATER_ADDRESS, or a server inside this process
        torch.manual_seed(hash((options.seed, session.index)))  # other masks in each worker
        train(session, model, data, options)
        if session.index == 0:
            labels = data.held_out[1]
            right, majority = evaluate(model, data, "topics"), labels.bincount().max() / len(labels)
            print(
                f"BERT tells the topic of {right:.1%} of {len(labels)} held-out paragraphs; the largest topic is {majority:.1%} of them"
            )


if __name__ == "__main__":
    main()
