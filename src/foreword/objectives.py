"""What a task asks of a base model: how its rows are read, what training lowers, and what is predicted.

* `Completion`: write the completion (generation, on decoders and encoder-decoders).
* `LabelWords`: write the right label or option; what is likeliest after the prompt is predicted (classification and
  choice, on decoders and encoder-decoders).
* `TextHead`: a trained linear head reads each text of a frozen encoder (classification and choice).
* `WordHead`: such a head reads the first piece of each word (tagging).

Sources: for the heads P-Tuning v2, arXiv 2110.07602; for label words Brown et al. 2020, arXiv 2005.14165, section 2.4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from foreword.bank import Stacked
from foreword.base import BaseModel, Reading
from foreword.data import Encoded, Rows, encode_split, usable_rows, why_unusable
from foreword.errors import ConfigError, PrefixError, PrefixMismatch, UnsupportedModel
from foreword.heads import HeadModule, kept_shares, pooled
from foreword.loss import completion_nats
from foreword.metrics import get_metric
from foreword.prefix import Head, Sites
from foreword.tasks import Split, Task
from foreword.texts import collate_texts, encode_texts, encode_words

__all__ = ["Completion", "HeadOptions", "LabelWords", "Measured", "Objective", "Part", "Predicted", "objective_of"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeadOptions:
    """How a new head on an encoder is made and trained: see the options of `TrainConfig` with these names."""

    pooling: str = "auto"
    dropout: float = 0.1
    max_tokens: int = 128
    seed: int = 0


class Predicted(NamedTuple):
    """What is predicted for one row: numbers of labels (one, or one for each word), and how probable they are."""

    labels: tuple[int, ...]
    probability: float


class Measured(NamedTuple):
    """Nats of the right answers, their tokens or labels (as the unit says), and what is predicted for each row."""

    nats: float
    units: int
    predictions: list[Predicted]


class Part(NamedTuple):
    """What one run has in a pass: rows by their numbers, the step that they are read in, its place in `Stacked`."""

    objective: Objective
    rows: Rows
    numbers: Sequence[int]
    step: int = 0
    owner: int = 0

    @property
    def chosen(self) -> list[Any]:
        """The rows as the model reads them."""
        return [self.rows.encoded[number] for number in self.numbers]


class Objective(ABC):
    """A task on a base model. `unit` is what the loss is counted in: a token or a label.

    `score_name` names the metric that models are selected by, empty where only the loss does it. `head` is what is
    trained beside the prefix, if anything.
    """

    unit = "label"
    head: HeadModule | None = None

    def __init__(self, base: BaseModel, task: Task) -> None:
        self.base, self.task = base, task
        self.score_name = task.metrics[0]

    @abstractmethod
    def encode(self, split: Split, *, strict: bool = False, progress: Progress | None = None) -> Rows:
        """The usable rows of a split; errors as `foreword.data.encode_split`."""

    def loss(self, rows: Rows, numbers: Sequence[int], sites: Sites, step: int = 0) -> tuple[Tensor, int]:
        """Nats of the right answers of some rows, summed, and their count; differentiable in `sites` and `head`.

        What is random depends on the step and on each row's number.
        """
        return self.losses([Part(self, rows, numbers, step)], sites)[0]

    def measure(self, rows: Rows, numbers: Sequence[int], read: Reading) -> Measured:
        """The loss and the predictions of some rows."""
        return self.measures([Part(self, rows, numbers)], read)[0]

    @abstractmethod
    def losses(self, parts: Sequence[Part], read: Reading | Stacked) -> list[tuple[Tensor, int]]:
        """The `loss` of every part, in one pass; the parts have objectives of this kind on this base model."""

    @abstractmethod
    def measures(self, parts: Sequence[Part], read: Reading | Stacked) -> list[Measured]:
        """What `measure` finds for every part, in one pass."""

    def answer(self, prediction: Predicted) -> str:
        """A prediction as a metric reads it."""
        return " ".join(self.task.labels[label] for label in prediction.labels)

    def right(self, example: Any) -> str:
        """The right answer as a metric reads it."""
        return str(example.label)

    def score(self, rows: Rows, predictions: Sequence[Predicted]) -> float:
        """The selecting metric over all rows."""
        answers = [self.answer(prediction) for prediction in predictions]
        return get_metric(self.score_name)(answers, [[self.right(example)] for example in rows.examples])


def _chosen(parts: Sequence[Part]) -> list[Any]:
    return [row for part in parts for row in part.chosen]


def _reading(parts: Sequence[Part], read: Reading | Stacked, texts: Sequence[int] | None = None) -> Reading:
    """What the rows of a pass read, in which each chosen row has a number of `texts` (None: one)."""
    if not isinstance(read, Stacked):
        return read
    owners = [part.owner for part in parts for _ in part.numbers]
    if texts is not None:
        owners = [owner for owner, count in zip(owners, texts, strict=True) for _ in range(count)]
    return read.call(owners)


class _Writing(Objective):
    """What objectives that write tokens have in common."""

    unit = "token"

    @abstractmethod
    def pair(self, row: Any) -> tuple[list[int], list[int]]:
        """Prompt and right completion of an encoded row, as token ids."""

    def losses(self, parts: Sequence[Part], read: Reading | Stacked) -> list[tuple[Tensor, int]]:
        pairs = [self.pair(row) for row in _chosen(parts)]
        lengths = iter([len(completion) for _, completion in pairs])
        counts = [sum(next(lengths) for _ in part.numbers) for part in parts]
        logits, targets, _ = self.base.completion_logits(self.base.collate(pairs), _reading(parts, read))
        return list(zip(completion_nats(logits, targets, counts).unbind(), counts, strict=True))


class Completion(_Writing):
    """The completion after the prompt; nothing is predicted."""

    def __init__(self, base: BaseModel, task: Task) -> None:
        super().__init__(base, task)
        self.score_name = ""

    def encode(self, split: Split, *, strict: bool = False, progress: Progress | None = None) -> Rows:
        return encode_split(self.base, split, strict=strict, progress=progress)

    def pair(self, row: Any) -> tuple[list[int], list[int]]:
        return cast("tuple[list[int], list[int]]", row)

    @torch.no_grad()
    def measures(self, parts: Sequence[Part], read: Reading | Stacked) -> list[Measured]:
        return [Measured(nats.item(), tokens, []) for nats, tokens in self.losses(parts, read)]


class _Options(NamedTuple):
    """Token ids of a prompt and of everything that may follow, and which of it is right."""

    prompt: list[int]
    candidates: list[list[int]]
    right: int


class LabelWords(_Writing):
    """The right candidate after the prompt; the likeliest is predicted: by all of its tokens, of options by their mean.

    Decoders write candidates without the end token. Candidates of a row that begin alike are computed together.
    """

    def encode(self, split: Split, *, strict: bool = False, progress: Progress | None = None) -> Rows:
        known: dict[str, list[int]] = {}
        return usable_rows(split, (self._encoded(e, known) for e in split.examples), strict=strict, progress=progress)

    def _encoded(self, example: Any, known: dict[str, list[int]]) -> Encoded:
        joint = self.base.family.kind == "decoder"
        prompt = self.base.encode_prompt(example.prompt)
        for text in example.candidates:
            if text not in known:
                ids = self.base.encode("", text)[1]
                known[text] = ids[:-1] if joint and ids[-1:] == [self.base.tokenizer.eos_token_id] else ids
        candidates = [known[text] for text in example.candidates]
        right = self.task.labels.index(example.label)
        lengths = [len(ids) for ids in candidates]
        reasons = [why_unusable(len(prompt), length, self.base.max_tokens, joint) for length in lengths]
        reason = next(filter(None, reasons), "")
        if right >= len(candidates):
            reason = f"label {example.label!r} of {len(candidates)} options"
        return Encoded(_Options(prompt, candidates, right), len(prompt) + max(lengths), reason)

    def pair(self, row: Any) -> tuple[list[int], list[int]]:
        return row.prompt, row.candidates[row.right]

    @torch.no_grad()
    def measures(self, parts: Sequence[Part], read: Reading | Stacked) -> list[Measured]:
        costs = iter(self._costs(parts, read))
        return [self._measured([(options, next(costs)) for options in part.chosen]) for part in parts]

    def _measured(self, found: Sequence[tuple[_Options, Tensor]]) -> Measured:
        """What the nats of every candidate say of some rows."""
        nats, count, predictions = 0.0, 0, []
        for options, costs in found:
            lengths = torch.tensor([len(ids) for ids in options.candidates], dtype=costs.dtype)
            nats, count = nats + float(costs[options.right]), count + len(options.candidates[options.right])
            ranked = -costs / lengths if self.task.kind == "choice" else -costs
            chances = torch.softmax(ranked, 0)
            best = int(ranked.argmax())
            predictions.append(Predicted((best,), float(chances[best])))
        return Measured(nats, count, predictions)

    def _costs(self, parts: Sequence[Part], read: Reading | Stacked) -> list[Tensor]:
        """Nats of every candidate of every row, each `[candidates]`."""
        written: list[tuple[list[int], list[int]]] = []
        places = []  # of every candidate: in which written row it can be read
        texts = []  # how many rows are written for each
        chosen: list[_Options] = _chosen(parts)
        for options in chosen:
            own: list[list[int]] = []
            for ids in sorted(options.candidates, key=len, reverse=True):
                if not any(_begins_with(each, ids[:-1]) for each in own):
                    own.append(ids)
            for ids in options.candidates:
                carrier = next(k for k, each in enumerate(own) if _begins_with(each, ids[:-1]))
                places.append(len(written) + carrier)
            written += [(options.prompt, ids) for ids in own]
            texts.append(len(own))
        # An encoder reads each prompt as often as there are candidates, as it does in training.
        logits, _, rows = self.base.completion_logits(self.base.collate(written), _reading(parts, read, texts))
        chances = logits.float().log_softmax(-1)
        starts = torch.searchsorted(rows.cpu(), torch.arange(len(written))).tolist()
        found, place = [], iter(places)
        for options in chosen:
            costs = []
            for ids in options.candidates:
                start = starts[next(place)]
                taken = chances[range(start, start + len(ids)), ids]
                costs.append(-taken.double().sum().cpu())
            found.append(torch.stack(costs))
        return found


def _begins_with(ids: list[int], start: list[int]) -> bool:
    return ids[: len(start)] == start


class _Head(Objective):
    """What the two heads on an encoder have in common."""

    head: HeadModule

    def __init__(self, base: BaseModel, task: Task, options: HeadOptions, head: Head | None, pooling: str) -> None:
        super().__init__(base, task)
        if not task.labels:
            raise ConfigError(f"task {task.name!r} without labels", "at least one", "name its labels")
        self.options = options
        hidden = base.model.config.hidden_size
        if head is not None and head.weight.shape[1] != hidden:
            raise PrefixMismatch(
                f"a head for {head.weight.shape[1]} hidden units", f"{hidden}, those of {base.name!r}",
                "train it on this base model",
            )  # fmt: skip
        if head is None:
            self.head = HeadModule.new(task.kind, task.labels, pooling, hidden, options.seed)
        else:
            self.head = HeadModule(head)
        self.head.to(base.device)

    @abstractmethod
    def vectors(self, parts: Sequence[Part], read: Reading | Stacked) -> tuple[Tensor, list[int]]:
        """What the head reads `[vectors, hidden]`, and how many vectors each row has."""

    @abstractmethod
    def logits(self, vectors: Tensor, counts: Sequence[int]) -> Tensor:
        """Of each answer to be given, `[answers, outputs or options]`."""

    def losses(self, parts: Sequence[Part], read: Reading | Stacked) -> list[tuple[Tensor, int]]:
        found = []
        for part, own, vectors, counts in self._vectors_of(parts, read):
            if own.options.dropout:
                seed = own.options.seed * 1_000_003 + part.step
                shares = kept_shares(part.numbers, counts, vectors.shape[1], own.options.dropout, seed)
                vectors = vectors * shares.to(vectors.device, vectors.dtype)
            targets = own._targets(part.chosen, vectors.device)
            logits = own.logits(vectors, counts)
            found.append((nn.functional.cross_entropy(logits, targets, reduction="sum"), len(targets)))
        return found

    @torch.no_grad()
    def measures(self, parts: Sequence[Part], read: Reading | Stacked) -> list[Measured]:
        found = []
        for part, own, vectors, counts in self._vectors_of(parts, read):
            logits = own.logits(vectors, counts)
            targets = own._targets(part.chosen, logits.device)
            nats = nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            chances, labels = torch.softmax(logits, -1).max(-1)
            predictions = own._predictions(part.chosen, labels.tolist(), chances.tolist())
            found.append(Measured(nats, len(targets), predictions))
        return found

    def _vectors_of(
        self, parts: Sequence[Part], read: Reading | Stacked
    ) -> Iterator[tuple[Part, _Head, Tensor, list[int]]]:
        """Every part with its objective, the vectors that its head reads, and how many each of its rows has."""
        vectors, counts = self.vectors(parts, read)
        left = iter(counts)
        own = [[next(left) for _ in part.numbers] for part in parts]
        for part, each, numbers in zip(parts, vectors.split([sum(numbers) for numbers in own]), own, strict=True):
            yield part, cast(_Head, part.objective), each, numbers

    def _targets(self, chosen: Sequence[Any], device: torch.device) -> Tensor:
        return torch.tensor([label for each in chosen for label in each.labels], dtype=torch.long, device=device)

    def _predictions(self, chosen: Sequence[Any], labels: Sequence[int], chances: Sequence[float]) -> list[Predicted]:
        return [Predicted((label,), chance) for _, label, chance in zip(chosen, labels, chances, strict=True)]


class _Texts(NamedTuple):
    """The texts of a row (one, or one for each option) as an encoder reads them, and the right label."""

    texts: list[Any]
    labels: tuple[int, ...]


class TextHead(_Head):
    """A label for a text or a pair of texts, or the right one of several options, each read by itself."""

    def __init__(self, base: BaseModel, task: Task, options: HeadOptions, head: Head | None) -> None:
        super().__init__(base, task, options, head, "mean" if options.pooling == "auto" else options.pooling)

    def encode(self, split: Split, *, strict: bool = False, progress: Progress | None = None) -> Rows:
        flat = [text for example in split.examples for text in example.texts]
        found = iter(encode_texts(self.base, flat, self.options.max_tokens))
        encoded = []
        for example in split.examples:
            texts = [next(found) for _ in example.texts]
            values = _Texts(texts, (self.task.labels.index(example.label),))
            reason = "" if all(text.ids for text in texts) else "a text has no tokens"
            if self.task.kind == "choice" and values.labels[0] >= len(texts):
                reason = f"label {example.label!r} of {len(texts)} options"
            tokens = sum(len(text.ids) for text in texts)
            encoded.append(Encoded(values, tokens, reason, any(text.cut for text in texts)))
        return usable_rows(split, encoded, strict=strict, progress=progress)

    def vectors(self, parts: Sequence[Part], read: Reading | Stacked) -> tuple[Tensor, list[int]]:
        chosen: list[_Texts] = _chosen(parts)
        counts = [len(each.texts) for each in chosen]
        batch = collate_texts(self.base, [text for each in chosen for text in each.texts])
        hidden = self.base.hidden_states(batch, _reading(parts, read, counts))
        return pooled(hidden, batch["attention_mask"], self.head.pooling), counts

    def logits(self, vectors: Tensor, counts: Sequence[int]) -> Tensor:
        logits: Tensor = self.head(vectors)
        if self.head.kind != "choice":
            return logits
        options = logits[:, 0].split(list(counts))
        return nn.utils.rnn.pad_sequence(options, batch_first=True, padding_value=-torch.inf)


class _Tags(NamedTuple):
    """A sentence as an encoder reads it: ids, each word's place (-1: not there), and the tags of the words there."""

    text: Any
    labels: tuple[int, ...]


class WordHead(_Head):
    """A tag for each word, read at its first piece; words that the encoder does not see are tagged O."""

    def __init__(self, base: BaseModel, task: Task, options: HeadOptions, head: Head | None) -> None:
        if "O" not in task.labels:
            raise ConfigError(f"tags {', '.join(task.labels)}", "O among them", "name the tag of other words O")
        super().__init__(base, task, options, head, "token")
        self._numbers = {label: number for number, label in enumerate(task.labels)}

    def encode(self, split: Split, *, strict: bool = False, progress: Progress | None = None) -> Rows:
        found = encode_words(self.base, [example.words for example in split.examples], self.options.max_tokens)
        encoded = []
        for example, text in zip(split.examples, found, strict=True):
            tags = [tag for tag, place in zip(example.tags, text.places, strict=True) if place >= 0]
            values = _Tags(text, tuple(self._numbers[tag] for tag in tags))
            encoded.append(Encoded(values, len(text.ids), "" if tags else "no word has tokens", text.cut))
        return usable_rows(split, encoded, strict=strict, progress=progress)

    def vectors(self, parts: Sequence[Part], read: Reading | Stacked) -> tuple[Tensor, list[int]]:
        chosen: list[_Tags] = _chosen(parts)
        batch = collate_texts(self.base, [each.text for each in chosen])
        hidden = self.base.hidden_states(batch, _reading(parts, read))
        counts = [len(each.labels) for each in chosen]
        rows = [row for row, count in enumerate(counts) for _ in range(count)]
        places = [place for each in chosen for place in each.text.places if place >= 0]
        return hidden[rows, places], counts

    def logits(self, vectors: Tensor, counts: Sequence[int]) -> Tensor:  # noqa: ARG002 - each vector is answered
        return self.head(vectors)

    def _predictions(self, chosen: Sequence[_Tags], labels: Sequence[int], chances: Sequence[float]) -> list[Predicted]:
        found, given = [], iter(zip(labels, chances, strict=True))
        for each in chosen:
            pairs = [next(given) if place >= 0 else (self._numbers["O"], 1.0) for place in each.text.places]
            found.append(Predicted(tuple(label for label, _ in pairs), sum(c for _, c in pairs) / len(pairs)))
        return found

    def right(self, example: Any) -> str:
        return " ".join(example.tags)


def objective_of(
    base: BaseModel, task: Task, options: HeadOptions | None = None, head: Head | None = None
) -> Objective:
    """What a task asks of a base model; with a `head` to go on with where there is one.

    Raises `UnsupportedModel` for a task that the model cannot do, `PrefixError` for a head of another task.
    """
    options = options or HeadOptions()
    if base.family.kind != "encoder":
        if task.kind == "tagging":
            raise UnsupportedModel(
                f"{base.name!r} is a {base.family.kind} and tags no words", "an encoder", "choose another base model"
            )
        return Completion(base, task) if task.kind == "generation" else LabelWords(base, task)
    if task.kind == "generation":
        raise UnsupportedModel(
            f"{base.name!r} is an encoder and writes no completions", "a decoder or encoder-decoder",
            "choose another base model",
        )  # fmt: skip
    if base.model.main_input_name != "input_ids":
        raise UnsupportedModel(f"{base.name!r} reads no text", "an encoder of texts", "choose another base model")
    if head is not None and (head.kind, head.labels) != (task.kind, tuple(task.labels)):
        raise PrefixError(
            f"a head for {head.kind} with labels {', '.join(head.labels)}",
            f"one for {task.kind} with {', '.join(task.labels)}", "choose the task that the prefix was trained for",
        )  # fmt: skip
    make = WordHead if task.kind == "tagging" else TextHead
    return make(base, task, options, head)
