"""A valid study.toml, and a study folder made from its text."""

GOOD = """\
title = "Readmission"
question = "How likely is readmission within 30 days?"
unit_of_time = "year"
not_for = ["children"]
first_model = 2020-01-01
rows = "rows.csv"
[outcome]
name = "readmitted within 30 days"
event = "readmission"
horizon_days = 30
[[features]]
name = "age"
kind = "number"
range = [18, 110]
[[features]]
name = "sex"
kind = "level"
levels = ["f", "m"]
"""


def written(folder, text):
    """A study of that text."""
    (folder / "ward").mkdir(exist_ok=True)
    (folder / "ward" / "study.toml").write_text(text, encoding="utf-8")
    return folder / "ward"
