"""Named entities: `conll04`, `wnut17`, `wikigold`, `bc5cdr`, `wikiann` and `mit_movie`.

CoNLL04 (Roth & Yih 2004, W04-2401; splits of SpERT), WNUT17 (Derczynski et al. 2017, W17-4418), Wikigold (Balasuriya
et al. 2009, W09-3302), BC5CDR (Li et al. 2016, 10.1093/database/baw068), WikiANN's English (Pan et al. 2017, P17-1178;
splits of Rahimi et al. 2019), MIT Movie's trivia10k13 (Liu et al. 2013).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from foreword.tasks.bio import bio_labels, check_tags
from foreword.tasks.dataset import DatasetTask
from foreword.tasks.rows import Unusable, row_list
from foreword.tasks.source import HubSource, Row
from foreword.tasks.task import Tagged

__all__ = ["NER", "TaggingTask", "ner"]


class TaggingTask(DatasetTask):
    """Sentences as lists of words and tags, in the columns `tokens` and `tags`; any scheme of tags becomes BIO."""

    kind = "tagging"

    def example(self, row: Row, name: str, number: int) -> Tagged | None:
        """The sentence in a row; `Unusable` if it is not one, None for the mark between two documents."""
        words = row_list(row, "tokens")
        if words == ("-DOCSTART-",):
            return None
        tags = _span_tags(row["entities"] or [], len(words)) if "entities" in row else row_list(row, "tags")
        return Tagged(name, words, check_tags(words, tags, self.labels), number)

    def key(self, example: Tagged) -> str:
        """The words of a sentence."""
        return "\n".join(example.words)


class _Set(NamedTuple):
    types: tuple[str, ...]
    what: str
    hub: HubSource
    folder: str = ""


def ner(name: str) -> TaggingTask:
    """One of the tasks of `NER`, scored by entity F1.

    >>> ner("bc5cdr").labels
    ('O', 'B-Chemical', 'I-Chemical', 'B-Disease', 'I-Disease')
    """
    types, what, hub, folder = NER[name]
    files = {split: f"ner/{folder or name}/{split}.parquet" for split in ("train", "dev", "test")}
    single = name == "wikigold"
    return TaggingTask(
        name,
        bio_labels(types),
        instruction=f"Find the {what} in the sentence.",
        metrics=("entity_f1",),
        files={"train": "ner/wikigold/all.parquet"} if single else files,
        cut=("dev", "test") if single else (),
        hub=hub,
    )


def _span_tags(entities: list[dict[str, Any]], words: int) -> tuple[str, ...]:
    """The tags of entities given by their first word and the word after their last."""
    tags = ["O"] * words
    for entity in entities:
        start, end = entity["start"], entity["end"]
        if not 0 <= start < end <= words:
            raise Unusable(f"an entity from word {start} to {end} in a sentence of {words} words")
        tags[start:end] = [f"B-{entity['type']}"] + [f"I-{entity['type']}"] * (end - start - 1)
    return tuple(tags)


_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_TOKENS = {"tokens": "tokens", "tags": "tags"}
_NER_TAGS = {"tokens": "tokens", "ner_tags": "tags"}
_EXPORT = "refs/convert/parquet"
# the numbers of T-NER's data sets, which carry no names
_BC5CDR = ("O", "B-Chemical", "B-Disease", "I-Disease", "I-Chemical")
_MIT_MOVIE = (
    "O", "B-Actor", "I-Actor", "B-Plot", "I-Plot", "B-Opinion", "I-Opinion", "B-Award", "I-Award", "B-Year", "B-Genre",
    "B-Origin", "I-Origin", "B-Director", "I-Director", "I-Genre", "I-Year", "B-Soundtrack", "I-Soundtrack",
    "B-Relationship", "I-Relationship", "B-Character_Name", "I-Character_Name", "B-Quote", "I-Quote",
)  # fmt: skip

NER: dict[str, _Set] = {
    "conll04": _Set(
        ("Loc", "Org", "Other", "Peop"),
        "places, organisations, people and other names",
        HubSource("DFKI-SLT/conll04", _SPLITS, {"tokens": "tokens", "entities": "entities"}),
    ),
    "wnut17": _Set(
        ("corporation", "creative-work", "group", "location", "person", "product"),
        "corporations, creative works, groups, locations, people and products",
        HubSource("leondz/wnut_17", _SPLITS, _NER_TAGS, _EXPORT),
    ),
    "wikigold": _Set(
        ("LOC", "MISC", "ORG", "PER"),
        "places, organisations, people and other names",
        HubSource("milistu/Wikigold-NER-conll", {"train": "train+test"}, {"words": "tokens", "ner_tags": "tags"}),
    ),
    "bc5cdr": _Set(
        ("Chemical", "Disease"),
        "chemicals and diseases",
        HubSource("tner/bc5cdr", _SPLITS, _TOKENS, _EXPORT, names={"tags": _BC5CDR}),
    ),
    "wikiann": _Set(
        ("LOC", "ORG", "PER"),
        "places, organisations and people",
        HubSource("unimelb-nlp/wikiann", _SPLITS, _NER_TAGS, config="en"),
        "wikiann_en",
    ),
    "mit_movie": _Set(
        ("Actor", "Award", "Character_Name", "Director", "Genre", "Opinion", "Origin", "Plot", "Quote", "Relationship",
         "Soundtrack", "Year"),
        "actors, awards, characters, directors, genres, opinions, origins, plots, quotes, relations, songs and years",
        HubSource("tner/mit_movie_trivia", _SPLITS, _TOKENS, _EXPORT, names={"tags": _MIT_MOVIE}),
        "mit_movie_trivia",
    ),
}  # fmt: skip
