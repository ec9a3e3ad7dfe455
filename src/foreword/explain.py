"""Explaining a prefix row by row: do its gates tell right answers from wrong ones?

Every row of a split is predicted, and the gates λ·α that its text opens are read. AUROC says how well a number tells
right rows from wrong ones: 0.5 tells nothing. Many layers and slots are looked at, so that some look telling by chance;
how many is said beside what was found: by the level of the intervals, by the same procedure with the labels dealt out
at random, and by how often chance alone is as telling as the most telling one (a permutation test of the maximum,
Westfall and Young 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from foreword.base import BaseModel
from foreword.data import Rows, ordered_batches
from foreword.errors import ConfigError, PrefixError
from foreword.evaluate import objective_for, predictions
from foreword.metrics.auroc import aurocs, bootstrap_aurocs, intervals, permuted_aurocs
from foreword.metrics.metric import Numbers
from foreword.objectives import Objective
from foreword.prefix import Prefix, Site
from foreword.tasks import Labelled, Tagged, Task, get_task
from foreword.texts import collate_texts

__all__ = ["Explained", "Explanation", "Telling", "explain", "row_gates"]

Progress = Callable[[str, int, int], None]

# How often labels are dealt out at random: for the control of the intervals, and for the test of the maximum.
_CONTROLS, _PERMUTATIONS = 10, 1000
_BEST_SLOTS = 10
# From a minority of fewer rows AUROC is hardly known.
_FEW = 20


class Telling(NamedTuple):
    """How well a number tells right rows from wrong ones: AUROC with the ends of its 95 % interval, and its means.

    Above 0.5 the number is greater in right rows.
    """

    name: str
    auroc: float
    low: float
    high: float
    mean_right: float
    mean_wrong: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0.5."""
        return not self.low <= 0.5 <= self.high


class Explained(NamedTuple):
    """One row: what was right and what was predicted, how probable, its length, and the mean gate of every layer."""

    id: str
    text: str
    gold: str
    predicted: str
    probability: float
    right: bool
    tokens: int
    gates: tuple[float, ...]


@dataclass(frozen=True)
class Explanation:
    """What the gates of a prefix tell of its right and wrong answers.

    `layers` are in the order of the model, `slots` are the most telling ones (their intervals are of what was picked
    for being far from 0.5, and too narrow for that); `slot_aurocs` are those of all slots, layer by layer.
    `clear_by_chance` is how many layers have an interval that leaves out 0.5 when labels are dealt out at random (the
    mean). `layer_chance` and `slot_chance` are the shares of random labels under which the most telling layer or slot
    is as telling as here; `layer_chance_at_length` deals labels out among rows of like length only. All that is empty
    or None where every row is right, or wrong.
    """

    base: str
    task: str
    split: str
    data_sha256: str
    sites: list[str]
    rows: list[Explained] = field(repr=False)
    layers: list[Telling] = field(default_factory=list)
    slots: list[Telling] = field(default_factory=list)
    probability: Telling | None = None
    tokens: Telling | None = None
    clear_by_chance: float | None = None
    layer_chance: float | None = None
    layer_chance_at_length: float | None = None
    slot_chance: float | None = None
    slot_aurocs: list[list[float]] = field(default_factory=list, repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def right(self) -> int:
        """How many rows are right."""
        return sum(row.right for row in self.rows)

    @property
    def clear_layers(self) -> int:
        """How many layers have an interval that leaves out 0.5."""
        return sum(layer.clear for layer in self.layers)

    @property
    def most_telling(self) -> list[Telling]:
        """The layers, the most telling first."""
        return sorted(self.layers, key=lambda layer: -abs(layer.auroc - 0.5))

    def summary(self) -> list[str]:
        """What was found, in plain sentences."""
        count, right = len(self.rows), self.right
        lines = [f"{right} of {count} rows are right ({100 * right / count:.0f} %)."]
        if not self.layers or self.probability is None or self.tokens is None:
            return [*lines, *self.notes]
        best, chance = self.most_telling[0], self.layer_chance or 0.0
        way, often = "higher" if best.auroc > 0.5 else "lower", 100 * max(best.auroc, 1 - best.auroc)
        lines.append(
            f"The most telling of {len(self.layers)} layers is {best.name}: of a right and a wrong row, its mean gate "
            f"is {way} in the right one {often:.0f} times in 100 (AUROC {_shown(best)})."
        )
        lines.append(
            f"With right and wrong dealt out at random, the most telling layer is as telling as that in "
            f"{_share(chance)} of the trials: {_verdict(chance)}"
        )
        lines.append(
            f"The intervals of {self.clear_layers} of {len(self.layers)} layers leave out 0.5; by chance "
            f"{0.05 * len(self.layers):.1f} would, and {self.clear_by_chance:.1f} do with labels dealt out at random."
        )
        lines.append(
            f"The yardstick is the probability that the model gives its own answer: AUROC {_shown(self.probability)}."
        )
        like = self.layer_chance_at_length or 0.0
        lines.append(
            f"The length of a row alone has AUROC {_shown(self.tokens)}. Among rows of like length, right and wrong "
            f"dealt out at random are as telling in {_share(like)} of the trials: {_verdict(like)}"
        )
        return [*lines, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["rows"] = [row._asdict() for row in self.rows]
        for part in ("layers", "slots"):
            plain[part] = [{**each._asdict(), "clear": each.clear} for each in getattr(self, part)]
        for part in ("probability", "tokens"):
            one = getattr(self, part)
            plain[part] = None if one is None else one._asdict()
        counted = {"right": self.right, "wrong": len(self.rows) - self.right, "clear_layers": self.clear_layers}
        return {**counted, "summary": self.summary(), **plain}


def explain(
    base: BaseModel,
    prefix: Prefix,
    task: Task | str,
    split: str = "test",
    *,
    limit: int | None = None,
    strict: bool = False,
    batch_size: int = 20,
    samples: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Explanation:
    """Relate the gates of a prefix to its right and wrong answers on the first `limit` rows of a split.

    A sentence to be tagged is right if all of its tags are. Raises `ConfigError` for a task of generation,
    `PrefixError` for a prefix whose gates do not read the text, and what `evaluate` raises.

    >>> import foreword as fw
    >>> base = fw.BaseModel.load("minilm")  # doctest: +SKIP
    >>> found = explain(base, fw.Prefix.load("runs/rte/prefix", base), "rte")  # doctest: +SKIP
    >>> found.most_telling[0].name, found.layer_chance  # doctest: +SKIP
    """
    task = get_task(task) if isinstance(task, str) else task
    if task.kind == "generation":
        raise ConfigError(
            f"task {task.name!r}, in which text is written", "a task with labels, whose answers are right or wrong",
            "explain a prefix of such a task",
        )  # fmt: skip
    if all(tensors.gate is None for tensors in prefix.sites.values()):
        raise PrefixError("a prefix whose gates do not read the text", "gates that do", "train it with --gates apt")
    prefix.check_base(base.name, base.fingerprint, base.geometry, base.hidden_sizes)
    objective = objective_for(base, prefix, task)
    data = task.split(split, limit=limit, strict=strict)
    rows = objective.encode(data, strict=strict)
    advance = [None if progress is None else _stage(progress, name) for name in ("predicting", "reading gates")]
    _, _, found = predictions(objective, rows, prefix, batch_size, advance[0])
    gates = row_gates(objective, rows, prefix, batch_size, advance[1])
    sites = [site for site, each in gates.items() if each.shape[1]]
    means = torch.stack([gates[site].mean(1) for site in sites], dim=1).double()
    told = []
    for example, length, each, row in zip(rows.examples, rows.lengths, found, means.tolist(), strict=True):
        gold, answer = objective.right(example), objective.answer(each)
        told.append(
            Explained(example.id, _text(example), gold, answer, each.probability, gold == answer, length, tuple(row))
        )
    plain = Explanation(base.name, task.name, split, data.sha256, [str(site) for site in sites], told)
    wrong = len(told) - plain.right
    if not plain.right or not wrong:
        same = "right" if plain.right else "wrong"
        return replace(plain, notes=[f"Every row is {same}: there is nothing to tell apart."])
    few = min(plain.right, wrong) < _FEW
    notes = [f"Only {min(plain.right, wrong)} rows are on one side: all of this is hardly known."] if few else []
    slots = [gates[site].double().numpy() for site in sites]
    return replace(plain, **_told(plain, means.numpy(), slots, samples, seed), notes=notes)


def row_gates(
    objective: Objective,
    rows: Rows,
    prefix: Prefix,
    batch_size: int = 20,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Site, Tensor]:
    """The gates λ·α·g of every row `[rows, prefix]`, at the sites whose gates read the text.

    Where each token has its own gate, the mean over the tokens of the row's texts is taken, or over its prompt: the
    answer is not read, which would give away what is right.
    """
    base = objective.base
    gated = [site for site, tensors in prefix.sites.items() if tensors.gate is not None]
    found: dict[Site, Tensor] = {site: torch.empty(len(rows), prefix.sites[site].length) for site in gated}
    done = 0
    for numbers in ordered_batches(rows.lengths, batch_size):
        with torch.no_grad(), base.attachment.recording_gates() as seen:
            mask, owners = _read_texts(objective, [rows.encoded[row] for row in numbers], prefix)
        texts = torch.bincount(owners, minlength=len(numbers))[:, None]
        for site in gated:
            if prefix.sites[site].length:
                means = _over_tokens(seen[site].float().cpu(), mask)
                sums = torch.zeros(len(numbers), means.shape[1]).index_add_(0, owners, means)
                found[site][numbers] = sums / texts
        done += len(numbers)
        if progress is not None:
            progress(done, len(rows))
    return {site: each * _factor(prefix, site) for site, each in found.items()}


def _read_texts(objective: Objective, chosen: Sequence[Any], prefix: Prefix) -> tuple[Tensor, Tensor]:
    """Read the texts of some rows; which of their tokens count `[texts, tokens]`, and each text's row `[texts]`."""
    base = objective.base
    if base.family.kind == "encoder":
        texts = [getattr(each, "texts", None) or [each.text] for each in chosen]
        batch = collate_texts(base, [text for each in texts for text in each])
        base.hidden_states(batch, prefix)
        owners = torch.tensor([row for row, each in enumerate(texts) for _ in each])
        return batch["attention_mask"].bool(), owners
    # One token of a candidate, the same for all rows of a task of classification: its logits are not looked at.
    batch = base.collate([(each.prompt, each.candidates[0][:1]) for each in chosen])
    base.completion_logits(batch, prefix)
    mask = batch["attention_mask"].bool()
    if base.family.kind == "decoder":
        mask &= batch["labels"] == -100
    return mask, torch.arange(len(chosen))


def _over_tokens(gates: Tensor, mask: Tensor) -> Tensor:
    """The mean gate of each text `[texts, prefix]`, of one for each text or token."""
    gates = gates.expand(len(mask), -1, -1)
    if gates.shape[1] != mask.shape[1]:  # one for each text, or the one token that a decoder begins with
        return gates.mean(1)
    weight = mask.to(gates)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
    return (weight[:, None] @ gates)[:, 0]


def _factor(prefix: Prefix, site: Site) -> Tensor | float:
    """λ, which is multiplied into the keys and values, and the mass of each slot."""
    recorded = (prefix.metadata.get("gates") or {}).get("values") or {}
    scale = float((recorded.get(str(site)) or {}).get("layer", 1.0))
    mass = prefix.sites[site].log_mass
    return scale if mass is None else scale * mass.detach().float().cpu().exp()


def _text(example: Labelled | Tagged) -> str:
    """What is read of a row, for people."""
    if isinstance(example, Tagged):
        return " ".join(example.words)
    return " | ".join(" / ".join(text) for text in example.texts)


def _stage(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


# What the gates tell


def _told(plain: Explanation, means: Numbers, slots: list[Numbers], samples: int, seed: int) -> dict[str, Any]:
    """How telling layers, slots and the model's own probability are, beside what chance gives."""
    right = np.array([row.right for row in plain.rows])
    known = np.array([[row.probability, row.tokens] for row in plain.rows], dtype=np.float64)
    yardsticks = _tellings(["probability", "tokens"], known, right, samples, seed)
    layers = _tellings(plain.sites, means, right, samples, seed)
    every, widths = np.concatenate(slots, axis=1), [each.shape[1] for each in slots]
    order = np.argsort(-np.abs(aurocs(every, right) - 0.5), kind="stable")[:_BEST_SLOTS]
    names = [f"{site} slot {k}" for site, width in zip(plain.sites, widths, strict=True) for k in range(width)]
    generator = np.random.default_rng(seed)
    clear = []
    for control in range(_CONTROLS):
        dealt = generator.permutation(right)
        clear.append(sum(each.clear for each in _tellings(plain.sites, means, dealt, samples, seed + 1 + control)))
    return {
        "layers": layers,
        "slots": _tellings([names[k] for k in order], every[:, order], right, samples, seed),
        "probability": yardsticks[0],
        "tokens": yardsticks[1],
        "clear_by_chance": float(np.mean(clear)),
        "layer_chance": _chance_of_best(means, right, seed),
        "layer_chance_at_length": _chance_of_best(means, right, seed, _like_lengths(known[:, 1])),
        "slot_chance": _chance_of_best(every, right, seed),
        "slot_aurocs": [each.tolist() for each in np.split(aurocs(every, right), np.cumsum(widths)[:-1])],
    }  # fmt: skip


def _tellings(names: Sequence[str], features: Numbers, right: Any, samples: int, seed: int) -> list[Telling]:
    points = aurocs(features, right)
    low, high = intervals(bootstrap_aurocs(features, right, samples, seed), points)
    columns = (points, low, high, features[right].mean(0), features[~right].mean(0))
    return [Telling(name, *map(float, row)) for name, row in zip(names, zip(*columns, strict=True), strict=True)]


def _chance_of_best(features: Numbers, right: Any, seed: int, groups: Numbers | None = None) -> float:
    """The share of random labels, these among them, whose most telling feature is as far from what chance expects."""
    random = permuted_aurocs(features, right, _PERMUTATIONS, seed, groups)
    expected = 0.5 if groups is None else random.mean(0)
    here = np.abs(aurocs(features, right) - expected).max()
    return float((1 + (np.abs(random - expected).max(axis=1) >= here - 1e-12).sum()) / (1 + _PERMUTATIONS))


def _like_lengths(lengths: Numbers) -> Numbers:
    """Which of ten groups of rows of like length each row is in; rows of one length are together."""
    ends = np.quantile(lengths, np.linspace(0, 1, 11)[1:-1])
    return np.searchsorted(ends, lengths, side="left").astype(np.float64)


def _shown(each: Telling) -> str:
    return f"{each.auroc:.2f} [{each.low:.2f}, {each.high:.2f}]"


def _share(share: float) -> str:
    return "less than 1 %" if share < 0.01 else f"{100 * share:.0f} %"


def _verdict(chance: float) -> str:
    if chance < 0.01:
        return "more than chance explains."
    return "a hint, no more." if chance < 0.05 else "it may well be chance."
