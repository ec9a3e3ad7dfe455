"""An attached model stays a model of transformers: forward, generate, pipeline, Trainer; detach restores it exactly."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments, pipeline

from foreword.artifact import load_prefix
from foreword.attention import Attachment, attach, attachment_of, detach, prefix_ids
from foreword.errors import ForewordError, PrefixError, PrefixMismatch
from foreword.fingerprint import fingerprint
from foreword.prefix import Prefix, Sites, SiteTensors
from tiny import TINY, tiny_inputs, tiny_model, tiny_tokenizer


def random_prefix(model: PreTrainedModel, length: int = 4, seed: int = 0) -> Prefix:
    """A prefix of noise for a model that is not attached."""
    attachment = Attachment(model)
    generator = torch.Generator().manual_seed(seed)
    sites: Sites = {
        site: SiteTensors(
            torch.randn(heads, length, key_dim, generator=generator),
            torch.randn(heads, length, value_dim, generator=generator),
        )
        for site, (heads, key_dim, value_dim) in attachment.geometry.items()
    }
    attachment.undo()
    return Prefix(sites, type(model).__name__, fingerprint(model))


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model that attaching could change."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [name for name, _ in model.named_modules()],
        "attributes": {
            name: sorted(key for key in module.__dict__ if not key.startswith("__"))
            for name, module in model.named_modules()
        },
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "gradients": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "config": model.config.to_dict(),
        "implementation": model.config._attn_implementation,
        "forward": model.forward,
        "save": model.save_pretrained,
        "signature": inspect.signature(model.forward),
    }


def assert_same(model: PreTrainedModel, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, expected = after.pop("state"), dict(before)
    for name, tensor in expected.pop("state").items():
        assert torch.equal(state.pop(name), tensor), name
    assert not state
    for what, value in expected.items():
        assert after[what] == value, what


@pytest.mark.parametrize("name", TINY)
def test_detach_restores_exactly(name: str):
    model, inputs = tiny_model(name), tiny_inputs(name)
    with torch.no_grad():
        want = model(**inputs).logits
        prefix = random_prefix(model)
        before = snapshot(model)
        assert attach(model, prefix) is model
        assert isinstance(model, PreTrainedModel)
        assert set(model.state_dict()) == set(before["state"])
        assert not torch.equal(model(**inputs).logits, want)
        assert detach(model) is model
        assert_same(model, before)
        assert torch.equal(model(**inputs).logits, want)
    detach(model)
    assert_same(model, before)


def test_a_trained_model_is_restored_too():
    model = tiny_model("llama")
    prefix = random_prefix(model)
    before = snapshot(model)
    attach(model, prefix, trainable=True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.startswith("foreword_prefix")
    }
    detach(model)
    assert_same(model, before)


def test_errors_leave_the_model_as_it_was():
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    good, foreign = random_prefix(model), random_prefix(other)
    before = snapshot(model)
    with pytest.raises(PrefixMismatch):
        attach(model, foreign)
    assert_same(model, before)
    with pytest.raises(PrefixMismatch):
        attach(model, random_prefix(tiny_model("qwen3")), check_fingerprint=False)
    assert_same(model, before)
    with pytest.raises(PrefixError, match="no prefix named 'b'"):
        attach(model, {"a": good}, default="b")
    assert_same(model, before)
    with pytest.raises(PrefixError, match="single prefix"):
        attach(model, {"a": good}, trainable=True)
    assert_same(model, before)


def test_attaching_twice_is_an_error_that_says_what_to_do():
    model = tiny_model("llama")
    prefix = random_prefix(model)
    attach(model, prefix)
    with pytest.raises(PrefixError, match="attached already.*detach"):
        attach(model, prefix)
    assert attachment_of(model) is not None


@pytest.mark.parametrize("ids", [[7], [-1, 0], [0, 1, 2]])
def test_unknown_prefix_ids_are_refused(ids: list[int]):
    model = tiny_model("llama")
    attach(model, {"a": random_prefix(model)})
    with pytest.raises(ForewordError):
        model(tiny_inputs("llama", batch=len(ids))["input_ids"], prefix_ids=torch.tensor(ids))


def test_forward_by_name_by_default_and_in_its_signature():
    model, ids = tiny_model("llama"), tiny_inputs("llama")["input_ids"]
    a, b = random_prefix(model, 4, 0), random_prefix(model, 2, 1)
    attach(model, {"a": a, "b": b}, default="a")
    assert "prefix_ids" in inspect.signature(model.forward).parameters
    of_a = model(ids, prefix_ids=prefix_ids(model, ["a", "a"])).logits
    mixed = model(ids, prefix_ids=prefix_ids(model, ["b", None])).logits
    assert torch.equal(model(ids).logits, of_a)
    assert not torch.allclose(mixed, of_a)
    plain = detach(model)(ids).logits
    torch.testing.assert_close(mixed[1], plain[1], rtol=1e-5, atol=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 50},
    "beams": {"num_beams": 3, "do_sample": False},
    "beam samples": {"num_beams": 2, "do_sample": True},
    "returned sequences": {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True, "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3", "bart", "t5"])
@pytest.mark.parametrize("way", OPTIONS)
def test_generate_with_one_prefix_equals_the_prefix_named_by_rows(name: str, way: str):
    model, inputs = tiny_model(name), tiny_inputs(name, batch=2)
    inputs.pop("decoder_input_ids", None)
    prefix = random_prefix(model)
    made = []
    for named in (False, True):
        attach(model, {"a": prefix, "b": random_prefix(model, 2, 1)} if named else prefix)
        extra = {"prefix_ids": prefix_ids(model, ["a", "a"])} if named else {}
        torch.manual_seed(0)
        made.append(model.generate(**inputs, **extra, max_new_tokens=6, **OPTIONS[way]))
        detach(model)
    torch.manual_seed(0)
    plain = model.generate(**inputs, max_new_tokens=6, **OPTIONS[way])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], plain)


def test_sampling_draws_from_the_prefixed_distribution():
    model, inputs = tiny_model("llama"), tiny_inputs("llama", batch=1)
    attach(model, random_prefix(model))
    out = model.generate(**inputs, do_sample=True, max_new_tokens=3, output_logits=True, return_dict_in_generate=True)
    again = model(out.sequences[:, :-1]).logits[:, -3:]
    torch.testing.assert_close(torch.stack(out.logits, 1), again, rtol=1e-5, atol=1e-4)


def test_pipeline_writes_what_generate_writes():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    attach(model, random_prefix(model))
    text = "name : Aromi"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    want = tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    got = writer(text, max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert got == want
    ids = prefix_ids(model, ["default"])
    assert writer(text, max_new_tokens=5, do_sample=False, prefix_ids=ids)[0]["generated_text"] == want
    detach(model)
    assert writer(text, max_new_tokens=5, do_sample=False)[0]["generated_text"] != want


def _rows(count: int = 8, **columns: Any) -> list[dict[str, Any]]:
    inputs = tiny_inputs("llama", batch=count)["input_ids"]
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row), **columns} for row in inputs]


def _trainer(model: PreTrainedModel, folder: Path, rows: list[dict[str, Any]], **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_strategy="no", dataloader_pin_memory=False, **{"max_steps": 12, "learning_rate": 0.05, **options},
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_trainer_trains_the_prefix_alone(tmp_path: Path, checkpointing: bool | None):
    model = tiny_model("llama")
    weights = copy.deepcopy(model.state_dict())
    prefix = random_prefix(model)
    attach(model, prefix, trainable=True)
    options: dict[str, Any] = {}
    if checkpointing is not None:
        new = hasattr(TrainingArguments, "activation_checkpointing")
        option = "activation_checkpointing" if new else "gradient_checkpointing"
        options = {option: True, f"{option}_kwargs": {"use_reentrant": checkpointing}}
        if checkpointing:
            model.enable_input_require_grads()
    trainer = _trainer(model, tmp_path / "run", _rows(prefix_ids=1), **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
    trainer.save_model(str(tmp_path / "prefix"))
    loaded = load_prefix(tmp_path / "prefix")
    assert not torch.equal(next(iter(loaded.sites.values())).keys, next(iter(prefix.sites.values())).keys)
    ids = _rows(2)[0]["input_ids"][None]
    trained = model.eval()(ids).logits
    if checkpointing:
        model.disable_input_require_grads()
    detach(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(attach(model, loaded)(ids).logits, trained, rtol=1e-5, atol=1e-4)


def test_trainer_keeps_the_column_of_prefix_ids(tmp_path: Path):
    model, rows = tiny_model("llama"), _rows(8)
    attach(model, {"a": random_prefix(model), "b": random_prefix(model, 2, 1)})
    owners = [0, 1, 2, 1, 0, 2, 2, 1]
    for row, owner in zip(rows, owners, strict=True):
        row["prefix_ids"] = owner
    trainer = _trainer(model, tmp_path / "run", rows, per_device_eval_batch_size=8)
    logits = torch.as_tensor(trainer.predict(rows).predictions)
    for row, owner in enumerate(owners):
        alone = model(rows[row]["input_ids"][None], prefix_ids=torch.tensor([owner])).logits
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-5, atol=1e-4)


def test_save_pretrained_of_an_attached_model_saves_the_plain_model(tmp_path: Path):
    model, ids = tiny_model("llama"), tiny_inputs("llama")["input_ids"]
    want = model(ids).logits
    attach(model, random_prefix(model))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, want)
    assert "foreword" not in (tmp_path / "config.json").read_text()


def test_save_pretrained_of_a_trained_one_saves_the_prefix(tmp_path: Path):
    model = tiny_model("bart")
    prefix = random_prefix(model)
    attach(model, prefix, trainable=True)
    model.save_pretrained(tmp_path)
    loaded = load_prefix(tmp_path)
    assert {str(site) for site in loaded.sites} == {str(site) for site in prefix.sites}
    assert all(torch.equal(t.keys, prefix.sites[site].keys) for site, t in loaded.sites.items())


def test_a_module_that_came_after_attaching_is_refused():
    model = tiny_model("llama")
    attach(model, random_prefix(model))
    layer = model.model.layers[0]
    layer.self_attn = type(layer.self_attn)(model.config, 0)
    with pytest.raises(ForewordError, match="attach the model again"):
        model(tiny_inputs("llama")["input_ids"], use_cache=False)
