"""Metrics that read texts with a model: BERTScore, MoverScore and BLEURT.

`get_metric("bertscore:MODEL")` and `get_metric("moverscore:MODEL")` take an encoder: `minilm`, a folder or a Hugging
Face id; `get_metric("bleurt:MODEL")` takes a checkpoint that was trained to rate. What they give depends on the model:
only scores by one model compare.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from foreword.errors import ConfigError, ModelNotFound
from foreword.metrics.metric import Mean, Numbers, Targets
from foreword.optional import optional
from foreword.packaged import ensure_packaged, packaged_models

__all__ = ["BertScore", "Bleurt", "MoverScore", "movers_distance"]

_TEXTS_AT_ONCE = 64
_RATER = "Elron/bleurt-base-512"


class BertScore(Mean):
    """BERTScore F1 (Zhang et al. 2020, arXiv:1904.09675) by the package bert-score, best reference of each row.

    `layer` is the one whose states are compared, counted from 1; by default the package's choice for a model of that
    name, else the last. Without inverse document frequencies and baseline. A text without words scores 0, as in the
    package. Raises `ModelNotFound`, `MissingPackage`.
    """

    def __init__(self, model: str, *, layer: int | None = None, device: str | None = None) -> None:
        self.name = f"bertscore:{model}"
        self.description = f"BERTScore F1 by {model}, best reference of each row, averaged"
        self._model, self._layer, self._device = model, layer, device
        self._scorer: Any = None

    def scorer(self) -> Any:
        """The package's object, with the model."""
        if self._scorer is None:
            package = optional("bert_score", "eval")
            layer = self._layer or package.utils.model2layers.get(Path(self._model).name)
            layer = layer or _load(transformers.AutoConfig, self._model).num_hidden_layers
            with _asked_for(self._model) as source:
                self._scorer = package.BERTScorer(
                    model_type=source, num_layers=layer, device=self._device, batch_size=_TEXTS_AT_ONCE
                )
            # The package cuts texts by what the tokenizer says, which in many folders is nothing.
            tokenizer, config = self._scorer._tokenizer, self._scorer._model.config
            tokenizer.model_max_length = _max_tokens(tokenizer, config)
        return self._scorer

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        # The package asks tokenizers of transformers 5 for what they no longer have when it meets an empty text.
        written = [[text for text in references if text.strip()] for references in targets]
        rows = [row for row, texts in enumerate(written) if texts and hypotheses[row].strip()]
        scores = dict.fromkeys(range(len(targets)), 0.0)
        if rows:
            _, _, found = self.scorer().score([hypotheses[row] for row in rows], [written[row] for row in rows])
            scores.update(zip(rows, found.tolist(), strict=True))
        return [[score, 1.0] for score in scores.values()]


class MoverScore(Mean):
    """MoverScore on words (Zhao et al. 2019, arXiv:1909.02622, section 3), the mean over the references of each row.

    One less the word mover's distance between the last states of output and reference, of length 1 each. Words weigh
    by inverse document frequency among all outputs, or among all references; pieces that go on a word (##) and
    punctuation are left out, as in the authors' moverscore_v2.py (https://github.com/AIPHES/emnlp19-moverscore).
    Where no word is rare, as in a single row, all weigh the same; a text without words scores 0. Raises
    `ModelNotFound`.
    """

    def __init__(self, model: str, *, device: str | None = None) -> None:
        self.name = f"moverscore:{model}"
        self.description = f"MoverScore on words by {model}, mean over the references of each row, averaged"
        self._model, self._device = model, device
        self._encoder: _Encoder | None = None

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        if self._encoder is None:
            self._encoder = _Encoder(self._model, self._device)
        outputs = self._encoder.clouds(hypotheses)
        references = self._encoder.clouds([text for texts in targets for text in texts])
        rows, start = [], 0
        for output, texts in zip(outputs, targets, strict=True):
            found = [_similarity(output, each) for each in references[start : start + len(texts)]]
            rows.append([float(np.mean(found)), 1.0])
            start += len(texts)
        return rows


class Bleurt(Mean):
    """BLEURT (Sellam et al. 2020, arXiv:2004.04696, section 3) by a checkpoint, best reference of each row, averaged.

    The checkpoint is an encoder with a trained head of one output, as `Elron/bleurt-base-512` is, of Google's weights.
    It reads reference and output as a pair, cut where its tokenizer says or it has no more positions. Scores may be
    below 0 and above 100. Raises `ModelNotFound`, and `ConfigError` for a model that was not trained to rate.
    """

    maximum = None

    def __init__(self, model: str, *, device: str | None = None) -> None:
        self.name = f"bleurt:{model}"
        self.description = f"BLEURT by {model}, best reference of each row, averaged"
        self._model, self._device = model, device
        self._rater: _Rater | None = None

    def row_statistics(self, hypotheses: Sequence[str], targets: Targets) -> list[list[float]]:
        if self._rater is None:
            self._rater = _Rater(self._model, self._device)
        pairs = [(reference, text) for text, texts in zip(hypotheses, targets, strict=True) for reference in texts]
        ratings = iter(self._rater.rate(pairs))
        return [[max(next(ratings) for _ in texts), 1.0] for texts in targets]


def movers_distance(weights: Numbers, others: Numbers, distances: Numbers) -> float:
    """The cost of the cheapest way to move `weights` [n] to `others` [m]; `distances` [n, m]. Both sum to 1.

    A linear program (Rubner et al. 2000, equations 1 to 5).

    >>> movers_distance(np.array([0.5, 0.5]), np.array([1.0]), np.array([[1.0], [3.0]]))
    2.0
    """
    optimize, sparse = optional("scipy.optimize", "eval"), optional("scipy.sparse", "eval")
    n, m = distances.shape
    leaving, arriving = sparse.kron(sparse.eye(n), np.ones((1, m))), sparse.kron(np.ones((1, n)), sparse.eye(m))
    # The last equation follows from the others; with rounded weights it would contradict them.
    equations = sparse.vstack([leaving, arriving]).tocsr()[:-1]
    amounts = np.concatenate([weights, others])[:-1]
    solved = optimize.linprog(distances.reshape(-1), A_eq=equations, b_eq=amounts, bounds=(0, None), method="highs")
    return float(solved.fun)


_Cloud = tuple[Numbers, Numbers]  # the states of a text's words [words, size], and their weights [words]


def _similarity(one: _Cloud, other: _Cloud) -> float:
    (states, weights), (states_other, weights_other) = one, other
    if not len(weights) or not len(weights_other):
        return 0.0
    distances = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * states @ states_other.T))
    return 1.0 - movers_distance(weights, weights_other, distances)


class _Encoder:
    """A model that turns texts into clouds of words."""

    def __init__(self, model: str, device: str | None) -> None:
        self.tokenizer = _load(transformers.AutoTokenizer, model)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = _load(transformers.AutoModel, model).to(self.device).eval()
        self.max_tokens = _max_tokens(self.tokenizer, self.model.config)

    def clouds(self, texts: Sequence[str]) -> list[_Cloud]:
        """The states and weights of the words of every text; weights by rareness among the texts."""
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        frequency = Counter(token for ids in encoded for token in set(ids))
        rareness = {token: math.log((len(texts) + 1) / (count + 1)) for token, count in frequency.items()}
        clouds: list[_Cloud] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = encoded[start : start + _TEXTS_AT_ONCE]
            padded = self.tokenizer.pad({"input_ids": batch}, return_tensors="pt").to(self.device)
            with torch.inference_mode():
                states = self.model(**padded).last_hidden_state.double()
            states = torch.nn.functional.normalize(states, dim=-1).cpu().numpy()
            for row, ids in enumerate(batch):
                # Padding may be on either side.
                places = np.flatnonzero(padded["attention_mask"][row].cpu().numpy())
                clouds.append(self._cloud(ids, states[row][places], rareness))
        return clouds

    def _cloud(self, ids: Sequence[int], states: Numbers, rareness: dict[int, float]) -> _Cloud:
        tokens, special = self.tokenizer.convert_ids_to_tokens(ids), set(self.tokenizer.all_special_ids)
        kept = [
            place
            for place, token in enumerate(tokens)
            if ids[place] not in special and not token.startswith("##") and token not in string.punctuation
        ]
        weights = np.array([rareness[ids[place]] for place in kept])
        if not weights.sum():
            weights = np.ones(len(kept))
        return states[kept], weights / max(1e-30, weights.sum())


class _Rater:
    """A model that rates a text beside a reference."""

    def __init__(self, model: str, device: str | None) -> None:
        with _asked_for(
            model, "checkpoint of BLEURT", f"a folder or a Hugging Face model id such as {_RATER}"
        ) as source:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            loaded, found = transformers.AutoModelForSequenceClassification.from_pretrained(
                source, output_loading_info=True, ignore_mismatched_sizes=True
            )
        # A head that is missing, or does not fit, was drawn at random just now.
        untrained, outputs = found["missing_keys"] or found["mismatched_keys"], loaded.config.num_labels
        if untrained or outputs != 1:
            has = "without a trained head" if untrained else f"with {outputs} outputs"
            raise ConfigError(
                f"bleurt by {model!r}, a model {has}", "a checkpoint of BLEURT with its one output",
                f"name one, such as {_RATER}",
            )  # fmt: skip
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = loaded.to(self.device).eval()
        self.max_tokens = _max_tokens(self.tokenizer, loaded.config)

    def rate(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The rating of every (reference, text)."""
        ratings: list[float] = []
        for start in range(0, len(pairs), _TEXTS_AT_ONCE):
            references, texts = zip(*pairs[start : start + _TEXTS_AT_ONCE], strict=True)
            read = self.tokenizer(
                references, texts, truncation=True, max_length=self.max_tokens, padding=True, return_tensors="pt"
            )
            with torch.inference_mode():
                ratings += self.model(**read.to(self.device)).logits[:, 0].tolist()
        return ratings


def _max_tokens(tokenizer: Any, config: Any) -> int:
    """How many tokens of a text a model reads."""
    return min(int(tokenizer.model_max_length), getattr(config, "max_position_embeddings", None) or 10**9)


def _load(kind: Any, model: str) -> Any:
    with _asked_for(model) as source:
        return kind.from_pretrained(source)


@contextmanager
def _asked_for(
    model: str, what: str = "encoder", where: str = "minilm, a folder or a Hugging Face model id"
) -> Iterator[str]:
    """Where a model is loaded from; what cannot be loaded there is a `ModelNotFound`."""
    try:
        yield str(ensure_packaged(model)) if model in packaged_models() else model
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelNotFound(
            f"no {what} {model!r} for a metric ({reason})", where, "check the name after the colon"
        ) from None
