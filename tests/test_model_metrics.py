"""Metrics by a model: against their definitions on tiny encoders, and the mover's distance by brute force."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.errors import ConfigError, ModelNotFound
from foreword.metrics import METRIC_SETS, get_metric, list_model_metrics, metric_names
from foreword.model_metrics import BertScore, Bleurt, MoverScore, movers_distance
from tiny import save_tiny

HYPOTHESES = ["a pub by the river", "Aromi serves food", ""]
REFERENCES = [["the river", "a pub near the river"], ["fast food"], ["a pub"]]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    save_tiny("bert", folder)
    return str(folder)


@pytest.fixture(scope="module")
def rater(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rater(tmp_path_factory.mktemp("rater"), num_labels=1)


def save_rater(folder: Path, *, num_labels: int, head: bool = True) -> str:
    """A tiny BERT with the words of the texts here, and a head unless it is left out."""
    words = {word for texts in [HYPOTHESES, *REFERENCES] for text in texts for word in text.lower().split()}
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]))
    tokenizer = hf.BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, initializer_range=0.5, num_labels=num_labels,
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config) if head else hf.BertModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def states_of(encoder: str, text: str, layer: int) -> tuple[list[int], np.ndarray]:
    """Token ids and their states of length 1 after a layer, of one text alone."""
    tokenizer, model = hf.AutoTokenizer.from_pretrained(encoder), hf.AutoModel.from_pretrained(encoder).eval()
    ids = tokenizer(text)["input_ids"]
    with torch.inference_mode():
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
    return ids, torch.nn.functional.normalize(states, dim=-1).double().numpy()


# ---- the mover's distance

points = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(st.floats(0, 10), min_size=n, max_size=n), min_size=n, max_size=n)
)


@given(points)
def test_equal_weights_move_as_the_best_pairing_does(rows: list[list[float]]) -> None:
    pytest.importorskip("scipy")
    distances, n = np.array(rows), len(rows)
    even = np.full(n, 1 / n)
    best = min(sum(distances[i, j] for i, j in enumerate(order)) / n for order in permutations(range(n)))
    assert movers_distance(even, even, distances) == pytest.approx(best, abs=1e-9)
    assert movers_distance(even, even, distances.T) == pytest.approx(best, abs=1e-9)


SIDES = st.sampled_from([[1], [1, 1], [1, 2], [2, 1], [1, 1, 1], [1, 2, 3], [4, 1, 1]])  # sums divide 6


@given(SIDES, SIDES, st.data())
@settings(max_examples=20)
def test_whole_weights_move_as_so_many_points(first: list[int], second: list[int], data: st.DataObject) -> None:
    """A weight of a of A is a point that occurs several times; all pairings of the copies are tried."""
    pytest.importorskip("scipy")
    drawn = data.draw(st.lists(st.floats(0, 5), min_size=len(first) * len(second), max_size=len(first) * len(second)))
    distances = np.array(drawn).reshape(len(first), len(second))
    copies = [np.repeat(np.arange(len(side)), np.array(side) * (6 // sum(side))) for side in (first, second)]
    best = min(sum(distances[i, j] for i, j in zip(copies[0], order, strict=True)) for order in permutations(copies[1]))
    weights = [np.array(side) / sum(side) for side in (first, second)]
    assert movers_distance(weights[0], weights[1], distances) == pytest.approx(best / 6, abs=1e-9)


# ---- scores


def test_moverscore_is_its_definition(encoder: str) -> None:
    pytest.importorskip("scipy")
    found = MoverScore(encoder).statistics(HYPOTHESES, REFERENCES)
    tokenizer = hf.AutoTokenizer.from_pretrained(encoder)
    flat = [text for texts in REFERENCES for text in texts]

    def cloud(text: str, among: list[str]) -> tuple[np.ndarray, np.ndarray]:
        count = Counter(token for other in among for token in set(tokenizer(other)["input_ids"]))
        ids, states = states_of(encoder, text, -1)
        return states, np.array([math.log((len(among) + 1) / (count[token] + 1)) for token in ids])

    for row, (hypothesis, references) in enumerate(zip(HYPOTHESES[:2], REFERENCES[:2], strict=True)):
        each = []
        for reference in references:
            (one, w_one), (two, w_two) = cloud(hypothesis, HYPOTHESES), cloud(reference, flat)
            distances = np.linalg.norm(one[:, None] - two[None], axis=-1)
            each.append(1 - movers_distance(w_one / w_one.sum(), w_two / w_two.sum(), distances))
        assert found[row, 0] == pytest.approx(np.mean(each), abs=1e-5)
    assert found[2].tolist() == [0.0, 1.0]  # nothing was written
    assert MoverScore(encoder)(["a pub"], [["a pub"]]) == pytest.approx(100.0, abs=1e-3)


def test_bertscore_is_its_definition(encoder: str) -> None:
    pytest.importorskip("bert_score")
    for layer in (1, 2):
        found = BertScore(encoder, layer=layer).statistics(HYPOTHESES, REFERENCES)
        for row, (hypothesis, references) in enumerate(zip(HYPOTHESES[:2], REFERENCES[:2], strict=True)):
            best = 0.0
            for reference in references:
                one, two = states_of(encoder, hypothesis, layer)[1], states_of(encoder, reference, layer)[1]
                cosines = one @ two.T
                precision, recall = cosines.max(axis=1).mean(), cosines.max(axis=0).mean()
                best = max(best, 2 * precision * recall / (precision + recall))
            assert found[row, 0] == pytest.approx(best, abs=1e-5)
        assert found[2].tolist() == [0.0, 1.0]
    assert BertScore(encoder).statistics(HYPOTHESES, REFERENCES) == pytest.approx(found)  # the last layer
    assert BertScore(encoder)([""], [["a pub"]]) == 0.0


def test_bleurt_is_the_best_rating_of_the_pairs(rater: str) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(rater)
    model = hf.AutoModelForSequenceClassification.from_pretrained(rater).eval()
    metric = Bleurt(rater)
    found = metric.statistics(HYPOTHESES, REFERENCES)
    for row, (hypothesis, references) in enumerate(zip(HYPOTHESES, REFERENCES, strict=True)):
        each = []
        for reference in references:
            ids = tokenizer.convert_tokens_to_ids(
                ["[CLS]", *reference.lower().split(), "[SEP]", *hypothesis.lower().split(), "[SEP]"]
            )
            kinds = [0] * (len(reference.split()) + 2) + [1] * (len(hypothesis.split()) + 1)
            with torch.inference_mode():
                each.append(float(model(torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).logits[0, 0]))
        assert found[row].tolist() == pytest.approx([max(each), 1.0], abs=1e-5)
    assert metric.maximum is None
    assert metric(HYPOTHESES, REFERENCES) == pytest.approx(100 * found[:, 0].mean())
    long = "a pub by the river " * 20
    assert metric([long], [[long]]) == pytest.approx(metric([long + long], [[long + long]]), abs=1e-4)


def test_bleurt_refuses_a_model_that_was_not_trained_to_rate(tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    with pytest.raises(ConfigError, match="a model with 2 outputs; expected a checkpoint of BLEURT"):
        Bleurt(save_rater(tmp_path / "two", num_labels=2)).ready()
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="a model without a trained head; expected a checkpoint of BLEURT"):
        Bleurt(save_rater(tmp_path / "none", num_labels=1, head=False)).ready()
    (tmp_path / "other").mkdir()
    config = Path(save_rater(tmp_path / "other", num_labels=1), "config.json")
    labels = {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **labels}))
    with pytest.raises(ConfigError, match="a model without a trained head; expected a checkpoint of BLEURT"):
        Bleurt(str(config.parent)).ready()


def test_bleurt_without_a_checkpoint(tmp_path: Path, rater: str) -> None:
    with pytest.raises(ModelNotFound, match="no checkpoint of BLEURT .*; expected a folder or a Hugging Face model id"):
        get_metric(f"bleurt:{tmp_path / 'none'}").ready()
    config = json.loads(Path(rater, "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bleurt", "architectures": None}))
    with pytest.raises(ModelNotFound, match="no checkpoint of BLEURT"):
        get_metric(f"bleurt:{tmp_path}").ready()


@pytest.mark.parametrize("kind", [BertScore, MoverScore])
def test_long_texts_are_cut(kind: type[BertScore] | type[MoverScore], encoder: str, tmp_path: Path) -> None:
    """A tokenizer that names no limit reads as many tokens as the model has positions, 64 here."""
    pytest.importorskip("bert_score")
    tokenizer = hf.AutoTokenizer.from_pretrained(encoder)
    tokenizer.model_max_length = 10**30
    hf.AutoModel.from_pretrained(encoder).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    long = "a pub by the river " * 40
    assert kind(str(tmp_path))([long], [[long + "with more words"]]) == pytest.approx(100.0, abs=1e-3)


# ---- names and errors


def test_names_with_a_model(encoder: str) -> None:
    assert list_model_metrics() == ["bertscore:MODEL", "moverscore:MODEL", "bleurt:MODEL"]
    assert get_metric(f"moverscore:{encoder}") is get_metric(f"moverscore:{encoder}")
    assert get_metric(f"moverscore:{encoder}").name == f"moverscore:{encoder}"
    assert metric_names(["bleu", f"bertscore:{encoder}", "bleu"]) == ("bleu", f"bertscore:{encoder}")
    with pytest.raises(ConfigError, match="metric 'bertscore:' without a model; expected bertscore:MODEL"):
        metric_names(["bertscore:"])
    with pytest.raises(ConfigError, match="or a set: e2e, webnlg"):
        metric_names(["blue"])


def test_names_with_a_model_are_known_to_whoever_imports_the_metrics_alone() -> None:
    code = """
import sys
from foreword.metrics import METRIC_SETS, get_metric, metric_names
print(*metric_names(["e2e", "bertscore:minilm", "moverscore:x"]), "torch" in sys.modules)
print(get_metric("bertscore:minilm").name, get_metric("moverscore:x").name)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = [*METRIC_SETS["e2e"], "bertscore:minilm", "moverscore:x"]
    assert found.split() == [*names, "False", "bertscore:minilm", "moverscore:x"]


@pytest.mark.parametrize("name", ["none", "roberta-large"])  # of the second the package knows the layer
@pytest.mark.parametrize("kind", ["bertscore", "moverscore"])
def test_a_model_that_is_not_there(kind: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("bert_score")
    with pytest.raises(ModelNotFound, match="no encoder .* for a metric .*; expected minilm, a folder"):
        get_metric(f"{kind}:{tmp_path / name}").ready()
