"""Task `webnlg`: descriptions of DBpedia triples, the WebNLG challenge 2017 (Gardent et al. 2017, W17-3518).

Linearised as in Prefix-Tuning (Li & Liang 2021, arXiv:2101.00190, appendix A.1):
"Aarhus_Airport : cityServed : Aarhus | Aarhus : country : Denmark".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from foreword.errors import ConfigError
from foreword.tasks.generation import GenerationTask, Record, one_line, triples_line
from foreword.tasks.rows import Unusable, row_list, row_text
from foreword.tasks.source import HubSource, Row

__all__ = ["CATEGORIES", "SEEN", "webnlg"]

CATEGORIES = ("all", "seen", "unseen")

# The categories of the training rows. The test rows have five more: Artist, Athlete, CelestialBody,
# MeanOfTransportation, Politician.
SEEN = (
    "Airport", "Astronaut", "Building", "City", "ComicsCharacter", "Food", "Monument", "SportsTeam", "University",
    "WrittenWork",
)  # fmt: skip

_HUB = HubSource(
    repository="webnlg-challenge/web_nlg",
    splits={"train": "train", "dev": "dev", "test": "test"},
    columns={
        "category": "category",
        "modified_triple_sets": "modified_triples",
        "lex": "lexs",
        "test_category": "test_file",
    },
    revision="refs/convert/parquet",
    folder="webnlg_challenge_2017",
)


def webnlg(categories: str = "all") -> GenerationTask:
    """The task `webnlg`: 18,025 training texts; 872 and 1,862 sets of triples with all references.

    `categories` are those of the test rows: `all`, the 971 `seen` in training, or the 891 `unseen`; the task is then
    called `webnlg-seen` or `webnlg-unseen`. Train and dev are the same, all seen. Training texts that are not marked as
    good are left out, as in Prefix-Tuning; five sets of triples have no other. `ConfigError` for other categories.

    >>> webnlg("unseen").name
    'webnlg-unseen'
    """
    if categories not in CATEGORIES:
        raise ConfigError(f"categories {categories!r}", ", ".join(CATEGORIES), "choose one of them")

    def read(row: Row, split: str) -> Record | None:
        seen = row_text(row, "category") in SEEN
        if split == "test" and categories != "all" and seen != (categories == "seen"):
            return None
        return _record(row, split)

    return GenerationTask(
        "webnlg" if categories == "all" else f"webnlg-{categories}",
        read=read,
        instruction="Describe the facts in one or more fluent sentences that state all of them.",
        metrics=("bleu_webnlg", "chrf++"),
        max_new_tokens=100,
        files={split: f"webnlg2017/{split}.parquet" for split in ("train", "dev", "test")},
        hub=_HUB,
        rows=_rows,
        dataset="webnlg",
    )


def _record(row: Row, split: str) -> Record:
    triples = [_parts(triple) for triple in row_list(row, "modified_triples")]
    texts, comments = row_list(row, "lexs"), row_list(row, "lex_comments")
    if len(texts) != len(comments):
        raise Unusable(f"{len(texts)} texts and {len(comments)} comments")
    marked = tuple(zip(map(one_line, texts), comments, strict=True))
    good = tuple(text for text, comment in marked if comment == "good")
    others = tuple(text for text, comment in marked if comment != "good")
    if split == "train" and not good:
        raise Unusable("no text that is marked as good")
    return Record(triples_line(triples), good if split == "train" else good + others)


def _parts(triple: str) -> list[str]:
    parts = triple.split(" | ")
    if len(parts) != 3:
        raise Unusable(f"{triple!r} is no triple (subject | property | object)")
    return parts


def _rows(rows: Iterable[Row], _split: str) -> Iterator[Row]:
    """The rows as the folder has them. The hub's test split is three files: all, a part, and one without texts."""
    for row in rows:
        lexs, sets = row.get("lexs"), row.get("modified_triples")
        if isinstance(lexs, dict) and isinstance(sets, dict):
            if row.get("test_file") not in (None, "", "testdata_with_lex"):
                continue
            triples = sets["mtriple_set"][0] if sets["mtriple_set"] else []
            row = {**row, "modified_triples": triples, "lexs": lexs["text"], "lex_comments": lexs["comment"]}
        yield row
