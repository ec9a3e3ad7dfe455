"""Slot errors: rated examples, and laws."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.metrics import coverage, field_values, get_metric, slot_error_rate
from foreword.metrics.slots import slot_verdict
from foreword.metrics.sources import SUBJECT, read_source
from foreword.tasks import get_task

DOMAIN = {
    "name": ["Blue Spice", "The Mill", "The Rice Boat", "Zizzi"],
    "eatType": ["pub", "restaurant", "coffee shop"],
    "food": ["English", "Fast food", "French", "Indian"],
    "priceRange": ["cheap", "moderate", "high", "less than £20", "£20-25", "more than £30"],
    "customer rating": ["low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5"],
    "area": ["city centre", "riverside"],
    "familyFriendly": ["yes", "no"],
    "near": ["Burger King", "Café Rouge", "Rainbow Vegetarian Café", "Raja Indian Cuisine"],
}
SOURCE = (
    "name : The Mill | eatType : pub | food : English | priceRange : less than £20 | customer rating : 3 out of 5 | "
    "area : riverside | familyFriendly : no | near : Raja Indian Cuisine\n"
)

# What a text says of SOURCE, as a reader rated it: fields missing, wrong, and values invented.
RATED = {
    "The Mill is an English pub by the river near Raja Indian Cuisine. It is rated three out of five, costs under £20 "
    "and is not family-friendly.": ("", "", ""),
    "For less than £20 you get British food at The Mill, a 3 star riverside pub for adults only near Raja Indian "
    "Cuisine.": ("", "", ""),
    "The Mill is a pub near Raja Indian Cuisine on the riverside; kids aren't welcome, and its customer rating is 3 "
    "out of 5.": ("food priceRange", "", ""),
    "The Mill is an English restaurant in the city centre, near Raja Indian Cuisine. It is family friendly, has a low "
    "rating and is in the moderate price range.": ("", "area customer-rating eatType familyFriendly priceRange", ""),
    "Zizzi is an English pub by the river near Raja Indian Cuisine, with 3 stars, for less than £20 and no children.": (
        "", "name", "",
    ),
    "The Mill, an English pub by the river near Raja Indian Cuisine and Café Rouge, serves meals for less than £20. It "
    "has 3 stars and is not child friendly.": ("", "", "near:Café Rouge"),
    "": ("area customer-rating eatType familyFriendly food name near priceRange", "", ""),
}  # fmt: skip


@pytest.mark.parametrize("text", RATED)
def test_rated_examples(text: str) -> None:
    missing, wrong, invented = RATED[text]
    found = slot_verdict(text, read_source(SOURCE), DOMAIN)
    assert " ".join(sorted(field.replace(" ", "-") for field, _ in found.missing)) == missing
    assert " ".join(sorted(field.replace(" ", "-") for field, _ in found.wrong)) == wrong
    assert " ".join(f"{field}:{value}" for field, value in found.invented) == invented
    assert found.slots == 8


@pytest.mark.parametrize(
    ("source", "text", "errors"),
    [
        # a value within another is read once: neither "Indian" nor "Vegetarian" is stated of the food
        ("name : Zizzi | near : Raja Indian Cuisine", "Zizzi is close to Raja Indian Cuisine.", 0),
        ("name : Zizzi | food : Indian", "Zizzi serves Indian food.", 0),
        ("name : Zizzi", "Zizzi serves Indian food.", 1),
        ("name : Zizzi", "Zizzis are nice.", 1),  # whole words only
        ("near : Café Rouge", "It lies near Cafe Rouge.", 0),
        ("priceRange : cheap", "It is inexpensive.", 0),
        ("priceRange : high", "It is inexpensive.", 1),
        ("familyFriendly : yes", "It is not far, but family-friendly.", 0),
        ("familyFriendly : yes", "There is no music and families like it.", 0),
        ("familyFriendly : yes", "It isn't a place for families.", 1),
        # words that only begin or end like a negation
        ("familyFriendly : yes", "It is notable family friendly fun.", 0),
        ("familyFriendly : yes", "It has underpriced family dining.", 0),
        ("familyFriendly : yes", "It is known to be kid friendly.", 0),
        ("area : riverside | familyFriendly : yes", "By the river in the north it is family friendly.", 0),
        ("familyFriendly : yes", "Not only is it child friendly, it is big.", 0),
        ("familyFriendly : yes", "It welcomes kids but don't expect toys.", 0),
        ("familyFriendly : no", "It is none family friendly, nonfamily, unfriendly to families.", 0),
        ("familyFriendly : no", "It doesn’t allow kids.", 0),
        ("familyFriendly : no", "It is neither big nor family friendly.", 0),
        ("familyFriendly : no", "Families cannot enter.", 0),
        ("customer rating : high", "The rating is high and the prices are high.", 1),  # a price that is not given
        ("food : Indian | food : French", "French and Indian food.", 0),
        ("food : Indian | food : French", "French food.", 1),
    ],
)
def test_single_values(source: str, text: str, errors: int) -> None:
    found = slot_verdict(text, read_source(source), DOMAIN)
    assert len(found.missing) + len(found.wrong) + len(found.invented) == errors, found


def test_rates_add_up() -> None:
    sources = [SOURCE, "name : Zizzi | area : city centre | eatType : restaurant"]
    texts = ["The Mill is a cheap restaurant by the river.", "Zizzi is a pub in the city centre. English food."]
    parts = [get_metric(name)(texts, sources) for name in ("missing_slots", "wrong_slots", "invented_slots")]
    # of 11: five missing and a wrong type in the first, a wrong type and an invented food in the second; "cheap" and
    # "The Mill" count only where their field's values are among the sources
    assert parts == pytest.approx([100 * 5 / 11, 100 * 2 / 11, 100 * 1 / 11])
    assert slot_error_rate(texts, sources) == pytest.approx(sum(parts))
    assert slot_error_rate(["anything"], ["no fields"]) == 0.0


TRIPLES = (
    "Aarhus_Airport : cityServed : Aarhus,_Denmark | Aarhus,_Denmark : leader : Jacob_Bundsgaard | "
    'Aarhus_Airport : runwayName : "10R/28L" | Antares_(rocket) : lift : 17068.8 (kilogramNewtons)\n'
)


def test_triples_have_the_names_of_entities_as_values() -> None:
    assert read_source(TRIPLES) == {
        "cityServed": ["Aarhus, Denmark"], "leader": ["Jacob Bundsgaard"], "runwayName": ["10R/28L"],
        "lift": ["17068.8"], SUBJECT: ["Aarhus Airport", "Antares"],
    }  # fmt: skip
    assert read_source("[TABLECONTEXT] : title : Hawaii Five-O | Hawaii Five-O : notes : Episode : 3") == {
        "title": ["Hawaii Five-O"], "notes": ["Episode : 3"],
    }  # fmt: skip
    text = "Aarhus Airport serves Aarhus, Denmark, led by Jacob Bundsgaard. Of its runways one is 10R/28L."
    assert coverage([text], [TRIPLES]) == pytest.approx(100 * 4 / 6)
    assert slot_error_rate([text], [TRIPLES]) == pytest.approx(100 * 2 / 6)
    wrong = get_metric("wrong_slots")([text, "Bo served Odense."], [TRIPLES, "Bo : cityServed : Odense"])
    assert wrong == 0.0
    wrong = get_metric("wrong_slots")([text, "Bo served Aarhus, Denmark."], [TRIPLES, "Bo : cityServed : Odense"])
    assert wrong == pytest.approx(100 * 1 / 8)


@pytest.mark.parametrize(
    ("text", "invented"),
    [
        ("Aarhus Airport is in Tirstrup. Tirstrup is in Denmark.", []),
        ("Aarhus Airport is in Tirstrup, Denmark, and Denmark is led by Bo.", [(SUBJECT, "Bo")]),
    ],
)
def test_an_entity_may_be_named_again(text: str, invented: list[tuple[str, str]]) -> None:
    source = "Aarhus_Airport : location : Tirstrup | Tirstrup : country : Denmark"
    others = [source, "Tirstrup : country : Denmark", "Denmark : leader : Bo", "Bo : birthPlace : Denmark"]
    domain: dict[str, list[str]] = {}
    for other in others:
        for field, values in read_source(other).items():
            domain.setdefault(field, []).extend(values)
    assert slot_verdict(text, read_source(source), domain) == ([], [], invented, 3)
    assert slot_error_rate([text, "", "", ""], [source, *others[1:]]) == pytest.approx(100 * (len(invented) + 6) / 9)


def test_a_value_with_a_colon_is_no_triple() -> None:
    source = "name : Aromi | opens : 9 : 30 | note : \n"
    assert field_values(source) == ["Aromi", "9 : 30"]
    assert coverage(["Aromi opens at 9 : 30."], [source]) == 100.0


@pytest.mark.skipif("FOREWORD_DATA" not in os.environ, reason="no FOREWORD_DATA")
@pytest.mark.parametrize(("task", "missed"), [("webnlg", 20.0), ("dart", 12.0)])
def test_what_people_wrote_of_triples_states_them(task: str, missed: float) -> None:
    """The rest are dates, numbers and names in other words; for other triples the same texts state far less."""
    examples = get_task(task).split("test").examples[::9]  # rows that stand together have one topic
    texts, sources = [example.completion for example in examples], [example.prompt for example in examples]
    assert coverage(texts, sources) > 78.0 > 30.0 > coverage([*texts[7:], *texts[:7]], sources)
    assert get_metric("missing_slots")(texts, sources) < missed


values = st.sampled_from([(field, value) for field, all_values in DOMAIN.items() for value in all_values])


@given(st.lists(values, max_size=6, unique_by=lambda pair: pair[0]))
def test_a_list_of_the_facts_has_no_errors_and_silence_misses_all(pairs: list[tuple[str, str]]) -> None:
    said = {"familyFriendly": {"yes": "family friendly", "no": "not family friendly"}}
    before = {"customer rating": "rating ", "priceRange": "price "}
    source = {field: [value] for field, value in pairs}
    text = " ; ".join(before.get(field, "") + said.get(field, {}).get(value, value) for field, value in pairs)
    assert slot_verdict(text, source, DOMAIN) == ([], [], [], len(pairs))
    silent = slot_verdict("", source, DOMAIN)
    assert len(silent.missing) == silent.slots == len(pairs) and not silent.wrong and not silent.invented
