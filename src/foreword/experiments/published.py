"""What the papers measured, beside which a study's own figures are read.

Prefix-Tuning: Li & Liang 2021, arXiv:2101.00190v1, tables 1 to 4, trained on all rows: gpt2-medium and gpt2-large for
table-to-text, bart-large for XSum. `revised` are the figures of the version at ACL 2021, where they differ. Fractions
of the paper, such as METEOR .45 and TER .33, are in percent here, as `foreword.metrics` has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from foreword.experiments.results import Cell

__all__ = ["Published", "beside", "published_for"]

_MEDIUM, _LARGE, _BART = "gpt2-medium", "gpt2-large", "bart-large"
_E2E = ("bleu", "nist", "meteor", "rouge_l_coco", "cider")
_DART = ("bleu_dart", "meteor_webnlg", "ter_webnlg", "moverscore", "bertscore", "bleurt")
_XSUM = ("rouge_1", "rouge_2", "rouge_l")
_CATEGORIES = ("webnlg-seen", "webnlg-unseen", "webnlg")

Figures = Sequence[float]


class Published(NamedTuple):
    """Figures of one method on the test rows of a task, by metric; `options` are those of the method that matter."""

    method: str
    base: str
    test: str
    scores: Mapping[str, float]
    revised: Mapping[str, float]
    options: Mapping[str, float]

    def told(self, metric: str) -> str:
        """A figure, with the revised one in brackets where it differs; "" for none."""
        value, other = self.scores.get(metric), self.revised.get(metric)
        if value is None:
            return ""
        return f"{value:g}" if other is None or other == value else f"{value:g} ({other:g})"

    @property
    def said(self) -> str:
        """The options in words."""
        return ", ".join(f"{100 * v:g} %" if name == "share" else f"{name} {v:g}" for name, v in self.options.items())


def _row(
    test: str, names: Sequence[str], method: str, figures: Figures, revised: Figures = (), base: str = _MEDIUM,
    **options: float,
) -> Published:  # fmt: skip
    return Published(
        method, base, test, dict(zip(names, figures, strict=True)), dict(zip(names, revised, strict=False)), options
    )


def _webnlg(
    method: str, bleu: Figures, meteor: Figures, ter: Figures, revised: Sequence[Figures] = (), base: str = _MEDIUM,
    **options: float,
) -> list[Published]:  # fmt: skip
    """Three figures of each metric: of seen categories, of unseen ones, and of all."""
    names = ("bleu_webnlg", "meteor_webnlg", "ter_webnlg")
    old, new = list(zip(bleu, meteor, ter, strict=True)), list(zip(*revised, strict=True)) or [()] * 3
    return [
        _row(test, names, method, old[place], new[place], base, **options) for place, test in enumerate(_CATEGORIES)
    ]


_TABLES: dict[str, list[Published]] = {
    "e2e": [
        _row("e2e", _E2E, "full", (68.2, 8.62, 46.2, 71.0, 2.47), (68.8, 8.71, 46.1, 71.1, 2.43)),
        _row("e2e", _E2E, "top2", (68.1, 8.59, 46.0, 70.8, 2.41)),
        _row("e2e", _E2E, "adapter", (68.9, 8.71, 46.1, 71.3, 2.47), share=0.03),
        _row("e2e", _E2E, "adapter", (66.3, 8.41, 45.0, 69.8, 2.40), share=0.001),
        _row("e2e", _E2E, "prefix", (69.7, 8.81, 46.1, 71.4, 2.49), (70.3, 8.82, 46.3, 72.1, 2.46)),
        _row("e2e", _E2E, "embedding", (48.1, 3.33, 32.1, 60.2, 1.10), length=1),
        _row("e2e", _E2E, "embedding", (62.2, 6.70, 38.6, 66.4, 1.75), length=10),
        _row("e2e", _E2E, "embedding", (61.9, 7.11, 39.3, 65.6, 1.85), length=20),
        _row("e2e", _E2E, "infix", (67.9, 8.63, 45.8, 69.4, 2.42), length=1),
        _row("e2e", _E2E, "infix", (67.2, 8.48, 45.8, 69.9, 2.40), length=10),
        _row("e2e", _E2E, "infix", (66.7, 8.47, 45.8, 70.0, 2.42), length=20),
        _row("e2e", _E2E, "full", (68.5, 8.78, 46.0, 69.9, 2.45), base=_LARGE),
        _row("e2e", _E2E, "prefix", (70.3, 8.85, 46.2, 71.7, 2.47), base=_LARGE),
    ],
    "webnlg": [
        *_webnlg(
            "full", (64.2, 27.7, 46.5), (45, 30, 38), (33, 76, 53), ((64.7, 26.7, 45.7), (46, 30, 38), (33, 78, 54))
        ),
        *_webnlg("top2", (53.6, 18.9, 36.0), (38, 23, 31), (49, 99, 72)),
        *_webnlg(
            "adapter", (60.4, 48.3, 54.9), (43, 38, 41), (35, 45, 39), ((60.5, 47.9, 54.8), (43, 38, 41), (35, 46, 39)),
            share=0.03,
        ),
        *_webnlg("adapter", (54.5, 45.1, 50.2), (39, 36, 38), (40, 46, 43), share=0.001),
        *_webnlg(
            "prefix", (62.9, 45.6, 55.1), (44, 38, 41), (35, 49, 41), ((62.9, 45.3, 55.0), (44, 37, 41), (35, 51, 42))
        ),
        *_webnlg("full", (65.3, 43.1, 55.5), (46, 38, 42), (33, 53, 42), base=_LARGE),
        *_webnlg("prefix", (63.4, 47.7, 56.3), (45, 39, 42), (34, 48, 40), base=_LARGE),
    ],
    "dart": [
        _row("dart", _DART, "full", (46.2, 39, 46, 50, 94, 39)),
        _row("dart", _DART, "top2", (41.0, 34, 56, 43, 93, 21)),
        _row("dart", _DART, "adapter", (45.2, 38, 46, 50, 94, 39), share=0.03),
        _row("dart", _DART, "adapter", (42.4, 36, 48, 47, 94, 33), share=0.001),
        _row("dart", _DART, "prefix", (46.4, 38, 46, 50, 94, 39)),
        _row("dart", _DART, "full", (47.0, 39, 46, 51, 94, 40), base=_LARGE),
        _row("dart", _DART, "prefix", (46.7, 39, 45, 51, 94, 40), base=_LARGE),
    ],
    "xsum": [
        _row("xsum", _XSUM, "full", (45.14, 22.27, 37.25), base=_BART),
        _row("xsum", _XSUM, "prefix", (43.80, 20.93, 36.05), base=_BART, share=0.02),
        _row("xsum", _XSUM, "prefix", (42.92, 20.03, 35.05), base=_BART, share=0.001),
        _row("xsum-news-to-sports", _XSUM, "full", (38.15, 15.51, 30.26), base=_BART),
        _row("xsum-news-to-sports", _XSUM, "prefix", (39.23, 16.74, 31.51), base=_BART),
        _row("xsum-within-news", _XSUM, "full", (39.20, 16.35, 31.15), base=_BART),
        _row("xsum-within-news", _XSUM, "prefix", (39.41, 16.87, 31.47), base=_BART),
    ],
}  # fmt: skip


def published_for(task: str) -> list[Published]:
    """What Prefix-Tuning published on a task; nothing for most. BBC headlines stand for its splits of XSum.

    >>> published_for("e2e")[4].told("bleu"), published_for("dialogsum")
    ('69.7 (70.3)', [])
    """
    name = "xsum" if task.startswith("bbc") else task.partition("-")[0]
    return _TABLES.get(name, [])


def beside(cell: Cell, test: str, metric: str) -> Published | None:
    """The figure to be read beside that of a cell: of its method, on the same test rows, by the same metric.

    That of the smaller base model, which is nearer to those that studies are made with. Of a method in several forms
    only the usual one has a figure that does not say which form it is of.
    """
    own = cell.tested(test)
    for each in published_for(own):
        fits = each.method == cell.config.get("method") and each.test == own and metric in each.scores
        if fits and cell.usual(each.options) and all(cell.option(name) == v for name, v in each.options.items()):
            return each
    return None
