"""What a linearised source says: the values of fields, or the entities of triples."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["SUBJECT", "field_values", "read_source"]

SUBJECT = "subject"  # the field of an entity that things are said of, and that is the value of no relation

_TABLE = "[TABLECONTEXT]"  # DART's subject of what is said of a whole table
_NOT_SAID = re.compile(r" \([^()]*\)$")  # Wikipedia's titles tell namesakes apart, DBpedia's numbers have units


def read_source(source: str) -> dict[str, list[str]]:
    """The values of each field of a linearised source; fields without a value are left out.

    Where every fact has three parts they are triples, and the values are their objects and subjects as texts write
    them, each once: that of several triples belongs to the first relation that it is the object of, else to `SUBJECT`.

    >>> read_source("name : Aromi | food : Thai | food : Indian | opens : 9 : 30 | note : ")
    {'name': ['Aromi'], 'food': ['Thai', 'Indian'], 'opens': ['9 : 30']}
    >>> read_source("Aarhus_Airport : location : Tirstrup | Tirstrup : country : Denmark")
    {'location': ['Tirstrup'], 'country': ['Denmark'], 'subject': ['Aarhus Airport']}
    """
    facts = [fact.split(" : ", 2) for fact in source.strip().split(" | ")]
    if all(len(fact) == 3 for fact in facts):
        pairs = _entities(facts)
    else:
        pairs = [(field, " : ".join(value).strip()) for field, *value in facts]
    fields: dict[str, list[str]] = {}
    for field, value in pairs:
        if value:
            fields.setdefault(field.strip(), []).append(value)
    return fields


def field_values(source: str) -> list[str]:
    """The values of a linearised source, as `read_source` finds them.

    >>> field_values("Antares_(rocket) : comparable : Delta_II | Delta_II : country : United_States")
    ['Delta II', 'United States', 'Antares']
    """
    return [value for values in read_source(source).values() for value in values]


def _entities(triples: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    fields: dict[str, str] = {}
    for _, relation, value in triples:
        fields.setdefault(_as_written(value), relation)
    for subject, *_ in triples:
        fields.setdefault("" if subject == _TABLE else _as_written(subject), SUBJECT)
    return [(field, value) for value, field in fields.items()]


def _as_written(name: str) -> str:
    """The name of an entity as a text has it.

    >>> _as_written('Antares_(rocket)'), _as_written('"18L/36R"')
    ('Antares', '18L/36R')
    """
    return _NOT_SAID.sub("", name.replace("_", " ").strip(' "'))
