"""What the papers measured, beside which a study's own figures are read.

Prefix-Tuning: Li & Liang 2021, arXiv:2101.00190v1, tables 1 to 4, with gpt2-medium (table-to-text) and bart-large
(XSum), trained on all rows. `revised` are the figures of the version at ACL 2021, where they differ.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Published", "published_for"]


class Published(NamedTuple):
    """Figures of one method, by metric, as they stand in the paper."""

    method: str
    test: str
    scores: dict[str, float]
    revised: dict[str, float]


def _e2e(method: str, figures: tuple[float, ...], revised: tuple[float, ...] = ()) -> Published:
    names = ("bleu", "nist", "meteor", "rouge_l_coco", "cider")
    return Published(method, "test", dict(zip(names, figures, strict=True)), dict(zip(names, revised, strict=False)))


def _webnlg(method: str, seen: float, unseen: float, whole: float, revised: tuple[float, ...] = ()) -> list[Published]:
    new = revised or (None,) * 3
    return [
        Published(method, test, {"bleu_webnlg": score}, {} if other is None else {"bleu_webnlg": other})
        for test, score, other in zip(
            ("webnlg-seen", "webnlg-unseen", "webnlg"), (seen, unseen, whole), new, strict=True
        )
    ]


def _xsum(method: str, test: str, *figures: float) -> Published:
    return Published(method, test, dict(zip(("rouge_1", "rouge_2", "rouge_l"), figures, strict=True)), {})


_TABLES: dict[str, list[Published]] = {
    "e2e": [
        _e2e("full", (68.2, 8.62, 46.2, 71.0, 2.47), (68.8, 8.71, 46.1, 71.1, 2.43)),
        _e2e("top2", (68.1, 8.59, 46.0, 70.8, 2.41)),
        _e2e("adapter 3 %", (68.9, 8.71, 46.1, 71.3, 2.47)),
        _e2e("adapter 0.1 %", (66.3, 8.41, 45.0, 69.8, 2.40)),
        _e2e("prefix", (69.7, 8.81, 46.1, 71.4, 2.49), (70.3, 8.82, 46.3, 72.1, 2.46)),
    ],
    "webnlg": [
        *_webnlg("full", 64.2, 27.7, 46.5, (64.7, 26.7, 45.7)),
        *_webnlg("top2", 53.6, 18.9, 36.0),
        *_webnlg("adapter 3 %", 60.4, 48.3, 54.9, (60.5, 47.9, 54.8)),
        *_webnlg("adapter 0.1 %", 54.5, 45.1, 50.2),
        *_webnlg("prefix", 62.9, 45.6, 55.1, (62.9, 45.3, 55.0)),
    ],
    "xsum": [
        _xsum("full", "news-to-sports", 38.15, 15.51, 30.26),
        _xsum("prefix", "news-to-sports", 39.23, 16.74, 31.51),
        _xsum("full", "within-news", 39.20, 16.35, 31.15),
        _xsum("prefix", "within-news", 39.41, 16.87, 31.47),
    ],
}  # fmt: skip


def published_for(task: str) -> list[Published]:
    """What Prefix-Tuning published on a task; nothing for most. BBC headlines stand for its splits of XSum.

    >>> published_for("e2e")[-1].scores["bleu"], published_for("dialogsum")
    (69.7, [])
    """
    name = "xsum" if task.startswith("bbc") else task.partition("-")[0]
    return _TABLES.get(name, [])
