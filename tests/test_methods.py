"""The compared methods: one interface, the same loss and rows for all, and a base model that is left as it was."""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.labels import ENCODERS, LabelToy
from tests.labels import KINDS as LABELLED
from tests.tiny import TINY, VOCAB, tiny_base
from tests.toy import ToyTask
from tokenizers import processors
from torch import Tensor

from foreword.base import BaseModel
from foreword.begin import begin_objective
from foreword.config import TrainConfig
from foreword.data import encode_split
from foreword.errors import ConfigError, DataError, RunError, UnsupportedModel
from foreword.evaluate import evaluate
from foreword.methods import METHODS, SEARCH_SIZE, TEMPLATES, Fitted, MethodConfig, fit, fit_each, fitting, search_space
from foreword.methods.adapters import AdapterTuning, bottleneck_size
from foreword.methods.fitted import FittedPrefix, FittedTuning
from foreword.methods.loop import measure, train_weights
from foreword.methods.prompting import Prompting
from foreword.methods.through_peft import seeded
from foreword.methods.triggers import TriggerSearch
from foreword.methods.tuning import sublayers
from foreword.methods.virtual import Extended, Vectors, VirtualTokens, vocabulary, word_vectors
from foreword.methods.weights import WeightTuning, all_weights, top_weights
from foreword.objectives import Objective, objective_of
from foreword.parametrization import PrefixModule, parametrize
from foreword.prefix import Prefix
from foreword.tasks import Example, Labelled, Split
from foreword.train import train

WRITTEN = ("zero_shot", "few_shot")
WRITING = tuple(name for name, method in METHODS.items() if "decoder" in method.bases)
TRAINED = tuple(name for name in WRITING if name not in WRITTEN)
READING = tuple(name for name, method in METHODS.items() if "encoder" in method.bases)
SMALL: dict[str, dict[str, Any]] = {
    "adapter": {"share": 0.1}, "lora": {"rank": 4, "learning_rate": 0.03}, "prompt_tuning": {"length": 4},
    "embedding": {"length": 4}, "p_tuning": {"length": 4, "hidden_size": 8}, "infix": {"length": 4},
    "prefix": {"length": 4}, "ptuning2": {"length": 4}, "apt": {"length": 4},
    "autoprompt": {"length": 3, "candidates": 4},
}  # fmt: skip
TRAIN, DEV = ToyTask().split("train"), ToyTask().split("dev")


def config_of(method: str, **values: Any) -> MethodConfig:
    shared = {"epochs": 3, "batch_size": 7, "patience": 0}
    return MethodConfig.of(method, **{**shared, **SMALL.get(method, {}), **values})


def fit_toy(base: BaseModel, method: str, **values: Any) -> Fitted:
    return fit(base, TRAIN, DEV, config_of(method, **values), instruction=ToyTask.instruction)


@functools.cache
def toy_fit(method: str, model: str = "llama") -> Fitted:
    """One fit of each method, for tests that only look at it."""
    return fit_toy(tiny_base(model), method)


def untrained(base: BaseModel, split: Split) -> float:
    return measure(objective_of(base, ToyTask()), encode_split(base, split), 7)


def snapshot(base: BaseModel) -> dict[str, Any]:
    """All that a method may have touched of a model."""
    modules = dict(base.model.named_modules())
    base.fingerprint  # noqa: B018 - known to the model from now on
    return {
        "weights": {name: weight.detach().clone() for name, weight in base.model.state_dict().items()},
        "storage": {name: weight.data_ptr() for name, weight in base.model.named_parameters()},
        "grads": {name: (p.requires_grad, p.grad is None) for name, p in base.model.named_parameters()},
        "modules": {name: id(module) for name, module in modules.items()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()},
        "names": {name: sorted(vars(module)) for name, module in modules.items()},
        "training": {name: module.training for name, module in modules.items()},
    }


def assert_as_before(base: BaseModel, before: dict[str, Any]) -> None:
    after = snapshot(base)
    for name, weight in before.pop("weights").items():
        assert torch.equal(after["weights"][name], weight), name
    after.pop("weights")
    assert after == before


# The interface, for every method


@pytest.mark.parametrize("method", WRITING)
def test_every_method_fits_writes_scores_and_leaves_no_trace(method: str) -> None:
    base = tiny_base("llama")
    fingerprint = base.fingerprint
    before = snapshot(base)
    fitted = fit_toy(base, method)
    texts = fitted.generate(["t1 t1\n", "t2\n", "t3 t3 t3\n"], max_new_tokens=5)
    assert len(texts) == 3
    assert fitted.score(DEV.examples) == pytest.approx(fitted.metrics["dev_loss"], rel=1e-5)
    assert fitted.num_bytes > 0
    assert (fitted.metrics["train_rows"], fitted.metrics["dev_rows"]) == (
        {"zero_shot": 0, "few_shot": 4}.get(method, 20),
        7,
    )
    assert_as_before(base, before)
    del base.model.__dict__["_foreword_fingerprint"]
    assert base.fingerprint == fingerprint


@pytest.mark.parametrize("method", ["prefix", "apt", "ptuning2", "lora"])
def test_candidates_come_to_what_they_come_to_alone(method: str) -> None:
    """Prefixes that train together too, and whatever becomes of the others."""
    base = tiny_base("llama")
    lost = config_of(method, learning_rate=3e37)
    candidates = [config_of(method), lost, config_of(method, learning_rate=1e-3, max_steps=4)]
    stages: set[str] = set()
    found = list(fit_each(base, TRAIN, DEV, candidates, progress=lambda stage, *_: stages.add(stage.split(":")[0])))
    assert isinstance(found[1], RunError)
    with pytest.raises(RunError):
        fit(base, TRAIN, DEV, lost)
    for place in (0, 2):
        each, alone = found[place], fit(base, TRAIN, DEV, candidates[place])
        assert isinstance(each, Fitted) and each.config == candidates[place]
        assert each.metrics["dev_loss"] == pytest.approx(alone.metrics["dev_loss"], rel=1e-4)
        assert each.metrics["steps"] == alone.metrics["steps"]
        assert each.metrics["train_seconds"] > 0
    together = any("together" in stage for stage in stages)
    assert together == (method != "lora") and together != ("candidate 3 of 3" in stages)


@pytest.mark.parametrize("method", WRITING)
def test_the_seconds_of_a_fit_are_those_of_all_it_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first row on, whichever the method is: on a clock that encoding a row takes a second of."""
    clock = itertools.count(step=1e-9)
    encoded: list[int] = []
    original = BaseModel.encode
    monkeypatch.setattr(BaseModel, "encode", lambda *given: (encoded.append(1), original(*given))[1])
    monkeypatch.setattr(time, "perf_counter", lambda: len(encoded) + next(clock))
    fitted = fit_toy(tiny_base("llama"), method, epochs=1)
    assert len(encoded) >= len(DEV)
    assert fitted.metrics["train_seconds"] == pytest.approx(len(encoded), abs=1e-3)


def test_a_lost_candidate_has_its_share_of_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    candidates = [
        config_of("prefix"), config_of("prefix", learning_rate=3e37), config_of("prefix", max_steps=3),
    ]  # fmt: skip
    monkeypatch.setattr(fitting, "time", SimpleNamespace(perf_counter=iter([10.0, 100.0]).__next__))
    first, lost, last = fit_each(base, TRAIN, DEV, candidates)
    assert isinstance(lost, RunError) and isinstance(first, Fitted) and isinstance(last, Fitted)
    tokens = first.metrics["tokens"], last.metrics["tokens"]
    for each, read in zip((first, last), tokens, strict=True):
        assert each.metrics["train_seconds"] == pytest.approx(90 * 2 / 3 * read / sum(tokens))


def begun(base: BaseModel, method: str, **values: Any) -> float:
    """The loss on the training rows where a method begins: trained with steps of no size, searched with none."""
    if method == "autoprompt":
        search = TriggerSearch(base, ToyTask(), config_of(method, **values))
        return search.loss(search.ids, range(len(TRAIN)))
    values = {**values, "learning_rate": 1e-12, "max_steps": 1}
    return fit_toy(base, method, **values).score(TRAIN.examples)


@pytest.mark.parametrize("method", TRAINED)
def test_training_lowers_the_loss(method: str) -> None:
    fitted = toy_fit(method)
    assert fitted.score(TRAIN.examples) < begun(tiny_base("llama"), method) - 0.01
    assert fitted.metrics["steps"] == fitted.metrics["planned_steps"] == 9
    if "dev_losses" in fitted.metrics:
        assert min(fitted.metrics["dev_losses"]) == fitted.metrics["dev_loss"]
        assert fitted.metrics["best_step"] == 3 * (1 + fitted.metrics["dev_losses"].index(fitted.metrics["dev_loss"]))


@pytest.mark.parametrize("method", WRITING)
def test_a_fit_depends_on_its_seed_alone(method: str) -> None:
    state = torch.get_rng_state()
    first, again, other = (fit_toy(tiny_base("llama"), method, epochs=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert first.metrics["dev_loss"] == again.metrics["dev_loss"]
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name
    if method != "zero_shot":
        assert first.metrics["dev_loss"] != other.metrics["dev_loss"]


OTHERS = [
    *((method, "gpt2") for method in ("full", "top2", "adapter", "lora", "embedding", "infix", "autoprompt")),
    *((method, "t5") for method in ("full", "adapter", "lora", "embedding", "infix", "autoprompt")),
    *((method, "bart") for method in ("top2", "adapter", "lora", "embedding")),
    *((method, "opt") for method in ("top2", "adapter")), *((method, "gemma3_text") for method in ("lora", "infix")),
]  # fmt: skip


@pytest.mark.parametrize(("method", "model"), OTHERS)
def test_other_families(method: str, model: str) -> None:
    base = tiny_base(model)
    if method == "infix" and base.family.kind != "decoder":
        with pytest.raises(UnsupportedModel, match="tokens between prompt and completion"):
            fit_toy(base, method)
        return
    before = snapshot(base)
    targets = {"targets": "all"} if method == "lora" and model == "gemma3_text" else {}
    fitted = fit_toy(base, method, epochs=2, **targets)
    assert fitted.score(TRAIN.examples) < begun(base, method, **targets)
    assert fitted.score(DEV.examples) == pytest.approx(fitted.metrics["dev_loss"], rel=1e-4)
    assert len(fitted.generate(["t1 t1\n", "t2\n"], max_new_tokens=3)) == 2
    assert_as_before(base, before)


def test_methods_follow_each_other_on_one_base() -> None:
    base = tiny_base("llama")
    for method in ("full", "lora", "adapter", "infix"):
        fitted = fit_toy(base, method, epochs=1)
        alone = fit_toy(tiny_base("llama"), method, epochs=1)
        assert fitted.metrics["dev_loss"] == alone.metrics["dev_loss"], method
    first, second = fit_toy(base, "full", epochs=1), fit_toy(base, "adapter", epochs=1)
    scores = first.score(DEV.examples), second.score(DEV.examples)
    assert (first.score(DEV.examples), second.score(DEV.examples)) == scores


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "embedding", "infix"])
def test_an_error_while_it_is_used_leaves_no_trace(method: str) -> None:
    base = tiny_base("llama")
    fitted = fit_toy(base, method, epochs=1)
    before = snapshot(base)
    with pytest.raises(DataError, match="new ones are asked"):
        fitted.generate(["t1\n"], max_new_tokens=1000)
    assert_as_before(base, before)
    with pytest.raises(DataError, match="no example"):
        fitted.score([])


# What is stored


def weights_of(base: BaseModel) -> int:
    return sum(parameter.numel() for parameter in base.model.parameters())


def test_counts_of_parameters() -> None:
    base = tiny_base("llama")  # 2 layers, hidden 32, 4 heads of 8, 2 key/value heads, MLP 48
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32
    size = bottleneck_size(0.1, weights_of(base), 32, 4)
    slots = 2 * 4 * 2 * 2 * 8  # layers, slots, keys and values, heads, dim
    expected = {
        "full": weights_of(base),
        "top2": 2 * layer + 32,
        "adapter": 4 * (2 * 32 * size + size + 32),
        "lora": 2 * 4 * ((32 + 32) + (32 + 16)),  # queries and values
        "prompt_tuning": 4 * 32, "p_tuning": 4 * 32, "embedding": 4 * 32,
        "infix": 4 * 32 + 1 * 4 * 32,
        "prefix": slots, "ptuning2": slots,
        "apt": slots + 2 * 32 * 4,  # and the gates' matrices; the layers' factors are folded in
        "autoprompt": 0, "zero_shot": 0, "few_shot": 0,
    }  # fmt: skip
    assert {method: toy_fit(method).parameters for method in WRITING} == expected
    for method, count in expected.items():
        if count:
            assert toy_fit(method).num_bytes == 4 * count, method
    assert toy_fit("autoprompt").num_bytes == 3 * 4
    assert toy_fit("zero_shot").num_bytes == len(ToyTask.instruction.encode())
    # P-tuning drops what made its tokens.
    assert toy_fit("p_tuning").metrics["trained_parameters"] > toy_fit("p_tuning").parameters


@given(st.floats(0.001, 0.2), st.integers(10**6, 10**9), st.sampled_from([64, 576, 1024]), st.integers(2, 100))
def test_an_adapter_is_as_near_to_its_share_as_it_can_be(share: float, count: int, hidden: int, places: int) -> None:
    def parameters(size: int) -> int:
        return places * (2 * hidden * size + size + hidden)

    size = bottleneck_size(share, count, hidden, places)
    off = abs(parameters(size) - share * count)
    assert off <= abs(parameters(size + 1) - share * count) + 1e-3
    assert size == 1 or off <= abs(parameters(size - 1) - share * count) + 1e-3


def test_top_layers_are_what_is_trained() -> None:
    base = tiny_base("gpt2", n_layer=3)
    names = top_weights(base, 2)
    assert {name.split(".")[2] for name in names if ".h." in name} == {"1", "2"}
    assert {name for name in names if ".h." not in name} == {"transformer.ln_f.weight", "transformer.ln_f.bias"}
    fitted = fit_toy(base, "top2")
    tuned, now = fitted.tensors(), dict(base.model.named_parameters())
    assert tuned.keys() == names.keys()
    assert all(not torch.equal(tensor, now[name]) for name, tensor in tuned.items())
    with pytest.raises(ConfigError, match="top 4 layers"):
        top_weights(base, 4)
    assert all(name.startswith("model.decoder.") for name in top_weights(tiny_base("bart"), 1))


# The norm after the decoder's last layer, by family; in BART a layer ends in its own.
LAST_NORMS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss", "deepseek_v3"), "model.norm"
    ),
    "gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm", "opt": "model.decoder.final_layer_norm",
    "t5": "decoder.final_layer_norm", "pegasus": "model.decoder.layer_norm", "mbart": "model.decoder.layer_norm",
    "bart": "",
}  # fmt: skip


@pytest.mark.parametrize("model", LAST_NORMS)
def test_top_layers_end_in_the_last_norm(model: str) -> None:
    base = tiny_base(model)
    top = [layer for layer, _ in sublayers(base).layers["decoder"]][-1]
    outside = {name.rpartition(".")[0] for name in top_weights(base, 1) if not name.startswith(f"{top}.")}
    assert outside == {LAST_NORMS[model]} - {""}


def test_no_family_is_forgotten() -> None:
    others = {"t5-odd", "whisper"}  # as T5; no words to train on
    written = {name for name in TINY if tiny_base(name).family.kind != "encoder"}
    assert written == LAST_NORMS.keys() | others


@pytest.mark.parametrize("method", ["full", "top2", "adapter", "lora", "embedding", "infix"])
def test_half_precision(method: str) -> None:
    """What is added to a model is float32; its own weights keep their precision."""
    base = half_base()
    before = snapshot(base)
    fitted = fit_toy(base, method, epochs=1)
    own = torch.bfloat16 if method in ("full", "top2") else torch.float32
    assert {tensor.dtype for tensor in fitted.tensors().values()} == {own}
    assert fitted.score(TRAIN.examples) < begun(base, method)
    assert_as_before(base, before)


def half_base() -> BaseModel:
    base = tiny_base("llama")
    return BaseModel(base.model.to(torch.bfloat16), base.tokenizer, "half")


def test_small_steps_are_not_lost_in_half_precision() -> None:
    """A weight of 1 in bfloat16 stays what it is under steps of 1e-3, each less than half of what it can tell apart."""
    base = half_base()
    scale = base.model.model.norm.weight
    scale.data.fill_(1.0)
    scale.requires_grad_(True)
    config = TrainConfig(
        max_steps=20, learning_rate=1e-3, batch_size=7, warmup_ratio=0.0, schedule="constant", patience=0
    )
    objective = objective_of(base, ToyTask())
    metrics = train_weights(objective, [scale], objective.encode(TRAIN), objective.encode(DEV), config)
    assert metrics["best_step"] > 3
    assert scale.dtype == torch.bfloat16
    assert (scale.detach().float() - 1).abs().max() >= 2**-7


# The loop


def reading(objective: Objective, module: PrefixModule) -> Objective:
    """The objective of a base model that reads a prefix, of which the loop knows nothing."""
    read = copy.copy(objective)
    read.losses = lambda parts, _: objective.losses(parts, module())  # type: ignore[method-assign]
    read.measures = lambda parts, _: objective.measures(parts, module())  # type: ignore[method-assign]
    return read


@pytest.mark.parametrize("micro_batch_size", [0, 3])
def test_the_loop_trains_as_prefixes_are_trained(micro_batch_size: int) -> None:
    """A prefix's own parameters in this loop end where `foreword.train` takes them."""
    base = tiny_base("llama")
    config = TrainConfig(
        length=4, epochs=3, batch_size=7, patience=0, dev_limit=0, weight_decay=0.1, micro_batch_size=micro_batch_size
    )
    start = Prefix.new(base, 4, text="one two three four")
    ours = train(base, start, ToyTask(), config)
    module = parametrize(start)
    objective = reading(objective_of(base, ToyTask()), module)
    metrics = train_weights(
        objective, list(module.parameters()), objective.encode(TRAIN), objective.encode(DEV), config
    )  # fmt: skip
    assert metrics["dev_loss"] == pytest.approx(ours.metrics["best_dev_loss"], rel=1e-5)
    assert (metrics["steps"], metrics["best_step"], metrics["tokens"]) == tuple(
        ours.metrics[name] for name in ("steps", "best_step", "tokens")
    )
    for site, tensors in module.fold().sites.items():
        assert (tensors.keys - ours.prefix.sites[site].keys).abs().max() < 1e-5, site


@pytest.mark.parametrize(
    ("method", "options"),
    [*((method, {}) for method in TRAINED), *(("adapter", {"template": name}) for name in TEMPLATES if name != "chat")],
)
def test_all_methods_train_on_the_same_rows_in_the_same_batches(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever they write around a prompt, which makes rows longer."""
    batches: list[set[tuple[int, ...]]] = []
    original = BaseModel.completion_logits

    def noted(base: BaseModel, batch: dict[str, Tensor], read: Any) -> Any:
        if torch.is_grad_enabled():
            batches.append({tuple(row[row >= 0].tolist()) for row in batch["labels"]})
        return original(base, batch, read)

    monkeypatch.setattr(BaseModel, "completion_logits", noted)
    base = tiny_base("llama", max_position_embeddings=256)
    for name, own in (("prefix", {}), (method, options)):
        fit_toy(base, name, batch_size=3, epochs=2, **own)
    assert len(batches) == 28
    assert batches[:14] == batches[14:]
    assert len({frozenset(batch) for batch in batches}) > 7  # no epoch has the batches of another


def test_the_loop_keeps_the_best_and_knows_patience() -> None:
    base = tiny_base("llama")
    fitted = fit_toy(base, "full", learning_rate=0.3, epochs=20, patience=2)
    losses = fitted.metrics["dev_losses"]
    assert len(losses) < 20
    assert losses[-1] > losses[-3] == min(losses)
    assert fitted.score(DEV.examples) == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("method", TRAINED)
def test_the_dev_rows_are_measured_as_often_as_asked(method: str) -> None:
    fitted = fit_toy(tiny_base("llama"), method, max_steps=5, eval_every=2)
    if isinstance(fitted, FittedPrefix):
        assert fitted.prefix.metadata["training"]["eval_every"] == 2
    else:
        assert len(fitted.metrics["dev_losses"]) == 3  # after steps 2, 4 and 5


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    base = tiny_base("llama")
    before = snapshot(base)
    with pytest.raises(RunError, match="lower learning_rate"):
        fit_toy(base, "full", learning_rate=1e30)
    assert_as_before(base, before)


# Methods against an oracle


def logits_of(base: BaseModel, ids: Tensor) -> Tensor:
    return base.logits(ids)


IDS = torch.tensor([[5, 9, 60, 31, 7, 200], [8, 8, 3, 120, 77, 41]])


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_lora_equals_merged_weights(model: str) -> None:
    base = tiny_base(model)
    fitted = fit_toy(base, "lora")
    assert isinstance(fitted, FittedTuning)
    with fitted.tuning.applied() as tuned:
        wanted = logits_of(tuned, IDS)
    prompts = ["t1 t1\n", "t5\n"]
    texts = fitted.generate(prompts, max_new_tokens=6)
    tensors = fitted.tensors()
    weights = dict(base.model.named_parameters())
    for name, down in tensors.items():
        if ".lora_A." in name:
            up = tensors[name.replace("lora_A", "lora_B")]
            weight = weights[name.partition(".lora_A.")[0] + ".weight"]
            delta = up @ down * (16 / 4)
            weight.data += delta if weight.shape == delta.shape and model == "llama" else delta.T
    torch.testing.assert_close(logits_of(base, IDS), wanted, rtol=1e-4, atol=1e-4)
    assert base.generate(prompts, max_new_tokens=6) == texts


def test_adapters_equal_a_model_written_with_them() -> None:
    """The sublayers with their adapters as modules of the model, in the place of the hooks."""
    base = tiny_base("llama")
    fitted = fit_toy(base, "adapter")
    assert isinstance(fitted, FittedTuning) and isinstance(fitted.tuning, AdapterTuning)
    adapters = fitted.tuning.adapters
    with fitted.tuning.applied() as tuned:
        wanted = logits_of(tuned, IDS)
    assert (wanted - logits_of(base, IDS)).abs().max() > 0.01

    for number, layer in enumerate(base.model.model.layers):
        inner = layer.mlp.down_proj
        layer.mlp.down_proj = torch.nn.Sequential(inner, adapters[f"model.layers.{number}.mlp"])
        inner = layer.self_attn.o_proj
        layer.self_attn.o_proj = torch.nn.Sequential(inner, adapters[f"model.layers.{number}.self_attn"])
    torch.testing.assert_close(logits_of(base, IDS), wanted, rtol=1e-5, atol=1e-5)


def test_adapters_begin_as_the_identity() -> None:
    base = tiny_base("opt")
    with AdapterTuning(base, 0.1, 0).applied() as adapted:
        found = logits_of(adapted, IDS)
    assert torch.equal(found, logits_of(base, IDS))
    assert len(sublayers(base).mlp) == len(sublayers(base).attention) == 2


def virtual_text(base: BaseModel, ids: list[int], place: str, deep: bool = False) -> VirtualTokens:
    """Virtual tokens that are those of a text."""
    with torch.no_grad():
        vectors = word_vectors(base)(torch.tensor(ids))
    return VirtualTokens(base, Vectors(vectors.clone()), len(ids), place, deep)


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma3_text", "opt"])
@pytest.mark.parametrize("place", ["front", "back"])
@pytest.mark.parametrize("deep", [False, True])
def test_virtual_tokens_with_the_vectors_of_words_are_these_words(model: str, place: str, deep: bool) -> None:
    """[infix] and [embedding] against the plain model: in batches padded on either side, and step by step."""
    base = tiny_base(model)
    ids = base.encode_prompt(" the key")
    examples = DEV.examples
    plain = Extended(base, **{place: ids})
    wanted = plain.score([e.prompt for e in examples], [e.completion for e in examples])
    prompts = ["t1 t1 t1\n", "t2\n"]
    written = plain.generate(prompts, max_new_tokens=5, num_beams=2, stop=["\n"])
    with virtual_text(base, ids, place, deep).applied() as view:
        found = view.score([e.prompt for e in examples], [e.completion for e in examples])
        assert view.generate(prompts, max_new_tokens=5, num_beams=2, stop=["\n"]) == written
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["infix", "embedding", "prompt_tuning", "p_tuning", "autoprompt", "adapter"])
def test_embeddings_may_be_narrower_than_the_layers(method: str) -> None:
    """As in OPT-350m, where a matrix takes the one to the other."""
    base = tiny_base("opt", word_embed_proj_dim=16, num_hidden_layers=3)
    fitted = fit_toy(base, method)
    assert fitted.score(TRAIN.examples) < begun(base, method)
    if method == "infix":
        shapes = {name: tuple(tensor.shape) for name, tensor in fitted.tensors().items()}
        assert shapes == {"vectors": (4, 16), "layers": (2, 4, 32)}


def test_infix_stands_between_prompt_and_completion() -> None:
    base = tiny_base("llama")
    tuning = virtual_text(base, [5, 6], "back", deep=True)
    assert tuning.ids == [VOCAB, VOCAB + 1]
    prompt, completion = tuning.view.encode("t1\n", "t1")
    assert (prompt, completion) == (base.encode("t1\n", "t1")[0] + tuning.ids, base.encode("t1\n", "t1")[1])
    assert tuning.deltas is not None and tuning.deltas.shape == (1, 2, 32)
    rows = encode_split(tuning.view, DEV)
    with tuning.applied() as view:
        nats, _ = view.completion_loss(view.collate(rows.encoded), {})
        nats.backward()
    for parameter in tuning.parameters():
        assert parameter.grad is not None and (parameter.grad.abs().sum(-1) > 0).all()
    # The prompt comes before: what is trained does not reach back to it.
    batch = torch.tensor([[9, 60, 31, *tuning.ids]])
    with tuning.applied() as view:
        first = logits_of(view, batch)
        with torch.no_grad():
            tuning.deltas += 1.0
        second = logits_of(view, batch)
    assert torch.equal(first[:, :3], second[:, :3])
    assert not torch.allclose(first[:, 3:], second[:, 3:])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_virtual_tokens_equal_the_model_that_peft_wraps(method: str) -> None:
    import peft
    from tests.tiny import tiny_model

    fitted = toy_fit(method)
    assert isinstance(fitted, FittedTuning)
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(tiny_model("llama"), settings).eval()
    with torch.no_grad():
        wrapped.prompt_encoder["default"].embedding.weight.copy_(fitted.tensors()["vectors"])
        wanted = wrapped(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, 4:]
    tuning = fitted.tuning
    assert isinstance(tuning, VirtualTokens)
    with tuning.applied() as view:
        ids = torch.tensor([tuning.view.extended(row) for row in IDS.tolist()])
        found = logits_of(view, ids)[:, 4:]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [3, 45])
def test_prompt_tuning_from_the_instruction_starts_as_peft_starts_from_a_text(tmp_path: Path, length: int) -> None:
    """The instruction's tokens, cut to the length or repeated."""
    import peft

    base = tiny_base("llama")
    base.tokenizer.save_pretrained(tmp_path)
    settings = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=length, num_transformer_submodules=1, token_dim=32,
        prompt_tuning_init="TEXT", prompt_tuning_init_text=ToyTask.instruction, tokenizer_name_or_path=str(tmp_path),
    )  # fmt: skip
    wanted = peft.PromptEmbedding(settings, word_vectors(base)).embedding.weight.detach()
    fitted = fit_toy(base, "prompt_tuning", init="text", length=length, max_steps=1, learning_rate=1e-12)
    torch.testing.assert_close(fitted.tensors()["vectors"], wanted, rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "p_tuning"])
def test_on_a_gpu_the_callers_random_state_is_not_touched(method: str) -> None:
    base = tiny_base("llama")
    base.model.cuda()
    torch.rand(3, device="cuda")
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    fit_toy(base, method, epochs=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])


def test_what_is_drawn_for_peft_restores_the_device_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    base, forked = tiny_base("llama"), list[Any]()
    original = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: (forked.append(devices), original(devices=[]))[1])
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        monkeypatch.setattr(BaseModel, "device", device)
        with seeded(base, 0):
            pass
    assert forked == [[], [torch.device("cuda", 1)]]


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_keeps_what_its_encoder_made(encoder: str) -> None:
    fitted = fit_toy(tiny_base("llama"), "p_tuning", encoder=encoder)
    assert fitted.score(DEV.examples) == pytest.approx(fitted.metrics["dev_loss"], rel=1e-6)
    assert list(fitted.tensors()) == ["vectors"]


def test_a_start_token_stays_first() -> None:
    base = tiny_base("llama")
    bos = base.tokenizer.bos_token_id
    view = Extended(base, front=[7, 8])
    assert view.extended([bos, 5]) == [bos, 7, 8, 5]
    assert view.extended([5]) == [7, 8, 5]


def test_prefixes_are_those_of_foreword() -> None:
    base = tiny_base("llama")
    for method, options in {
        "prefix": {}, "ptuning2": {"init": "random"}, "apt": {"gates": "apt"},
    }.items():  # fmt: skip
        fitted = toy_fit(method)
        assert isinstance(fitted, FittedPrefix)
        config = TrainConfig(length=4, epochs=3, batch_size=7, patience=0, dev_limit=0, **options)
        ours = train(base, None, ToyTask(), config)
        assert fitted.prefix.sha256() == ours.prefix.sha256(), method
        assert fitted.generate(["t1\n"], max_new_tokens=3) == base.generate(["t1\n"], ours.prefix, max_new_tokens=3)


# AutoPrompt


def test_the_search_never_gets_worse_on_its_batch_and_stays_in_the_vocabulary() -> None:
    base = tiny_base("llama")
    search = TriggerSearch(base, ToyTask(), config_of("autoprompt", length=3, candidates=6))
    ordinary = set(vocabulary(base))
    assert not ordinary & {0, 1, 2}  # padding, start, end
    first = list(search.ids)
    for number in range(6):
        before, batch = list(search.ids), [number, number + 5, number + 9]
        trial = search.step(batch)
        assert trial.after == search.loss(search.ids, batch) <= trial.before == search.loss(before, batch)
        assert sum(old != new for old, new in zip(before, search.ids, strict=True)) <= 1
        assert set(search.ids) <= ordinary
    assert search.ids != first
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_the_search_asks_the_gradient() -> None:
    """The promising tokens are those with the lowest directional derivative, taken by hand through plain embeddings."""
    base = tiny_base("llama")
    search = TriggerSearch(base, ToyTask(), config_of("autoprompt", length=2, candidates=5, place="back"))
    batch = [0, 3]
    named = dict(zip(search.soft.ids, search.ids, strict=True))
    grads = []
    for row in batch:
        prompt, completion = search.train.encoded[row]
        prompt = [named.get(token, token) for token in prompt]
        assert prompt[-2:] == search.ids
        ids = torch.tensor([prompt + completion])
        vectors = word_vectors(base)(ids).detach().requires_grad_()
        logits = base.model(inputs_embeds=vectors).logits[0, len(prompt) - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum").backward()
        assert vectors.grad is not None
        grads.append(vectors.grad[0, len(prompt) - 1])  # the last of the prompt is the second trigger
    scores = word_vectors(base).weight.detach()[search.allowed] @ sum(grads)
    assert search.promising(batch, 1) == search.allowed[scores.topk(5, largest=False).indices].tolist()


def test_the_search_reads_batches_in_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    whole, cut = (
        TriggerSearch(base, ToyTask(), config_of("autoprompt", candidates=5, micro_batch_size=size)) for size in (0, 2)
    )
    batch = [0, 3, 4, 8, 11]
    wanted = whole.loss(whole.ids, batch), whole.promising(batch, 1)
    read: list[int] = []
    original = BaseModel.completion_logits
    monkeypatch.setattr(
        BaseModel, "completion_logits", lambda self, given, *rest: (
            read.append(len(given["labels"])), original(self, given, *rest),
        )[1],
    )  # fmt: skip
    assert cut.ids == whole.ids
    found = cut.loss(cut.ids, batch), cut.promising(batch, 1)
    assert read == [2, 2, 1] * 2
    assert found == (pytest.approx(wanted[0], rel=1e-6), wanted[1])


def test_a_search_has_read_the_tokens_of_all_its_passes() -> None:
    base, config = tiny_base("llama"), config_of("autoprompt", candidates=4, max_steps=3, micro_batch_size=2)
    search = TriggerSearch(base, ToyTask(), config)
    batches: list[Sequence[int]] = []
    step = search.step
    search.step = lambda batch: (batches.append(batch), step(batch))[1]  # type: ignore[method-assign]
    found = search.run()
    once = sum(search.train.lengths[row] for batch in batches for row in batch)
    assert len(batches) == 3 and found["tokens"] == once * (1 + 1 + 4)  # before, the gradient, every candidate


def test_triggers_are_read_with_every_prompt() -> None:
    fitted = toy_fit("autoprompt")
    ids = fitted.tensors()["ids"].tolist()
    base = tiny_base("llama")
    nats = tokens = 0.0
    for example in DEV.examples:
        prompt, completion = base.encode(example.prompt, example.completion)
        loss, count = base.completion_loss(base.collate([(ids + prompt, completion)]), {})
        nats, tokens = nats + loss.item(), tokens + count
    assert fitted.score(DEV.examples) == pytest.approx(nats / tokens, rel=1e-5)


# Prompts in context


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("first", "Do it.\n\na\nA\n\nb\nB\n\nc\n"),
        ("labelled", "Do it.\n\nInput: a\nOutput:\nA\n\nInput: b\nOutput:\nB\n\nInput: c\nOutput:\n"),
        ("last", "a\nDo it.\nA\n\nb\nDo it.\nB\n\nc\nDo it.\n"),
        (
            "headed",
            "### Instruction:\nDo it.\n\n### Input:\na\n\n### Response:\nA\n\n### Input:\nb\n\n### Response:\nB\n\n"
            "### Input:\nc\n\n### Response:\n",
        ),
    ],
)
def test_prompts_in_context(template: str, expected: str) -> None:
    examples = [Example(x, f"{x}\n", x.upper(), (x.upper(),), 1) for x in "ab"]
    config = config_of("few_shot", shots=2, template=template)
    base = tiny_base("llama", max_position_embeddings=256)
    prompting = Prompting(base, config, examples, "Do it.")
    prompting.shots.sort()
    assert prompting.write("c\n", 1) == expected
    alone = Prompting(base, config_of("zero_shot", template=template), examples, "Do it.")
    assert alone.write("c\n", 1) == TEMPLATES[template].format(instruction="Do it.", prompt="c\n")


@pytest.mark.parametrize("template", [name for name in TEMPLATES if name != "chat"])
def test_a_shot_has_the_tokens_that_the_model_is_to_write(template: str) -> None:
    """A completion is scored as tokens of its own: a shown one must read as the same."""
    base = tiny_base("llama", max_position_embeddings=256)
    shot = Example("a", "name : Aromi\n", "a pub by the river.", ("",), 1)
    prompting = Prompting(base, config_of("few_shot", shots=1, template=template), [shot], "Do it.")
    shown = base.encode_prompt(prompting.write("name : Aromi\n"))
    prompting.shots = []
    asked, completion = base.encode(prompting.write(shot.prompt), shot.completion)
    assert shown[: len(asked) + len(completion) - 1] == asked + completion[:-1]  # but the end token


@given(st.integers(0, 20), st.integers(1, 30), st.integers(0, 8))
def test_as_many_shots_as_the_context_has_room_for(words: int, room: int, shots: int) -> None:
    base = tiny_base("llama")
    prompting = Prompting(base, config_of("few_shot", shots=8), TRAIN.examples, "Do it.")
    prompting.shots = prompting.shots[:shots]
    prompt = "t " * words + "\n"
    written = prompting.write(prompt, room)
    used = prompting.count_shots(prompt, room)
    assert written.endswith(prompt)
    assert written == prompting._write(prompt, prompting.shots[shots - used :])
    fits = len(base.encode_prompt(written)) + room <= 64
    more = prompting._write(prompt, prompting.shots[shots - used - 1 :]) if used < shots else None
    assert fits or used == 0
    assert more is None or len(base.encode_prompt(more)) + room > 64


def test_weights_may_be_trained_with_the_instruction() -> None:
    base = tiny_base("llama")
    fitted = fit_toy(base, "full", template="last", epochs=1)
    plain = fit_toy(base, "full", epochs=1)
    assert fitted.metrics["tokens"] > plain.metrics["tokens"]
    assert fitted.score(DEV.examples) == pytest.approx(fitted.metrics["dev_loss"], rel=1e-5)
    assert isinstance(fitted, FittedTuning)
    with fitted.tuning.applied() as tuned:
        wanted = tuned.generate(["t1\n" + ToyTask.instruction + "\n"], max_new_tokens=4)
    assert fitted.generate(["t1\n"], max_new_tokens=4) == wanted


@pytest.mark.parametrize("method", WRITTEN)
def test_no_candidate_needs_a_chat_template(method: str) -> None:
    base = tiny_base("llama", max_position_embeddings=256)
    assert base.tokenizer.chat_template is None
    found = list(fit_each(base, TRAIN, DEV, search_space(method), instruction=ToyTask.instruction))
    losses = {each.metrics["dev_loss"] for each in found if isinstance(each, Fitted)}
    assert len(losses) == SEARCH_SIZE


def test_shots_leave_room_for_what_is_written() -> None:
    fitted = toy_fit("few_shot")
    assert len(fitted.generate(["t1 t1\n"] * 2, max_new_tokens=30)) == 2
    assert fitted.metrics["mean_shots"] > 0


def test_a_chat_template_is_the_tokenizers_own() -> None:
    base = tiny_base("llama")
    with pytest.raises(DataError, match="no chat template"):
        fit_toy(base, "zero_shot", template="chat")
    base._tokenizer = tokenizer = type(base.tokenizer)(
        tokenizer_object=base.tokenizer._tokenizer, eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    prompting = Prompting(base, config_of("zero_shot", template="chat"), [], "Do it.")
    assert prompting.write("c\n", 1) == "<user>Do it.\n\nc<answer>"


@pytest.mark.parametrize("adds", [False, True])
def test_a_start_token_of_the_chat_template_is_read_once(adds: bool) -> None:
    """Some tokenizers write one before every text and their templates another; some only in the template."""
    base = tiny_base("llama")
    base._tokenizer = tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}:"
    if adds:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    written = Prompting(base, config_of("zero_shot", template="chat"), [], "Do it.").write("c\n", 1)
    plain = tokenizer("Do it.\n\nc:", add_special_tokens=False)["input_ids"]
    assert base.encode_prompt(written) == [tokenizer.bos_token_id, *plain]


# Configurations


def test_every_method_is_tuned_over_as_many_candidates() -> None:
    for method, known in METHODS.items():
        space = search_space(method, epochs=2)
        assert len(space) == SEARCH_SIZE == len({str(config) for config in space}), method
        assert {config.epochs for config in space} == {2}
        assert all(MethodConfig.of(**config.to_dict()) == config for config in space)
        assert not known.rates or known.rate in known.rates
        assert space[0] == MethodConfig(method, epochs=2), method
    assert len(search_space("lora", learning_rate=1e-3)) == 1
    assert len(search_space("few_shot", shots=3)) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lorra"}, "method 'lorra'; expected one of full, "),
        ({"method": "lora", "rnk": 3}, "option 'rnk' of method 'lora'; expected 'rank'"),
        ({"method": "full", "rank": 3}, "option 'rank' of method 'full'"),
        ({"method": "lora", "rank": 0}, "rank = 0 for method 'lora'; expected at least 1"),
        ({"method": "lora", "rank": "8"}, "rank = '8' for method 'lora'; expected a value like 8"),
        ({"method": "infix", "deep": 1}, "deep = 1 for method 'infix'; expected a value like True"),
        ({"method": "zero_shot", "template": "x"}, "expected one of first, labelled, last, headed, chat"),
        ({"method": "zero_shot", "learning_rate": 0.1}, "none: it trains nothing at that rate"),
        ({"method": "adapter", "share": 1.5}, "share = 1.5"),
        ({"method": "full", "epochs": 0}, "epochs = 0; expected at least 1"),
    ],
)
def test_what_cannot_be_configured_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodConfig.of(**values)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="is an encoder"):
        fit_toy(tiny_base("bert"), "full")
    labelled = Split("train", [Labelled("1", (("a",),), "x", "a\n", ("x",), 1)])
    with pytest.raises(
        ConfigError, match="Labelled rows in train; expected Example, of a generation task; pass the task"
    ):
        fit(tiny_base("llama"), labelled, DEV, config_of("full"))
    with pytest.raises(ConfigError, match="100 virtual tokens; expected fewer than 64"):
        fit_toy(tiny_base("llama"), "embedding", length=100)
    long = Split("train", [example._replace(prompt="far too long " * 40) for example in TRAIN.examples])
    with pytest.raises(DataError, match="no usable row"):
        fit(tiny_base("llama"), long, DEV, config_of("adapter"))


# Tasks with labels


SEEN = {"max_position_embeddings": 256}  # room for shots of the longest rows
ASKED = [
    *((method, "classification", "llama") for method in WRITING), *((method, "choice", "llama") for method in WRITING),
    *((method, kind, "bert") for method in READING for kind in LABELLED),
    ("full", "classification", "t5"), ("embedding", "choice", "t5"), ("few_shot", "classification", "bart"),
]  # fmt: skip


TAUGHT = ("full", "lora", "head", "adapter", "embedding", "apt")


def fit_labels(base: BaseModel, task: LabelToy, method: str, **values: Any) -> Fitted:
    return fit(base, task.split("train"), task.split("dev"), config_of(method, **values), task=task)


@pytest.mark.parametrize(("method", "kind", "model"), ASKED)
def test_every_method_learns_labels_and_leaves_no_trace(method: str, kind: str, model: str) -> None:
    base, task = tiny_base(model, **(SEEN if model == "llama" else {})), LabelToy(kind)
    before = snapshot(base)
    fitted = fit_labels(base, task, method)
    dev = task.split("dev").examples
    found = fitted.predict(dev)
    known = {" ".join(each.tags) for each in dev} if kind == "tagging" else set(task.labels)
    assert len(found) == len(dev) and (kind == "tagging" or set(found) <= known)
    if kind == "tagging":
        assert [len(tags.split()) for tags in found] == [len(each.tags) for each in dev]
        assert {tag for tags in found for tag in tags.split()} <= set(task.labels)
    assert fitted.score(dev) == pytest.approx(fitted.metrics["dev_loss"], rel=1e-5)
    assert (fitted.head is not None) == (model == "bert")
    assert_as_before(base, before)


@pytest.mark.parametrize(("method", "kind", "model"), [each for each in ASKED if each[0] in TAUGHT])
def test_training_on_labels_lowers_the_loss(method: str, kind: str, model: str) -> None:
    base, task = tiny_base(model, **(SEEN if model == "llama" else {})), LabelToy(kind)
    rates = {"learning_rate": 1e-12} if METHODS[method].rates else {}
    begun = fit_labels(base, task, method, max_steps=1, head_learning_rate=1e-12, **rates)
    rows = task.split("train").examples
    assert fit_labels(base, task, method).score(rows) < begun.score(rows) - 0.01


@pytest.mark.parametrize("kind", LABELLED)
@pytest.mark.parametrize("method", ["prefix", "ptuning2", "apt"])
def test_prefixes_for_labels_are_those_of_foreword(method: str, kind: str) -> None:
    task, options = LabelToy(kind), {"ptuning2": {"init": "random"}, "apt": {"gates": "apt"}}.get(method, {})
    config = TrainConfig(length=4, epochs=3, batch_size=7, patience=0, dev_limit=0, select="loss", **options)
    for model in ("bert",) if kind == "tagging" else ("bert", "llama"):
        base = tiny_base(model)
        fitted = fit_labels(base, task, method)
        assert isinstance(fitted, FittedPrefix)
        ours = train(base, None, task, config)
        assert fitted.prefix.sha256() == ours.prefix.sha256()
        assert fitted.metrics["dev_loss"] == ours.metrics["best_dev_loss"]
        found = evaluate(base, ours.prefix, task, "test")
        test = task.split("test").examples
        assert fitted.predict(test) == [output.text for output in found.outputs]
        nats = found.nats_per_token if model == "llama" else found.nats_per_label
        assert fitted.score(test) == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("kind", LABELLED)
def test_the_loop_trains_heads_as_they_are_trained_beside_prefixes(kind: str) -> None:
    """With the same dropout and at a rate of their own."""
    base, task = tiny_base("bert"), LabelToy(kind)
    config = TrainConfig(
        length=4, epochs=3, batch_size=7, patience=0, dev_limit=0, select="loss", head_learning_rate=2e-2, seed=3
    )
    start = Prefix.new(base, 4, text="one two three four")
    ours = train(base, start, task, config)
    module, plain = parametrize(start), begin_objective(base, None, task, config)
    rows, dev = plain.encode(task.split("train")), plain.encode(task.split("dev"))
    metrics = train_weights(reading(plain, module), list(module.parameters()), rows, dev, config)
    assert metrics["dev_loss"] == pytest.approx(ours.metrics["best_dev_loss"], rel=1e-5)
    assert metrics["best_step"] == ours.metrics["best_step"]
    assert plain.head is not None and ours.prefix.head is not None
    torch.testing.assert_close(plain.head.weight.detach(), ours.prefix.head.weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ENCODERS)
@pytest.mark.parametrize("method", ["full", "top2", "adapter", "lora"])
def test_other_encoders(method: str, model: str) -> None:
    base, task = tiny_base(model), LabelToy("classification")
    before = snapshot(base)
    own = {"lora": {"targets": "all"}, "top2": {"layers": 1}}.get(method, {})
    fitted = fit_labels(base, task, method, **own)
    alone = fit_labels(base, task, "head")
    assert fitted.metrics["dev_loss"] != alone.metrics["dev_loss"]
    assert fitted.parameters > alone.parameters == sum(tensor.numel() for tensor in alone.tensors().values())
    assert_as_before(base, before)


# Where an encoder's layer adds its attention and its MLP to what it was given, by family.
SUMS = {
    **{name: (f"{name}.encoder.layer.0.attention.output.dense", f"{name}.encoder.layer.0.output.dense")
       for name in ("bert", "roberta", "electra")},
    "xlm-roberta": ("roberta.encoder.layer.0.attention.output.dense", "roberta.encoder.layer.0.output.dense"),
    "deberta-v2": ("deberta.encoder.layer.0.attention.output.dense", "deberta.encoder.layer.0.output.dense"),
    "distilbert": ("distilbert.transformer.layer.0.attention", "distilbert.transformer.layer.0.ffn.lin2"),
    "albert": tuple(f"albert.encoder.albert_layer_groups.0.albert_layers.0.{name}"
                    for name in ("attention.dense", "ffn_output")),
    "modernbert": ("model.layers.0.attn", "model.layers.0.mlp"),
}  # fmt: skip


@pytest.mark.parametrize("model", ENCODERS)
def test_an_encoders_sublayers_end_before_their_sums(model: str) -> None:
    base = tiny_base(model)
    found = sublayers(base)
    assert (next(iter(found.attention)), next(iter(found.mlp))) == SUMS[model]
    layers = found.layers["encoder"]
    assert len(found.attention) == len(found.mlp) == len(layers)
    top = layers[-1][0]
    outside = {name.rpartition(".")[0] for name in top_weights(base, 1) if not name.startswith(f"{top}.")}
    assert outside == ({"model.final_norm"} if model == "modernbert" else set())


def test_adapters_equal_an_encoder_written_with_them() -> None:
    base, task = tiny_base("bert"), LabelToy("classification")
    rows = task.split("test").examples
    fitted = fit_labels(base, task, "adapter")
    assert isinstance(fitted, FittedTuning) and isinstance(fitted.tuning, AdapterTuning)
    wanted = fitted.score(rows), fitted.predict(rows)
    for layer in base.model.bert.encoder.layer:
        for part in (layer.attention.output, layer.output):
            name = next(name for name, module in base.model.named_modules() if module is part)
            part.dense = torch.nn.Sequential(part.dense, fitted.tuning.adapters[f"{name}.dense"])
    written = objective_of(base, task, head=fitted.head)
    measured = written.measure(written.encode(task.split("test")), range(len(rows)), None)
    assert measured.nats / measured.units == pytest.approx(wanted[0], rel=1e-5)
    assert [written.answer(each) for each in measured.predictions] == wanted[1]


def test_a_labelled_shot_has_its_right_word() -> None:
    rows = LabelToy("classification").split("train").examples[:2]
    base = tiny_base("llama", **SEEN)
    prompting = Prompting(base, config_of("few_shot", shots=2), rows, "Do it.", LabelToy("classification").labels)
    prompting.shots.sort()
    assert prompting.write("c\n") == f"Do it.\n\n{rows[0].prompt}low\n\n{rows[1].prompt}high\n\nc\n"
    assert prompting.room(rows[0]) == len(base.encode("", "nothing at all")[1])
    texts = ("Do it.", rows[0].prompt, "low", rows[1].prompt, "high")
    assert prompting.num_bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    ("model", "kind", "method", "options", "message"),
    [
        (
            "bert",
            "classification",
            "few_shot",
            {},
            r"'few_shot' on 'tiny-bert' \(encoder\); expected one of full, .* head",
        ),
        ("bert", "tagging", "prompt_tuning", {}, r"'prompt_tuning' on 'tiny-bert' \(encoder\)"),
        ("bert", "choice", "lora", {"template": "first"}, "template 'first' on 'tiny-bert' .* expected none"),
        ("llama", "choice", "head", {}, r"'head' on 'tiny-llama' \(decoder\); expected one of full, "),
        ("llama", "tagging", "prefix", {}, "is a decoder and tags no words"),
        ("albert", "choice", "lora", {}, "LoRA on 'tiny-albert' .* choose targets 'all'"),
    ],
)
def test_what_does_not_go_with_a_base_is_refused(
    model: str, kind: str, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        fit_labels(tiny_base(model), LabelToy(kind), method, **options)


def test_a_task_and_its_rows_go_together() -> None:
    base, task = tiny_base("llama"), LabelToy("choice")
    with pytest.raises(ConfigError, match="Example rows in train; expected Labelled, of a choice task"):
        fit(base, TRAIN, DEV, config_of("full"), task=task)
    with pytest.raises(ConfigError, match="labels of a task of kind generation; expected a task that has some"):
        toy_fit("zero_shot").predict(DEV.examples)
    with pytest.raises(DataError, match="no example"):
        fit_labels(tiny_base("bert"), task, "head", epochs=1).predict([])


def test_fine_tuned_weights_take_the_place_of_the_base_and_nothing_is_copied_back() -> None:
    base = tiny_base("llama", tie_word_embeddings=True)
    weights = all_weights(base)
    assert len({id(weight) for weight in weights.values()}) == len(weights)
    tuning = WeightTuning(base, weights)
    for value in tuning.values.values():
        value += 1.0
    before = {name: weight.data_ptr() for name, weight in weights.items()}
    with tuning.applied():
        assert all(weight.data_ptr() == tuning.values[name].data_ptr() for name, weight in weights.items())
        head, table = base.model.lm_head.weight, base.model.model.embed_tokens.weight
        assert head.data_ptr() == table.data_ptr()
    assert {name: weight.data_ptr() for name, weight in weights.items()} == before
