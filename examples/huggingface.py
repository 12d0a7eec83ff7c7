"""Models of the Transformers library (pip install transformers), made at the size of the examples' own, with nothing downloaded."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel


class GPT2(nn.Module):
    """A GPT2LMHeadModel: int64 (batch, time) → logits, float32 (batch, time, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
            n_embd=width,
            n_layer=depth,
            n_head=width // 32,
            bos_token_id=None,  # the text has no beginning or end of its own
            eos_token_id=None,
            use_cache=False,
        )
        self.model = GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens).logits
        return logits


class Bert(nn.Module):
    """A BertForMaskedLM in two parts, as `bert.Bert` is."""

    def __init__(self, vocabulary: int, context: int, width: int, depth: int) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=vocabulary,
            max_position_embeddings=context,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=width // 32,
            intermediate_size=4 * width,
        )
        self.model = BertForMaskedLM(config)

    def forward(self, tokens: Tensor, is_text: Tensor) -> Tensor:
        hidden: Tensor = self.model.bert(tokens, attention_mask=is_text).last_hidden_state
        return hidden

    def guess(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.cls(hidden)
        return logits
