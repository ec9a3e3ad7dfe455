"""LoRA, prompt tuning and P-tuning with the parameters of Hugging Face PEFT, inside of Foreword's own loop.

PEFT makes, starts and computes what is trained; the model stays a `BaseModel`, so that rows, loss and generation are
those of every other method. PEFT's wrapper around a model is not used: it shifts logits and labels its own way. The
one difference to it: virtual tokens come behind a start token, where the tokenizer has one, and not before it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from foreword.base import BaseModel
from foreword.errors import UnsupportedModel
from foreword.methods.config import MethodConfig
from foreword.methods.tuning import Tuning
from foreword.methods.virtual import VirtualTokens, start_vectors, word_vectors
from foreword.optional import optional

__all__ = ["LoraTuning", "p_tuning", "prompt_tuning", "seeded"]


class LoraTuning(Tuning):
    """Low-rank additions to linear maps: PEFT's layers, put in when applied and taken out again.

    `targets` "default" are those that PEFT names for the model type (queries and values in most), "all" all linear
    maps but the head. Source: Hu et al. 2021, arXiv 2106.09685.
    """

    def __init__(self, base: BaseModel, config: MethodConfig) -> None:
        self.base, self.config = base, config
        self.peft = optional("peft", "peft")
        self.values: dict[str, Tensor] = {}
        self._current: dict[str, nn.Parameter] = {}

    @contextlib.contextmanager
    def applied(self) -> Iterator[BaseModel]:
        model, options = self.base.model, self.config.options
        conv = any(type(module).__name__ == "Conv1D" for module in model.modules())
        settings = self.peft.LoraConfig(
            r=options["rank"], lora_alpha=options["alpha"], lora_dropout=0.0, fan_in_fan_out=conv,
            target_modules=None if options["targets"] == "default" else "all-linear",
        )  # fmt: skip
        with seeded(self.base, self.config.seed):
            try:
                tuner = self.peft.LoraModel(model, settings, "default")
            except ValueError as error:
                raise UnsupportedModel(
                    f"LoRA on {self.base.name!r} ({str(error).partition(chr(10))[0]})",
                    "a model type that PEFT knows linear maps of", "choose targets 'all' or another method",
                ) from None  # fmt: skip
        try:
            self._current = {name: p for name, p in model.named_parameters() if ".lora_" in name}
            for name, parameter in self._current.items():
                parameter.data = parameter.data.float() if name not in self.values else self.values[name].clone()
            yield self.base
        finally:
            self.values = {name: parameter.detach().clone() for name, parameter in self._current.items()}
            self._current = {}
            tuner.unload()

    def parameters(self) -> list[nn.Parameter]:
        return list(self._current.values())

    def tensors(self) -> dict[str, Tensor]:
        return self.values


def prompt_tuning(base: BaseModel, config: MethodConfig, instruction: str) -> VirtualTokens:
    """PEFT's prompt tuning: an embedding table of virtual tokens. Source: Lester et al. 2021, arXiv 2104.08691."""
    peft, length, init = optional("peft", "peft"), config.options["length"], config.options["init"]
    drawn = "SAMPLE_VOCAB" if init == "vocab" else "RANDOM"
    settings = peft.PromptTuningConfig(**_shape(base, length), prompt_tuning_init=drawn)
    with seeded(base, config.seed):
        encoder = peft.PromptEmbedding(settings, word_vectors(base))
    if init == "text":  # as PEFT's TEXT, which would load the tokenizer once more, by its name
        encoder.embedding.weight.data = start_vectors(base, length, init, instruction, config.seed)
    return VirtualTokens(base, _Encoded(encoder, length), length)


def p_tuning(base: BaseModel, config: MethodConfig) -> VirtualTokens:
    """PEFT's P-tuning: virtual tokens that an MLP or an LSTM makes, which is dropped after training.

    Source: Liu et al. 2021, arXiv 2103.10385.
    """
    peft, options = optional("peft", "peft"), config.options
    settings = peft.PromptEncoderConfig(
        **_shape(base, options["length"]), encoder_hidden_size=options["hidden_size"],
        encoder_reparameterization_type=options["encoder"].upper(),
    )  # fmt: skip
    with seeded(base, config.seed):
        encoder = peft.PromptEncoder(settings)
    return VirtualTokens(base, _Encoded(encoder, options["length"]), options["length"])


class _Encoded(nn.Module):
    """The vectors that a prompt encoder of PEFT makes."""

    def __init__(self, encoder: nn.Module, length: int) -> None:
        super().__init__()
        self.encoder = encoder.float()
        self.register_buffer("places", torch.arange(length), persistent=False)

    def forward(self) -> Tensor:
        return cast(Tensor, self.encoder(cast(Tensor, self.places)[None])[0])


def _shape(base: BaseModel, length: int) -> dict[str, Any]:
    embedded = word_vectors(base)
    return {
        "task_type": "CAUSAL_LM", "num_virtual_tokens": length, "num_transformer_submodules": 1,
        "token_dim": embedded.weight.shape[1], "num_layers": 1, "num_attention_heads": 1,
    }  # fmt: skip


@contextlib.contextmanager
def seeded(base: BaseModel, seed: int) -> Iterator[None]:
    """Inside, what PEFT draws for a base depends on the seed; the random state of the caller is not touched."""
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
