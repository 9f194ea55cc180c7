"""Code, messages, pages and prose use the words of GLOSSARY.md."""

import re

import glossary
import pytest


@pytest.mark.parametrize("area", glossary.areas())
def test_no_area_has_a_word_to_avoid(area):
    places = [(path.name, hit) for path in glossary.areas()[area] for hit in glossary.hits(path)]
    assert not places, f"python tools/glossary.py {area} lists them"


def test_the_count_sees_names_comments_and_text(tmp_path):
    page = tmp_path / "page.py"
    page.write_text('told = given_rows = 1  # Nobody knows\ntext = "what was said"\n')
    assert [hit.split()[0] for hit in glossary.hits(page)] == ["told", "given_rows", "#", "#"]
    page.write_text('response = rows = 1  # No user knows\ntext = "the message"\n')
    assert list(glossary.hits(page)) == []


def test_an_exception_gives_its_reason_and_would_count_otherwise():
    for phrase, reason in glossary.EXCEPTIONS.items():
        named = any(glossary.NAMED.fullmatch(word) for word in re.findall(r"[a-z]+", phrase))
        assert len(reason) > 10 and (named or glossary.MARKED.search(phrase))


def test_a_name_that_stays_gives_its_reason_and_would_count_otherwise():
    for name, reason in glossary.FIELDS.items():
        words = name.split("_")
        assert len(reason) > 10 and any(glossary.NAMED.fullmatch(word) for word in words)


def test_what_to_avoid_stands_in_the_glossary():
    page = (glossary.ROOT / "GLOSSARY.md").read_text(encoding="utf-8").split("## Words to avoid")[1]
    for word in ("whoever", "imitated", "told", "ripe", "deed", "door", "harm", "learner"):
        assert word in page
        assert glossary.MARKED.search(word) or glossary.NAMED.fullmatch(word)
