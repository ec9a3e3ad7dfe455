"""Probing: how far the gates of a prefix are open over a data set, and how much each slot matters to the loss.

Two numbers for each slot:

* its **gate** λ·α, the mean over rows and the spread; what the paper probes with (APT, arXiv 2305.15212, figure 2);
* its **importance**, the mean over rows of |∂loss/∂log g| of a `mass` gate g, at g = 1, where the prefix is as it is:
  to first order, the nats by which a row's loss changes when the slot alone is removed. Source: Michel et al. 2019,
  arXiv 1905.10650, which takes the absolute value of each row's own gradient, so that rows do not cancel.

Rows are read one by one: each has a gradient of its own, and no mean counts padding. Both numbers are also taken from
two random halves of the rows, and how far the halves agree says whether there is more in them than noise.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foreword.base import BaseModel
from foreword.data import Rows
from foreword.errors import ConfigError, DataError, PrefixError
from foreword.evaluate import objective_for
from foreword.frozen import frozen_training
from foreword.gates import masked_mean
from foreword.objectives import HeadOptions, Objective, objective_of
from foreword.prefix import Prefix, Site, SiteTensors
from foreword.runs import is_run, provenance
from foreword.storage import write_atomic
from foreword.tasks import Split, Task, get_task

__all__ = [
    "PROBE", "RANKINGS", "Agreement", "Probe", "SiteProbe", "beside", "draw", "fold_gates", "mean_gates",
    "probe", "saved_probe",
]  # fmt: skip

Progress = Callable[[int, int], None]

PROBE = "probe.json"
RANKINGS = ("importance", "gates")
# Halves that agree less than this say that the numbers are mostly noise.
_AGREED = 0.5


@dataclass(frozen=True)
class SiteProbe:
    """What was found at one site, a number for each of its slots.

    `gates` are the means over rows of λ·α (and of the mass, where the prefix has one), `spread` their standard
    deviations; both are None for a prefix without gates. `layer` is λ, None where there is none. `importance` is in
    nats per row.
    """

    importance: list[float]
    gates: list[float] | None = None
    spread: list[float] | None = None
    layer: float | None = None


class Agreement(NamedTuple):
    """How alike two halves of the rows rank all slots.

    `correlation` is Spearman's, None where all slots are equal. `top_half` is the share of the better half of the slots
    that both halves of the rows name; chance is 0.5.
    """

    correlation: float | None
    top_half: float


@dataclass(frozen=True)
class Probe:
    """What a probe found, and of what: JSON-able, and tied to the prefix by the hash of its tensors.

    `nats_per_row` is the loss that the importance is about. `agreement` has an entry for `importance`, and one for
    `gates` where there are any. `limit` and `seed` say which rows were read and how they were halved.
    """

    base: str
    prefix_sha256: str
    task: str
    split: str
    data_sha256: str
    rows: int
    limit: int | None
    seed: int
    nats_per_row: float
    sites: dict[Site, SiteProbe]
    agreement: dict[str, Agreement]
    record: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def has_gates(self) -> bool:
        """Whether the prefix has gates."""
        return any(site.gates is not None for site in self.sites.values())

    def scores(self, by: str = "importance") -> dict[Site, Tensor]:
        """What slots are ranked by, `[prefix]` per site: their importance, or how large their gates are.

        Raises `ConfigError` for another ranking, and for the gates of a prefix that has none.
        """
        if by not in RANKINGS:
            raise ConfigError(f"ranking {by!r}", " or ".join(RANKINGS), "choose one of them")
        if by == "importance":
            return {site: torch.tensor(e.importance, dtype=torch.float64) for site, e in self.sites.items()}
        if not self.has_gates:
            raise ConfigError(
                "a ranking by the gates of a prefix without gates",
                "a prefix with gates",
                "train it with --gates, or rank by importance",
            )
        return {site: torch.tensor(e.gates or [], dtype=torch.float64).abs() for site, e in self.sites.items()}

    def agreements(self) -> list[str]:
        """A line for each number: how far two halves of the rows agree on it."""
        lines = []
        for name, halves in self.agreement.items():
            shown = "all equal" if halves.correlation is None else f"{halves.correlation:.2f}"
            top = f"{100 * halves.top_half:.0f} % of the better half in common"
            lines.append(f"{name}: rank correlation of two halves {shown}, {top}")
        return lines

    def warnings(self) -> list[str]:
        """A line for each number that says little: halves of the rows do not agree on it, or all slots are equal."""
        lines = []
        for name, each in self.agreement.items():
            if each.correlation is None:
                lines.append(f"the {name} of all slots is the same: there is nothing to rank by")
            elif each.correlation < _AGREED:
                agreed = f"two halves of the rows hardly agree on the {name} of the slots ({each.correlation:.2f})"
                lines.append(f"{agreed}: read it as noise, or probe more rows")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = asdict(self)
        plain["sites"] = {str(site): asdict(each) for site, each in self.sites.items()}
        plain["agreement"] = {name: each._asdict() for name, each in self.agreement.items()}
        return plain

    def save(self, folder: str | Path) -> None:
        """Write `probe.json` into a folder."""
        write_atomic(Path(folder) / PROBE, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Probe:
        """Read what `save` wrote; `DataError` if there is none or something else."""
        path = Path(folder) / PROBE
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            plain["sites"] = {Site.parse(name): SiteProbe(**each) for name, each in plain["sites"].items()}
            plain["agreement"] = {name: Agreement(**each) for name, each in plain["agreement"].items()}
            return cls(**plain)
        except OSError as error:
            raise DataError(
                f"cannot read {path} ({error.strerror})", "what foreword probe wrote", "probe the prefix first"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{path} holds no probe", "what foreword probe wrote", "probe the prefix again") from None


def probe(
    base: BaseModel,
    prefix: Prefix,
    task: Task | str,
    split: str = "dev",
    *,
    limit: int | None = None,
    strict: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Probe:
    """Read the gates and the importance of every slot of `prefix` over the first `limit` rows of a split.

    The split should be one that the prefix was not trained on. A prefix without gates has importance alone. The rows
    are halved by `seed`. Raises `ConfigError`, `DataError` (fewer than two usable rows), `PrefixError`,
    `PrefixMismatch`, `UnsupportedModel`.

    >>> import foreword as fw
    >>> base = fw.BaseModel.load("minilm")  # doctest: +SKIP
    >>> found = probe(base, fw.Prefix.load("runs/rte/prefix", base), "rte")  # doctest: +SKIP
    >>> found.agreement["importance"].correlation  # doctest: +SKIP
    """
    objective, data, rows = _prepared(base, prefix, task, split, limit, strict)
    if len(rows) < 2:
        raise DataError(f"{len(rows)} usable row of {split}", "at least two, one for each half", "probe more rows")
    read = _read(objective, rows, prefix, True, progress)
    gates = _effective(prefix, read.alphas, len(rows))
    halves = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).chunk(2)
    found = {"importance": read.importance, **({} if gates is None else {"gates": gates})}
    sites = {}
    for site in prefix.sites:
        own = None if gates is None else gates[site].double()
        sites[site] = SiteProbe(
            read.importance[site].double().mean(0).tolist(),
            None if own is None else own.mean(0).tolist(),
            None if own is None else own.sub(own.mean(0)).square().mean(0).sqrt().tolist(),
            _recorded(prefix, site).get("layer"),
        )
    return Probe(
        base=base.name, prefix_sha256=prefix.sha256(), task=objective.task.name, split=split,
        data_sha256=data.sha256, rows=len(rows), limit=limit, seed=seed, nats_per_row=read.nats / len(rows),
        sites=sites, agreement={name: _agreement(each, *halves) for name, each in found.items()},
        record=provenance(base.device),
    )  # fmt: skip


def mean_gates(
    base: BaseModel,
    prefix: Prefix,
    task: Task | str,
    split: str = "dev",
    *,
    limit: int | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> dict[Site, Tensor]:
    """The means of α `[prefix]` over the rows of a split, at the sites whose gates read the text.

    Errors as for `probe`.
    """
    if not any(tensors.gate is not None for tensors in prefix.sites.values()):
        return {}
    objective, _, rows = _prepared(base, prefix, task, split, limit, strict)
    return {site: each.mean(0) for site, each in _read(objective, rows, prefix, False, progress).alphas.items()}


def fold_gates(prefix: Prefix, means: Mapping[Site, Tensor]) -> Prefix:
    """Plain keys and values: gates that read the text are replaced by these `means` `[prefix]` per site.

    The function changes unless the gates do not vary; plain key/value servers can carry nothing else. Slots of mass 0
    are cut, which is exact; another mass has no place in keys and values and is a `PrefixError`.

    >>> from foreword.prefix import Gate
    >>> gate = Gate(torch.zeros(8, 2), "mean")
    >>> prefix = Prefix({Site("encoder", 0): SiteTensors(torch.ones(1, 2, 4), torch.ones(1, 2, 4), None, gate)}, "", "")
    >>> fold_gates(prefix, {Site("encoder", 0): torch.tensor([0.5, 1.0])}).sites[Site("encoder", 0)].keys[0, :, 0]
    tensor([0.5000, 1.0000])
    """
    sites = {site: _folded(site, tensors, means.get(site)) for site, tensors in prefix.sites.items()}
    dropped = ("gates", "parametrization", "metrics")
    metadata = {name: value for name, value in prefix.metadata.items() if name not in dropped}
    return replace(prefix, sites=sites, metadata=metadata, training_state=None)


def draw(found: Probe, folder: str | Path) -> None:
    """Write the heat maps, layers × slots, as `heatmap.html` and as `heatmap.png`.

    Raises `MissingPackage` where the image cannot be drawn; the page is then written all the same.
    """
    from foreword.plots import heatmap_html, heatmap_png

    title = f"{found.task} {found.split}, {found.rows} rows, {found.base}"
    maps = _maps(found)
    heatmap_html(Path(folder) / "heatmap.html", maps, title=title, lines=[*found.agreements(), *found.warnings()])
    heatmap_png(Path(folder) / "heatmap.png", maps, title=title)


def saved_probe(
    folder: str | Path, prefix: Prefix, task: str | None, split: str, limit: int | None = None
) -> Probe | None:
    """What an earlier probe of this very prefix found on a split, as a folder has it; None if there is none.

    With `limit` it has to be of so many rows.
    """
    if not (Path(folder) / PROBE).is_file():
        return None
    found = Probe.load(folder)
    fits = (found.prefix_sha256, found.task, found.split) == (prefix.sha256(), task, split)
    return found if fits and limit in (None, found.limit) else None


def beside(path: str | Path, name: str) -> Path:
    """The place for what belongs to a prefix: in its run folder, else a folder beside it.

    >>> beside("prefixes/e2e", "probe").as_posix()
    'prefixes/e2e-probe'
    """
    path = Path(path)
    return path / name if is_run(path) else path.with_name(f"{path.name}-{name}")


# Reading


class _Read(NamedTuple):
    """α and importance of every row, `[rows, prefix]` per site, and the nats of all rows."""

    alphas: dict[Site, Tensor]
    importance: dict[Site, Tensor]
    nats: float


def _prepared(
    base: BaseModel, prefix: Prefix, task: Task | str, split: str, limit: int | None, strict: bool
) -> tuple[Objective, Split, Rows]:
    """The rows of a split and what reads them; nothing is dropped."""
    task = get_task(task) if isinstance(task, str) else task
    prefix.check_base(base.name, base.fingerprint, base.geometry, base.hidden_sizes)
    known = objective_for(base, prefix, task)
    tokens = prefix.metadata.get("max_tokens", HeadOptions.max_tokens)
    dropless = HeadOptions(dropout=0.0, max_tokens=tokens)
    objective = known if known.head is None else objective_of(base, task, dropless, prefix.head)
    data = task.split(split, limit=limit, strict=strict)
    return objective, data, objective.encode(data, strict=strict)


def _read(objective: Objective, rows: Rows, prefix: Prefix, importance: bool, progress: Progress | None) -> _Read:
    """One pass for each row, and with `importance` one back."""
    base = objective.base
    sites = {site: each.map(lambda t: t.detach().to(base.device)) for site, each in prefix.sites.items()}
    masses = {
        site: (each.keys.new_zeros(each.length) if each.log_mass is None else each.log_mass.clone()).requires_grad_()
        for site, each in sites.items()
    }
    read = {site: each._replace(log_mass=masses[site]) for site, each in sites.items()}
    there = [site for site, each in sites.items() if each.length]
    gated = [site for site in there if sites[site].gate is not None]
    alphas, slopes, total = [], [], 0.0
    with frozen_training(base.model), _masks(base.model) as masks, base.attachment.recording_gates() as seen:
        for row in range(len(rows)):
            with torch.set_grad_enabled(importance):
                nats, _ = objective.loss(rows, [row], read)
            if not nats.isfinite():
                raise PrefixError(f"the loss of row {rows.examples[row].row} is {nats.item()}", "a finite loss")
            total += nats.item()
            alphas.append([_row_mean(seen[site], masks[-1]) for site in gated])
            if importance:
                slopes.append([g.abs().cpu() for g in torch.autograd.grad(nats, [masses[site] for site in there])])
            masks.clear()
            if progress is not None:
                progress(row + 1, len(rows))
    none = {site: torch.zeros(len(rows), 0) for site in sites}
    return _Read(_by_site(gated, alphas), {**none, **_by_site(there, slopes)}, total)


def _by_site(sites: list[Site], rows: list[list[Tensor]]) -> dict[Site, Tensor]:
    """`[rows, prefix]` per site, of a list for each row."""
    return {site: torch.stack(each) for site, each in zip(sites, zip(*rows, strict=True), strict=False)}


@contextlib.contextmanager
def _masks(model: nn.Module) -> Iterator[list[Tensor | None]]:
    """Inside, the attention masks that forward passes are given are kept: they tell tokens from padding."""
    seen: list[Tensor | None] = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given.get("attention_mask")), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def _row_mean(alpha: Tensor, mask: Tensor | None) -> Tensor:
    """The mean `[prefix]` of the gates `[texts, tokens or 1, prefix]` of one row's texts, each over its tokens."""
    alpha = alpha.float()
    if mask is None or mask.shape != alpha.shape[:2]:  # one gate for each text, or a single text without padding
        return alpha.mean((0, 1)).cpu()
    return masked_mean(alpha, mask)[:, 0].mean(0).cpu()


# What gates are worth


def _recorded(prefix: Prefix, site: Site) -> dict[str, Any]:
    """λ and the fixed α of a site, which are multiplied in, as the prefix says."""
    gates = prefix.metadata.get("gates") or {}
    row: dict[str, Any] = (gates.get("values") or {}).get(str(site)) or {}
    slots = row.get("slots")
    if slots is not None and len(slots) != prefix.sites[site].length:
        raise PrefixError(
            f"the prefix records {len(slots)} gates at {site}, which has {prefix.sites[site].length} slots",
            "one for each slot", "train it again",
        )  # fmt: skip
    return row


def _effective(prefix: Prefix, alphas: Mapping[Site, Tensor], rows: int) -> dict[Site, Tensor] | None:
    """λ·α·g of every row, `[rows, prefix]` per site; None for a prefix without any gate."""
    found, gated = {}, False
    static = (prefix.metadata.get("gates") or {}).get("kind") == "static"  # masses are in the tensors
    for site, tensors in prefix.sites.items():
        recorded = _recorded(prefix, site)
        value = alphas.get(site, torch.ones(rows, tensors.length)) * recorded.get("layer", 1.0)
        if static and "slots" in recorded:
            value = value * torch.tensor(recorded["slots"])
        if tensors.log_mass is not None:
            value = value * tensors.log_mass.detach().float().cpu().exp()
        gated = gated or bool(recorded) or tensors.gate is not None or tensors.log_mass is not None
        found[site] = value
    return found if gated else None


def _folded(site: Site, tensors: SiteTensors, mean: Tensor | None) -> SiteTensors:
    if tensors.log_mass is not None:
        for slot, mass in enumerate(tensors.log_mass.exp().tolist()):
            if mass not in (0.0, 1.0):
                raise PrefixError(
                    f"slot {slot} at {site} has mass {mass:.3g}, which keys and values cannot hold", "mass 0 or 1",
                    "serve it with Foreword, or prune it and train on without mass gates",
                )  # fmt: skip
        there = tensors.log_mass == 0
        tensors, mean = tensors.keep(there)._replace(log_mass=None), None if mean is None else mean[there.to("cpu")]
    if tensors.gate is None or not tensors.length:
        return tensors.map(lambda t: t.detach().clone())._replace(gate=None)
    if mean is None or mean.shape != (tensors.length,):
        got = "no mean" if mean is None else f"{len(mean)} means"
        raise PrefixError(f"{got} for the {tensors.length} gates at {site}", "one for each", "take them of this prefix")
    factor = mean.to(tensors.keys)[:, None]
    return SiteTensors(tensors.keys.detach() * factor, tensors.values.detach() * factor)


# Agreement


def _agreement(found: Mapping[Site, Tensor], first: Tensor, second: Tensor) -> Agreement:
    rows = torch.cat(list(found.values()), dim=1).double()
    one, other = (rows[half].mean(0) for half in (first, second))
    top = max(1, len(one) // 2)
    better = [set(each.argsort(descending=True, stable=True)[:top].tolist()) for each in (one, other)]
    return Agreement(_spearman(one, other), len(better[0] & better[1]) / top)


def _spearman(one: Tensor, other: Tensor) -> float | None:
    """Spearman's correlation of two lists of numbers, None where one of them is constant.

    >>> _spearman(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.1, 0.2, 0.3]))
    1.0
    """
    ranks = torch.stack([_ranks(one), _ranks(other)])
    centred = ranks - ranks.mean(1, keepdim=True)
    norms = centred.norm(dim=1)
    if not bool((norms > 0).all()):
        return None
    return round(float(centred[0] @ centred[1] / (norms[0] * norms[1])), 6)


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 1; equal values share the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


# Drawing


def _maps(found: Probe) -> list[dict[str, Any]]:
    """The heat maps as `foreword.plots` takes them, the most telling first."""
    sites = found.sites.values()
    total = sum(sum(each.importance) for each in sites) or 1.0
    named: list[tuple[str, str, list[list[float]], list[list[str]]]] = []
    if found.has_gates:
        gates, spread = [each.gates or [] for each in sites], [each.spread or [] for each in sites]
        named.append(("Gates", "mean of λ·α over rows", gates, [[f"± {v:.3g}" for v in row] for row in spread]))
        named.append(("Spread of the gates", "standard deviation of λ·α over rows", spread, []))
    shares = [[100 * value / total for value in each.importance] for each in sites]
    nats = [[f"{value:.3g} nats per row" for value in each.importance] for each in sites]
    named.append(("Importance", "|∂loss/∂log g|, % of all slots", shares, nats))
    columns = [str(slot) for slot in range(max(map(len, shares), default=0))]
    rows = [str(site) for site in found.sites]
    return [
        {
            "title": title, "value_label": label, "row_labels": rows, "column_labels": columns,
            "values": [[*row, *[None] * (len(columns) - len(row))] for row in values], "details": details or None,
        }
        for title, label, values, details in named
    ]  # fmt: skip
