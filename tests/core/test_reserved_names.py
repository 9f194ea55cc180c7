"""A feature may have any name that is not the machine's own, and keeps its values everywhere."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.ward import START, STUDY, answer

from lm.core.errors import LMError
from lm.core.schema import COMPUTED, OWN_COLUMNS, RESERVED, is_reserved
from lm.core.study import Feature, load_study
from lm.data.store import Store
from lm.machine.machine import Machine

COLUMNS = sorted({name for columns in OWN_COLUMNS.values() for name in columns} | set(COMPUTED))
FREE = [name for name in COLUMNS if not is_reserved(name)]
USUAL = ["distance", "weight", "index", "x_age", "x_x_age", "count", "select", "order", "N o 1"]
FILE = """title = "A ward"
question = "Will the patient die?"
unit_of_time = "year"
not_for = ["real patients"]
first_model = 2020-01-01
rows = "rows.csv"
[outcome]
name = "death"
event = "death"
horizon_days = 10
[[features]]
name = "{name}"
kind = "number"
range = [0, 100]
"""


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_the_machines_is_refused_or_harmless(tmp_path, name):
    (tmp_path / "ward").mkdir()
    (tmp_path / "ward" / "study.toml").write_text(FILE.format(name=name))
    if is_reserved(name):
        with pytest.raises(LMError, match=f"'{name}': the name is a column of the machine's own"):
            load_study(tmp_path / "ward")
    else:
        assert load_study(tmp_path / "ward").feature_names == [name]


def test_what_stands_beside_features_is_reserved(tmp_path):
    with Store(STUDY, tmp_path) as store:
        frames = [
            store.queries.as_of(),
            *map(store.queries.table, ("records", "predictions", "explanations")),
        ]
    for frame in frames:
        assert set(frame) - set(STUDY.feature_names) <= RESERVED


NAMES = st.lists(st.sampled_from(FREE + USUAL), min_size=1, max_size=4, unique_by=str.lower)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(names=NAMES, seed=st.integers(0, 99))
def test_values_come_back_under_any_name(tmp_path_factory, names, seed):
    features = tuple(Feature(n, "number", n, "", 0.0, 100.0) for n in names)
    study = replace(STUDY, features=features, name="any")
    values = np.random.default_rng(seed).integers(0, 100, (4, len(names))).astype(float)
    rows = pd.DataFrame(values, columns=names)
    rows.insert(0, "record_id", [f"p{i}" for i in range(4)])
    rows.insert(1, "arrived", [str(START + pd.Timedelta(days=i)) for i in range(4)])
    with Machine(study, tmp_path_factory.mktemp("home")) as machine:
        machine.receive_many(rows[:2], on_arrival=True)
        row = rows.iloc[2].to_dict()
        machine.receive(row, now=START + pd.Timedelta(days=2))
        shares = {"base": 0.0} | dict.fromkeys(names, 0.5)
        checked = rows.iloc[3].to_dict() | {"arrived": START + pd.Timedelta(days=3)}
        machine.store.records.append(checked, checked["arrived"], "", answer(), shares)
        for frame in (machine.known(), machine.table("records")):
            assert np.array_equal(frame[names].to_numpy(), values)
        assert np.array_equal(machine.table("predictions")[names].to_numpy(), values[3:])
        assert (machine.table("explanations")[names].to_numpy() == 0.5).all()
        for when in range(4):
            machine.add_outcome(f"p{when}", 0, START + pd.Timedelta(days=20))
        result = machine.similar("p3")
        for near in result["nearest"]:
            place = int(near["record_id"][1:])
            assert [near[name] for name in names] == values[place].tolist()
        assert machine.verify() == []
