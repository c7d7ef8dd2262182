"""Said: a sentence for the reader of a report, with the key and the values to say it in another
language. English is in the code, where the sentence is made; others are texts of the reader's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class Said(str):
    """A sentence that knows its `key` and its `values`; `said` makes one.

    Everywhere else it is a str. A copy and a pickle of it are plain.
    """

    key: str
    values: Mapping[str, str]

    def __str__(self) -> str:
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str.__str__(self),)


def said(key: str, template: str, **values: object) -> Said:
    """`template` with its `{names}` filled in. Values may be sentences themselves."""
    texts = {
        name: value if isinstance(value, str) else str(value) for name, value in values.items()
    }
    sentence = Said(template.format(**texts))
    sentence.key, sentence.values = key, texts
    return sentence


def expected_one_of(name: str, value: object, words: Iterable[object]) -> Said:
    """The sentence about an argument or an input `name` whose `value` is none of `words`."""
    return said(
        "input.expected",
        "{name} is {value}: expected one of {words}",
        name=name,
        value=repr(value),
        words=", ".join(map(repr, words)),
    )


def together(sentences: Iterable[str]) -> str:
    """`sentences` as one, with semicolons between them; empty for none."""
    whole = ""
    for sentence in sentences:
        whole = said("text.and", "{one}; {more}", one=whole, more=sentence) if whole else sentence
    return whole


def listed(items: Iterable[str]) -> str:
    """`items` with commas between them; empty for none."""
    whole = ""
    for item in items:
        whole = said("text.comma", "{one}, {more}", one=whole, more=item) if whole else item
    return whole


def worded(sentences: Iterable[str | None]) -> dict[str, dict[str, object]]:
    """Keys and values of those of `sentences`, and of sentences in them, that have any."""
    found: dict[str, dict[str, object]] = {}
    for sentence in sentences:
        if isinstance(sentence, Said):
            values = {name: str.__str__(value) for name, value in sentence.values.items()}
            found[str.__str__(sentence)] = {"key": sentence.key, "values": values}
            found |= worded(sentence.values.values())
    return found


def reworded(sentence: str, words: Mapping[str, Mapping[str, object]]) -> str:
    """`sentence` with key and values again, if `words` (of `worded`) has them."""
    known = words.get(sentence)
    if known is None:
        return sentence
    values = known["values"]
    assert isinstance(values, Mapping)
    again = Said(sentence)
    again.key = str(known["key"])
    again.values = {name: reworded(value, words) for name, value in values.items()}
    return again
