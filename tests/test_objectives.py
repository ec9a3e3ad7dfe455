"""Heads on encoders and label words on decoders: what is read, lowered and predicted, against plain references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.labels import ENCODERS, KINDS, LabelToy
from tests.tiny import VOCAB, tiny_base, tiny_inputs, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from foreword.base import BaseModel
from foreword.data import Rows
from foreword.errors import ConfigError, DataError, PrefixError, UnsupportedModel
from foreword.heads import kept_shares
from foreword.objectives import HeadOptions, Objective, objective_of
from foreword.prefix import Prefix, Sites, SiteTensors
from foreword.tasks import Labelled, Split, Tagged
from foreword.texts import encode_texts, encode_words
from toy import ToyTask

WRITERS = ("llama", "gpt2", "gemma2", "bart", "t5")


def random_sites(base: BaseModel, length: int = 3, grad: bool = False) -> Sites:
    generator = torch.Generator().manual_seed(1)
    return {
        site: SiteTensors(
            *(
                torch.randn(shape.kv_heads, length, dim, generator=generator).requires_grad_(grad)
                for dim in (shape.key_dim, shape.value_dim)
            )
        )
        for site, shape in base.geometry.items()
    }


def prepared(name: str, kind: str, **options: Any) -> tuple[BaseModel, Objective, Rows]:
    base = tiny_base(name)
    objective = objective_of(base, LabelToy(kind), HeadOptions(**options))
    return base, objective, objective.encode(LabelToy(kind).split("train"))


def wordpiece(words: str = "") -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer as BERT's: special tokens around, segments, accents and control characters dropped."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'"
    vocab = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *letters, *(f"##{c}" for c in letters), *words.split()]
    tokenizer = Tokenizer(models.WordPiece({token: k for k, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def word_base() -> BaseModel:
    return BaseModel(tiny_model("bert"), wordpiece(), "words")


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states_are_the_backbones_own(name: str) -> None:
    base, inputs = tiny_base(name), tiny_inputs(name, batch=3)
    with torch.no_grad():
        own = tiny_model(name).base_model(**inputs)["last_hidden_state"]
    torch.testing.assert_close(base.hidden_states(inputs), own, rtol=1e-5, atol=1e-5)
    sites = random_sites(base)
    prefix = Prefix(sites, base.name, base.fingerprint)
    read = base.hidden_states(inputs, sites)
    assert not torch.allclose(read, own, atol=1e-2)
    torch.testing.assert_close(base.hidden_states(inputs, [prefix] * 3), read, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_equal_plain_autograd(name: str, kind: str) -> None:
    """The objective's loss and gradients against one written down row by row."""
    base, objective, rows = prepared(name, kind, dropout=0.0)
    head, numbers = objective.head, [3, 4, 8]
    assert head is not None
    sites = random_sites(base, grad=True)
    loss, units = objective.loss(rows, numbers, sites)
    loss.backward()
    found = [t.grad for site in sites.values() for t in (site.keys, site.values)] + [head.weight.grad, head.bias.grad]

    again = random_sites(base, grad=True)
    weight, bias = (p.detach().clone().requires_grad_() for p in (head.weight, head.bias))
    total = torch.zeros(())
    count = 0
    for number in numbers:
        row = rows.encoded[number]
        texts = [row.text] if kind == "tagging" else row.texts
        vectors = []
        for text in texts:
            ids = torch.tensor([text.ids])
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if kind != "tagging" and text.segments:
                batch["token_type_ids"] = torch.tensor([text.segments])
            hidden = base.hidden_states(batch, again)[0]
            vectors += [hidden[place] for place in text.places] if kind == "tagging" else [hidden.mean(0)]
        logits = torch.stack(vectors) @ weight.T + bias
        logits = logits.T if kind == "choice" else logits
        total = total - logits.log_softmax(-1)[range(len(row.labels)), row.labels].sum()
        count += len(row.labels)
    total.backward()
    plain = [t.grad for site in again.values() for t in (site.keys, site.values)] + [weight.grad, bias.grad]
    assert units == count
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_of_a_batch_are_those_of_each_row(kind: str) -> None:
    base, objective, rows = prepared("bert", kind)
    sites = random_sites(base)
    together = objective.measure(rows, range(len(rows)), sites)
    alone = [objective.measure(rows, [row], sites) for row in range(len(rows))]
    assert [p.labels for p in together.predictions] == [one.predictions[0].labels for one in alone]
    assert together.nats == pytest.approx(sum(one.nats for one in alone), rel=1e-5)
    assert together.units == sum(one.units for one in alone)


def test_dropout_depends_on_step_and_row_alone() -> None:
    base, objective, rows = prepared("bert", "classification", dropout=0.5)
    sites = random_sites(base)
    losses = {step: [float(objective.loss(rows, [row], sites, step)[0].detach()) for row in (0, 1)] for step in (0, 1)}
    both = float(objective.loss(rows, [0, 1], sites, 0)[0].detach())
    assert both == pytest.approx(sum(losses[0]), rel=1e-5)
    assert losses[0] != losses[1]
    shares = kept_shares(range(400), [1] * 400, 50, 0.3, seed=0)
    assert shares.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert float(shares.mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("kind", ["classification", "choice"])
@pytest.mark.parametrize("name", WRITERS)
def test_label_words_equal_brute_force(name: str, kind: str) -> None:
    """Every candidate scored by itself, one forward pass each, and the softmax over them."""
    base, objective, rows = prepared(name, kind)
    prefix = Prefix(random_sites(base), base.name, base.fingerprint)
    measured = objective.measure(rows, range(6), prefix)
    nats, tokens = 0.0, 0
    for number, prediction in zip(range(6), measured.predictions, strict=True):
        example = rows.examples[number]
        costs = []
        for candidate in example.candidates:
            prompt, ids = base.encode(example.prompt, candidate)
            ids = ids[:-1] if base.family.kind == "decoder" else ids
            logits, targets, _ = base.completion_logits(base.collate([(prompt, ids)]), prefix.sites)
            cost = float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            costs.append((cost, len(ids)))
        right = objective.task.labels.index(example.label)
        nats, tokens = nats + costs[right][0], tokens + costs[right][1]
        ranked = torch.tensor([-cost / (length if kind == "choice" else 1) for cost, length in costs])
        assert prediction.labels == (int(ranked.argmax()),)
        assert prediction.probability == pytest.approx(float(ranked.softmax(0).max()), rel=1e-4)
    assert (measured.nats, measured.units) == (pytest.approx(nats, rel=1e-5), tokens)
    sites = random_sites(base)
    loss, units = objective.loss(rows, range(6), sites)
    assert (float(loss), units) == (pytest.approx(nats, rel=1e-5), tokens)


def test_candidates_that_begin_alike_share_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    objective = objective_of(base, LabelToy("classification"))
    examples = [Labelled("a", (("x",),), "low", "x\n", ("a", "b", "c"), 1)]
    rows = objective.encode(Split("dev", examples))
    written: list[int] = []
    original = base.collate
    monkeypatch.setattr(base, "collate", lambda encoded: written.append(len(encoded)) or original(encoded))
    objective.measure(rows, [0], None)
    assert written == [1]


@given(st.lists(st.text("ab \t.é\u0301\u200d\x07xyzABC", min_size=1, max_size=6), min_size=1, max_size=12))
def test_word_pieces_are_aligned(words: list[str]) -> None:
    words = [word for word in ("".join(word.split()) for word in words) if word]
    base = word_base()
    (encoded,) = encode_words(base, [words])
    assert encoded.ids == base.tokenizer(" ".join(words))["input_ids"]
    assert len(encoded.places) == len(words)
    pieces = [base.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    here = 1
    for place, own in zip(encoded.places, pieces, strict=True):
        assert place == (here if own else -1)
        assert not own or encoded.ids[place : place + len(own)] == own
        here += len(own)


@given(st.lists(st.sampled_from(["The", "foreword", "pubs", "riverside,", "x9", "é"]), min_size=1, max_size=9))
def test_byte_level_pieces_are_those_of_the_running_text(words: list[str]) -> None:
    base = tiny_base("roberta")
    (encoded,) = encode_words(base, [words])
    assert encoded.ids == tiny_tokenizer()(" ".join(words))["input_ids"]
    assert encoded.places == sorted(set(encoded.places))


def test_long_sentences_and_vanished_words_are_tagged_o() -> None:
    base = word_base()
    task = LabelToy("tagging")
    objective = objective_of(base, task, HeadOptions(max_tokens=6))
    words = ("nine", "\u200d", "pubs")
    split = Split("dev", [Tagged("a", words, ("B-NUM", "O", "O"), 1), Tagged("b", ("x", "y"), ("O", "O"), 2)])
    rows = objective.encode(split)
    assert rows.cut == 1
    assert rows.encoded[0].text.places == [1, -1, -1]
    (first, _) = objective.measure(rows, [0, 1], None).predictions
    assert first.labels[1:] == (0, 0) and len(first.labels) == 3
    with pytest.raises(DataError, match=r"no usable row in dev, 1 skipped [(]row 7: no word has tokens[)]"):
        objective.encode(Split("dev", [Tagged("a", ("\u200d",), ("O",), 7)]))


def test_texts_are_cut_from_the_longest_and_keep_their_segments() -> None:
    base = word_base()
    short, long = encode_texts(base, [("ab", "cd"), ("a" * 30, "bc")], max_tokens=12)
    assert short.ids == base.tokenizer("ab", "cd")["input_ids"] and not short.cut
    assert short.segments == [0] * 4 + [1] * 3
    assert len(long.ids) == 12 and long.cut and sum(long.segments) == 3
    assert [len(text.ids) for text in encode_texts(base, [("a" * 90,)])] == [64]
    with pytest.raises(DataError, match="3 texts to be read together"):
        encode_texts(base, [("a", "b", "c")])
    assert encode_texts(tiny_base("distilbert"), [("a", "b")])[0].segments == []


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="is an encoder and writes no completions"):
        objective_of(tiny_base("bert"), ToyTask())
    with pytest.raises(UnsupportedModel, match="is a decoder and tags no words; expected an encoder"):
        objective_of(tiny_base("llama"), LabelToy("tagging"))
    with pytest.raises(UnsupportedModel, match="reads no text"):
        objective_of(tiny_base("vit"), LabelToy("classification"))
    with pytest.raises(UnsupportedModel, match="hidden states of 'tiny-llama', a decoder"):
        tiny_base("llama").hidden_states(tiny_inputs("llama"))
    head = objective_of(tiny_base("bert"), LabelToy("choice")).head
    assert head is not None
    with pytest.raises(PrefixError, match="a head for choice with labels 1, 2; expected one for classification with"):
        objective_of(tiny_base("bert"), LabelToy("classification"), head=head.fold())
    task = LabelToy("tagging")
    task.labels = ("B-X", "I-X")
    with pytest.raises(ConfigError, match="tags B-X, I-X; expected O among them"):
        objective_of(tiny_base("bert"), task)


def test_vocabulary_heads_are_not_computed_for_all_tokens() -> None:
    base = tiny_base("bert")
    seen: list[int] = []
    handle = base.model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.numel()))
    base.hidden_states(tiny_inputs("bert", batch=2, tokens=7))
    handle.remove()
    assert seen == [VOCAB]
