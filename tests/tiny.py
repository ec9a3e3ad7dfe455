"""Tiny random models of the real classes: every supported family, and some that are refused.

Float32, in eval mode, seeded. All weights are perturbed, biases, norms, sinks and scales too, so that an
operation which is left out or done twice shows in the logits.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

if TYPE_CHECKING:
    from foreword.base import BaseModel

__all__ = ["REFUSED", "TINY", "VOCAB", "save_tiny", "tiny_base", "tiny_inputs", "tiny_model", "tiny_tokenizer"]

VOCAB = 300
PAD, BOS, EOS = 0, 1, 2

_TEXTS = (
    "The foreword comes before the text and changes how it is read.",
    "A prefix is a short block of keys and values in front of the attention.",
    "name : Aromi | eatType : pub | food : Fast food | area : riverside",
    "Aromi is a pub by the river that serves fast food. Many hands make light work, and the rest is silence.",
)

_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_DECODER = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **_SPECIAL,
}  # fmt: skip
_HEADS = {**_DECODER, "head_dim": 8}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, **_SPECIAL,
}  # fmt: skip
_ROBERTA = {**_BERT, "max_position_embeddings": 66}
_BART = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": EOS, "forced_eos_token_id": None, **_SPECIAL,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "decoder_start_token_id": PAD,
    **_SPECIAL,
}  # fmt: skip
_DEEPSEEK = {
    **_DECODER, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
_QWEN3_NEXT = {
    **_HEADS, "head_dim": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
_WHISPER = {
    **_BART, "max_source_positions": 12, "max_target_positions": 64, "num_mel_bins": 8,
    "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
_DISTILBERT = {
    "vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": PAD,
}  # fmt: skip
_MODERNBERT = {
    **_BERT, "num_hidden_layers": 3, "local_attention": 8, "global_attn_every_n_layers": 3,
    "cls_token_id": BOS, "sep_token_id": EOS,
}  # fmt: skip

# name -> (configuration class, model class, options)
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_DECODER, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 12}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {
        **_HEADS, **_SLIDING, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8,
    }),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_HEADS, **_SLIDING, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {
        "vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **_SPECIAL,
    }),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {
        **{k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}, "rotary_pct": 0.5,
    }),
    "opt": ("OPTConfig", "OPTForCausalLM", {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, **_SPECIAL,
    }),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _DECODER),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {
        **_HEADS, **_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2,
    }),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _DEEPSEEK),
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _ROBERTA),
    "xlm-roberta": ("XLMRobertaConfig", "XLMRobertaForSequenceClassification", _ROBERTA),
    "electra": ("ElectraConfig", "ElectraForTokenClassification", {**_BERT, "embedding_size": 16, "num_labels": 4}),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification", _DISTILBERT),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {
        **_BERT, "num_hidden_layers": 3, "num_hidden_groups": 1, "embedding_size": 16,
    }),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", _MODERNBERT),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForTokenClassification", {
        **_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8,
        "max_relative_positions": 64, "position_biased_input": False, "type_vocab_size": 0, "num_labels": 4,
    }),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "t5-odd": ("T5Config", "T5ForConditionalGeneration", {
        **_T5, "d_kv": 12, "num_layers": 3, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", {**_BART, "decoder_start_token_id": PAD}),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _BART),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", _WHISPER),
    "vit": ("ViTConfig", "ViTForImageClassification", {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "image_size": 12, "patch_size": 4, "num_labels": 10,
    }),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _QWEN3_NEXT),
    "mamba": ("MambaConfig", "MambaForCausalLM", {
        "vocab_size": VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, **_SPECIAL,
    }),
    "bloom": ("BloomConfig", "BloomForCausalLM", {
        "vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_SPECIAL,
    }),
}  # fmt: skip

REFUSED: tuple[str, ...] = ("qwen3_next", "mamba", "bloom")
TINY: tuple[str, ...] = tuple(name for name in _MODELS if name not in REFUSED)


def tiny_model(name: str, *, seed: int = 0, **overrides: Any) -> hf.PreTrainedModel:
    """A new tiny model; `name` is a model type (or `t5-odd`), `overrides` are options of its configuration."""
    config_name, model_name, options = _MODELS[name]
    config = getattr(hf, config_name)(**{**options, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: hf.PreTrainedModel = getattr(hf, model_name)(config)
        _perturb(model)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = None  # random models rarely end; tests want full lengths
        generation.pad_token_id = PAD
        generation.forced_eos_token_id = None
    return model.float().eval()


@torch.no_grad()
def _perturb(model: torch.nn.Module) -> None:
    """Matrices to a spread that makes attention peaked and logits varied, vectors away from 0 and 1."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.dim() < 2:
            parameter.add_(noise, alpha=0.2)
        elif parameter.shape[0] == VOCAB:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()


@functools.lru_cache(maxsize=1)
def tiny_tokenizer() -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB` tokens, trained in memory; any text survives encode and decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def tiny_base(name: str, **overrides: Any) -> BaseModel:
    """A tiny model as a `BaseModel`, with the tiny tokenizer where the model reads text."""
    from foreword.base import BaseModel

    tokenizer = None if name in ("vit", "whisper") else tiny_tokenizer()
    return BaseModel(tiny_model(name, **overrides), tokenizer, name=f"tiny-{name}")


def save_tiny(name: str, folder: Path, **overrides: Any) -> str:
    """A tiny model and its tokenizer in a folder, as a user's own model is; the folder's path."""
    tiny_model(name, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_inputs(name: str, batch: int = 2, tokens: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of the right kind: token ids with a mask, images or sounds; targets where there is a decoder."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> Tensor:
        return torch.randint(3, VOCAB, (batch, tokens), generator=generator)

    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 12, 12, generator=generator)}
    if name == "whisper":
        sound = torch.randn(batch, 8, 24, generator=generator)
        return {"input_features": sound, "decoder_input_ids": ids()}
    inputs = {"input_ids": ids()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if _MODELS[name][1].endswith("ForConditionalGeneration"):
        inputs["decoder_input_ids"] = ids()[:, : max(1, tokens - 2)]
    return inputs
