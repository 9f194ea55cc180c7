"""What a study.toml may say: every mistake is one sentence, and older texts stay readable."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.study_files import GOOD, written

from lm.cli import cli
from lm.core.errors import LMError
from lm.core.study import FeatureTable, OutcomeTable, StudyFile, load_study, study_names
from lm.core.study_rows import read_rows
from lm.core.validation import RejectedRecord, check_row, identifier
from lm.data.study_history import study_from_text, study_text

MISTAKES = {
    "a number for a date": ("first_model = 2020-01-01", "first_model = 2020"),
    "no date": ("first_model = 2020-01-01", 'first_model = ""'),
    "an offset": ("2020-01-01", "2020-01-01T00:00:00+02:00"),
    "an offset in text": ("2020-01-01", '"2020-01-01T00:00Z"'),
    "a day-first date": ("2020-01-01", '"01/02/2020"'),
    "text for a list": ('["children"]', '"children"'),
    "a number for a list": ('["children"]', "3"),
    "letters": ('["f", "m"]', '"fm"'),
    "a padded word": ('["f", "m"]', '["f", "m", " x "]'),
    "an empty word": ('["f", "m"]', '["", "f", "m"]'),
    "a word twice": ('["f", "m"]', '["f", "f", "m"]'),
    "booleans": ('["f", "m"]', "[true, false]"),
    "an infinite range": ("[18, 110]", "[-inf, inf]"),
    "a logarithm of -1": ("[18, 110]", '[-1, 30]\ntransform = "log1p"'),
    "a misspelt key": ("rows =", "threshold = [0.1]\nrows ="),
    "a misspelt key of the outcome": ("horizon_days", 'report = "as it happens"\nhorizon_days'),
    "a misspelt key of a feature": ("range", "rnage"),
    "a horizon of centuries": ("= 30", "= 1000000"),
    "a horizon below a day": ("= 30", "= 0.25"),
    "two horizons": ("= 30", "= 30\nhorizon_hours = 12"),
    "a folder as the table": ('"rows.csv"', '"."'),
    "features by name": (GOOD[GOOD.index("[outcome]") :], 'features = ["age"]'),
    "an outcome by name": (GOOD[GOOD.index("[outcome]") :], 'outcome = "death"'),
    "an unknown zone": ("rows =", 'time_zone = "Mars/Olympus"\nrows ='),
    "a word that is a category and missing": ("rows =", 'missing_words = ["m"]\nrows ='),
    "no days between runs": ("rows =", "every = 0\nrows ="),
    "an unknown clock": ("rows =", 'clock = "sun"\nrows ='),
    "a competing feature": ("horizon_days", 'competing = "age"\nhorizon_days'),
    "the same column twice": ("rows =", 'person = "died"\nrows ='),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(tmp_path, name):
    old, new = MISTAKES[name]
    text = (
        GOOD.replace("horizon_days", 'competing = "died"\nhorizon_days')
        if "twice" in name
        else GOOD
    )
    assert load_study(written(tmp_path, GOOD)).horizon_days == 30
    assert old in text
    with pytest.raises(LMError, match=r"\Award/study.toml[: ].*\Z") as error:
        load_study(written(tmp_path, text.replace(old, new, 1)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "table", "right"),
    [
        *(
            ("threshold", "", "thresholds"),
            ("Title", "", "title"),
            ("missing_word", "", "missing_words"),
        ),
        *(("horizon", "outcome.", "horizon_days"), ("level", "feature.", "levels")),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path, wrong, table, right):
    line = f"{wrong} = 3\n"
    place = {"": 0, "outcome.": GOOD.index("horizon_days"), "feature.": GOOD.index("levels")}[table]
    with pytest.raises(LMError, match=rf"{wrong} is unknown: did you mean {right}\?"):
        load_study(written(tmp_path, GOOD[:place] + line + GOOD[place:]))


def test_new_keys_are_read(tmp_path):
    more = (
        'missing_words = ["NA", "unk"]\ntime_zone = "Europe/Berlin"\nevery = 7\nclock = "replay"\n'
    )
    text = GOOD.replace("horizon_days = 30", 'horizon_hours = 12\ncompeting = "died"')
    study = load_study(written(tmp_path, more + text))
    assert study.missing_words == ("NA", "unk") and study.time_zone == "Europe/Berlin"
    assert (study.every, study.clock, study.competing) == (7, "replay", "died")
    assert study.horizon.total_seconds() == 12 * 3600 and study.horizon_text == "12 hours"
    assert str(study.first_model) == "2019-12-31 23:00:00"  # Midnight in Berlin
    assert study_from_text(study, study_text(study)) == study


def test_a_text_of_an_older_version_still_opens(tmp_path):
    study = load_study(written(tmp_path, GOOD))
    text = study_text(study)
    assert (
        not {"missing_words", "time_zone", "every", "clock", "competing"} & json.loads(text).keys()
    )
    assert study_from_text(study, text) == study


def test_the_table_beside_a_study_wins_over_the_one_it_extends(tmp_path):
    parent = written(tmp_path, GOOD)
    child = tmp_path / "child"
    child.mkdir()
    (child / "study.toml").write_text('extends = "../ward"\ntitle = "Another ward"\n')
    study = load_study(child)
    assert study.rows == parent / "rows.csv" and "rows" in study.inherited
    (child / "rows.csv").write_text("record_id\n")
    study = load_study(child)
    assert study.rows == child / "rows.csv" and "rows" not in study.inherited
    assert study.extends == "ward" and {"features", "outcome.name"} <= set(study.inherited)
    assert "title" not in study.inherited
    (child / "rows.parquet").write_text("")
    with pytest.raises(LMError, match=r"rows.csv and rows.parquet lie beside it"):
        load_study(child)


def test_shipped_studies_load():
    assert {"monica", "rotterdam", "rotterdam_5y", "gbsg"} <= set(study_names())
    assert all(load_study(name).horizon_days >= 28 for name in study_names())


VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-5, 10**6), st.floats(allow_nan=True)),
    st.text(max_size=8),
    st.lists(
        st.one_of(st.booleans(), st.integers(0, 3), st.floats(), st.text(max_size=3)), max_size=3
    ),
    st.just({}),
)
PLACES = [("", key) for key in StudyFile.__struct_fields__ if key != "extends"]
PLACES += [("outcome", key) for key in OutcomeTable.__struct_fields__]
PLACES += [("features", key) for key in FeatureTable.__struct_fields__]


def toml(value):
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{}"
    return json.dumps(value) if isinstance(value, str) else repr(value)


@settings(max_examples=400, deadline=None)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_whatever_stands_behind_a_key_is_read_or_refused_in_one_sentence(
    tmp_path_factory, place, value
):
    table, key = place
    lines = [line for line in GOOD.splitlines() if not re.match(rf"{key} = ", line)]
    head = {"": lines.index("[outcome]"), "outcome": lines.index("[outcome]") + 1}
    at = head.get(table, lines.index("[[features]]") + 1)
    if value is not None:
        lines.insert(at, f"{key} = {toml(value)}")
    if key in ("outcome", "features"):
        start = GOOD.index("[outcome]") if key == "outcome" else GOOD.index("[[features]]")
        lines = GOOD[:start].splitlines() + ([] if value is None else [f"{key} = {toml(value)}"])
    folder = tmp_path_factory.mktemp("any", numbered=True)
    try:
        study = load_study(written(folder, "\n".join(lines)))
    except LMError as error:
        assert "\n" not in str(error) and str(error).startswith("ward/study.toml")
    else:
        assert study_from_text(study, study_text(study)) == study


@given(st.integers(0, 2**53))
def test_whole_numbers_name_one_record_in_every_type(number):
    assert {identifier(v) for v in (number, float(number), f" {number} ")} == {str(number)}


def test_one_broken_study_hides_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LM_DATA", str(tmp_path))
    written(tmp_path, GOOD)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.toml").write_text(GOOD.replace("rows =", "threshold = 1\nrows ="))
    (tmp_path / "child").mkdir()
    (tmp_path / "child" / "study.toml").write_text('extends = "../ward"\ntitle = "Another"\n')
    assert cli.main(["studies"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"broken", "child", "ward"} <= lines.keys()
    assert "threshold is unknown: did you mean thresholds?" in lines["broken"]
    assert "ward: its" in lines["child"] and "rows" in lines["child"].split("its")[1]
    assert "Readmission" in lines["ward"]


@pytest.mark.parametrize("column", ["AGE", "Age ", "age ", "SEX", "Arrived", "correct"])
def test_a_column_called_almost_like_one_of_the_study_is_refused(column):
    study = load_study("monica")
    row = read_rows(study).iloc[0][["record_id", "arrived", *study.feature_names]].to_dict()
    assert check_row(study, row | {"ward": 7, "agency": "x"}) == check_row(study, row)
    with pytest.raises(RejectedRecord, match="did you mean"):
        check_row(study, row | {column: "1"})
