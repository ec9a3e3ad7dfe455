"""Templates of a prompt or completion: text with columns in braces, "Question: {question}"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter

from foreword.errors import ConfigError

__all__ = ["Template"]


@dataclass(frozen=True)
class Template:
    """Literal texts and column names by turns; one literal more than columns.

    >>> template = Template.parse("Question: {question}\\nAnswer:")
    >>> template.columns, template.render({"question": "Why?"})
    (('question',), 'Question: Why?\\nAnswer:')
    """

    literals: tuple[str, ...]
    columns: tuple[str, ...]

    @classmethod
    def of_column(cls, column: str) -> Template:
        """The column alone, whatever characters its name has."""
        return cls(("", ""), (column,))

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template. Braces of the text itself are doubled; the two characters `\\n` are a line end, so that
        a template can be typed in a shell. `ConfigError` for braces that do not match and for formats.
        """
        expected = "columns in braces, as in 'Question: {question}'"
        literals, columns = [""], []
        try:
            for literal, column, spec, conversion in Formatter().parse(text.replace("\\n", "\n")):
                literals[-1] += literal
                if column is None:
                    continue
                if not column or spec or conversion:
                    raise ValueError("a column name and nothing else must stand between braces")
                columns.append(column)
                literals.append("")
        except ValueError as error:
            raise ConfigError(f"template {text!r} ({error})", expected, "double the braces that are text") from None
        if not columns:
            raise ConfigError(f"template {text!r} without a column", expected, "name a column")
        return cls(tuple(literals), tuple(columns))

    def render(self, values: Mapping[str, str]) -> str:
        """The text with the values of the columns put in."""
        pairs = zip(self.literals, self.columns, strict=False)
        return "".join(literal + values[column] for literal, column in pairs) + self.literals[-1]
