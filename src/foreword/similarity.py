"""How alike the gate patterns of prefixes are: which layers, and which slots, each of them opens.

A pattern is the effective gate λ·α of every slot, for gates of the text its mean over rows. Its **layer profile** is
the mean over the slots of each layer; two profiles are compared by Pearson's correlation. Slot by slot, patterns are
compared by the cosine of the centred patterns; but the slots of prefixes that were trained apart have no common order,
so that only the layer profile compares what is comparable.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foreword.artifact import load_prefix
from foreword.compare import seed_folders, short_names
from foreword.errors import ConfigError, PrefixError
from foreword.pages import bullets, heatmap, save_page
from foreword.plots import heatmap_png
from foreword.prefix import Prefix, Site
from foreword.probe import PROBE, Probe, beside
from foreword.runs import find_prefix, is_run
from foreword.storage import write_atomic

__all__ = ["Pattern", "Similarity", "draw_similarity", "gate_pattern", "similarity"]

Matrix = list[list[float | None]]

NO_ORDER = (
    "slots of prefixes that were trained apart have no common order: compare layer profiles, and slots only of "
    "prefixes with one beginning"
)


@dataclass(frozen=True)
class Pattern:
    """The effective gates of a prefix: for each site, in order, a number for each of its slots.

    `source` says whence: `probe`, the means over the rows of a probe, or `prefix`, which records gates that do not
    read the text.
    """

    name: str
    task: str
    source: str
    gates: dict[Site, list[float]]

    @property
    def profile(self) -> list[float]:
        """The mean gate of every layer, 0 where it has no slots."""
        return [float(np.mean(row)) if row else 0.0 for row in self.gates.values()]


@dataclass(frozen=True)
class Similarity:
    """The patterns and how alike they are, by layer and by slot; None where that is not defined.

    `chance` is the correlation that 1 in 20 pairs of unrelated profiles of so many layers exceed, either way; None for
    fewer than four layers.
    """

    patterns: list[Pattern]
    by_layer: Matrix
    by_slot: Matrix
    chance: float | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        first = self.patterns[0]
        return {
            "names": [each.name for each in self.patterns],
            "tasks": [each.task for each in self.patterns],
            "sources": [each.source for each in self.patterns],
            "sites": [str(site) for site in first.gates],
            "layer_profiles": [each.profile for each in self.patterns],
            "by_layer": self.by_layer, "by_slot": self.by_slot, "chance": self.chance, "notes": self.notes,
        }  # fmt: skip


def similarity(paths: Sequence[str | Path]) -> Similarity:
    """How alike the gate patterns of these runs and prefixes are; a folder of several seeds stands for each of them.

    Gates of the text have to be probed first. Raises `ConfigError` for fewer than two patterns and for patterns of
    different sites, `PrefixError` for a prefix without gates, `DataError` without a probe.
    """
    every: list[tuple[str, Path]] = []
    for path, name in zip(map(Path, paths), short_names(paths), strict=True):
        seeds = [] if is_run(path) else seed_folders(path)
        every += [(f"{name}/{folder.name}", folder) for folder in seeds] or [(name, path)]
    if len(every) < 2:
        raise ConfigError(f"{len(every)} gate pattern", "at least two", "name more runs")
    return compare_patterns([gate_pattern(path, name) for name, path in every])


def compare_patterns(patterns: Sequence[Pattern]) -> Similarity:
    """The matrices of patterns of the same sites.

    >>> one = Pattern("a", "", "prefix", {Site("encoder", k): [g, g] for k, g in enumerate([0.1, 0.5, 0.9])})
    >>> other = Pattern("b", "", "prefix", {Site("encoder", k): [g] for k, g in enumerate([0.9, 0.5, 0.1])})
    >>> found = compare_patterns([one, other])
    >>> found.by_layer[0][1], found.by_slot[0][1]
    (-1.0, None)
    """
    first, notes = patterns[0], [NO_ORDER]
    for other in patterns[1:]:
        if list(other.gates) != list(first.gates):
            raise ConfigError(
                f"{other.name} has {_sites(other)}, {first.name} {_sites(first)}", "prefixes of like base models",
                "compare those of one base model",
            )  # fmt: skip
    lengths = [[len(row) for row in each.gates.values()] for each in patterns]
    if any(each != lengths[0] for each in lengths):
        notes.append("prefixes of different lengths are not compared slot by slot")
    flat = [[gate for row in each.gates.values() for gate in row] for each in patterns]
    constant = [each.name for each in patterns if _correlation(each.profile, each.profile) is None]
    if constant:
        notes.append(f"all layers are alike in {', '.join(constant)}: no correlation")
    layers = len(first.gates)
    chance = math.tanh(1.959964 / math.sqrt(layers - 3)) if layers > 3 else None
    if chance is not None:
        notes.append(
            f"of unrelated profiles of {layers} layers, 1 pair in 20 has a correlation beyond ±{chance:.2f} "
            "(if layers were independent; neighbours are not, so that it takes more)"
        )
    by_layer = [[_correlation(one.profile, other.profile) for other in patterns] for one in patterns]
    by_slot = [[_correlation(one, other) for other in flat] for one in flat]
    return Similarity(list(patterns), by_layer, by_slot, chance, notes)


def gate_pattern(path: str | Path, name: str = "") -> Pattern:
    """The effective gates of a run or prefix folder: of its probe, or what the prefix records of gates without h.

    Raises `PrefixError` for a prefix without gates, `DataError` for gates of the text that were not probed.
    """
    path = Path(path)
    prefix = load_prefix(find_prefix(path))
    task = str(prefix.metadata.get("task") or "")
    name = name or path.name
    if all(tensors.gate is None for tensors in prefix.sites.values()):
        return Pattern(name, task, "prefix", _recorded(prefix, name))
    folder = beside(path, "probe")
    if not (folder / PROBE).is_file():
        raise PrefixError(f"the gates of {name} depend on the text", "a probe of it", f"foreword probe {path}")
    found = Probe.load(folder)
    if found.prefix_sha256 != prefix.sha256():
        raise PrefixError(f"{folder} is of another prefix", f"a probe of {name}", f"foreword probe {path}")
    return Pattern(name, task, "probe", {site: list(each.gates or []) for site, each in found.sites.items()})


def draw_similarity(found: Similarity, folder: str | Path) -> None:
    """Write `similarity.json`, `similarity.html` and, by layer, `similarity.png`.

    Raises `MissingPackage` where the image cannot be drawn; the other two are then written all the same.
    """
    folder = Path(folder)
    names = [each.name for each in found.patterns]
    title = f"How alike the gate patterns of {len(names)} prefixes are"
    labels: dict[str, Any] = {"row_labels": names, "column_labels": names}
    write_atomic(folder / "similarity.json", json.dumps(found.to_dict(), indent=1, ensure_ascii=False) + "\n")
    profiles = heatmap(
        "Mean gate of every layer", [each.profile for each in found.patterns], names,
        [str(site) for site in found.patterns[0].gates], "mean λ·α",
    )  # fmt: skip
    save_page(folder / "similarity.html", title, "\n".join([
        bullets(found.notes),
        heatmap("By layer profile", found.by_layer, **labels, value_label="Pearson's r", reach=1.0),
        profiles,
        heatmap("Slot by slot", found.by_slot, **labels, value_label="cosine of centred patterns", reach=1.0),
    ]))  # fmt: skip
    panel = {"title": "Layer profiles of the gates", "values": found.by_layer, **labels}
    heatmap_png(folder / "similarity.png", [{**panel, "value_label": "Pearson's r", "reach": 1.0}])


def _recorded(prefix: Prefix, name: str) -> dict[Site, list[float]]:
    """The gates that are multiplied into a prefix, or added to its logits as masses."""
    gates: Mapping[str, Any] = prefix.metadata.get("gates") or {}
    values = gates.get("values") or {}
    if not values and all(tensors.log_mass is None for tensors in prefix.sites.values()):
        raise PrefixError(f"{name} has no gates", "a prefix with gates", "train it with --gates apt, static or mass")
    found = {}
    for site, tensors in prefix.sites.items():
        row = values.get(str(site)) or {}
        slots = row.get("slots") if tensors.log_mass is None else tensors.log_mass.exp().tolist()
        layer = row.get("layer", 1.0)
        found[site] = [layer * gate for gate in slots or [1.0] * tensors.length]
    return found


def _correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Pearson's correlation, which is the cosine of the centred lists; None for lists that do not vary or fit."""
    if len(one) != len(other) or not one:
        return None
    centred = [np.asarray(each) - np.mean(each) for each in (one, other)]
    norms = [float(np.linalg.norm(each)) for each in centred]
    if min(norms) <= 1e-12 * max(1.0, *map(abs, one), *map(abs, other)):
        return None
    return round(float(centred[0] @ centred[1]) / (norms[0] * norms[1]), 6)


def _sites(pattern: Pattern) -> str:
    stacks: dict[str, int] = {}
    for site in pattern.gates:
        stacks[site.stack] = stacks.get(site.stack, 0) + 1
    return ", ".join(f"{count} {stack} layers" for stack, count in stacks.items()) or "no layers"
