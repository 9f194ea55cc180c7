"""Sketches against the patients themselves: counts, sums, quantiles, Parquet, and odd values."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lm.core.errors import LMError
from lm.core.study import load_study
from lm.data.synthetic import synthetic
from lm.monitor.drift_tests import (
    chi_squared,
    ks_binning_error,
    ks_statistic,
    rank_sum_z,
    share_p_value,
)
from lm.monitor.sketch import (
    Blocks,
    Column,
    bin_codes,
    column_layout,
    count_blocks,
    count_codes,
    number_column,
    sketch_from_json,
    sketch_parquet,
    sketch_quantile,
    sketch_to_json,
)

STUDY = load_study("rotterdam")
WOMEN = synthetic(STUDY, 1500, seed=21)
COLUMNS = column_layout(STUDY, WOMEN[:700])
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e300, -1e300, 5e-324]


def sketch(frame, columns=COLUMNS):
    return count_codes(columns, bin_codes(columns, frame))


def same(one, other):
    """Whether two sketches or rows of blocks are equal."""
    equal = all(map(np.array_equal, one.counts, other.counts))
    return equal and one.columns == other.columns and vars(one).keys() == vars(other).keys()


def random_values(rng):
    """Numbers as ugly as they come: ties, few or many, special values, all missing, constant."""
    n = int(rng.integers(0, 80))
    kind = rng.integers(5)
    values = [
        rng.normal(size=n),
        rng.integers(-3, 4, n).astype(float),
        np.exp(rng.normal(size=n) * 20).round(2),
        np.full(n, np.nan),
        np.full(n, 7.0),
    ][kind]
    odd = rng.random(n) < rng.choice([0, 0.3])
    return np.where(odd, rng.choice(SPECIAL, n), values)


def random_text(rng):
    """Categories, some unknown, some missing."""
    return pd.Series(rng.choice(["f", "m", "x", "", None], int(rng.integers(0, 60))), dtype="str")


def slow(column, values):
    """The counts of one column, patient by patient."""
    counts = [0] * column.bins
    for value in values:
        if pd.isna(value):
            counts[-1] += 1
        elif column.kind == "level":
            known = value in column.cuts
            counts[column.cuts.index(value) if known else column.bins - 2] += 1
        else:
            counts[sum(cut < value for cut in column.cuts)] += 1
    return counts


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(60))
def test_counts_are_those_of_a_loop_over_patients(seed):
    rng = np.random.default_rng(seed)
    column = number_column("a", random_values(rng), bins=int(rng.integers(2, 60)))
    text = Column("b", "level", ("f", "m"), exact=True)
    for one, values in ((column, random_values(rng)), (text, random_text(rng))):
        result = sketch(pd.DataFrame({one.name: values}), (one,))
        assert result.counts[0].tolist() == slow(one, values)
        assert result.patients == len(values) == result.counts[0].sum()


@pytest.mark.parametrize("seed", range(40))
def test_bins_hold_one_value_each_or_about_as_many_patients(seed):
    rng = np.random.default_rng(seed)
    values, bins = random_values(rng), int(rng.integers(2, 60))
    column, known = number_column("a", values, bins), values[~np.isnan(values)]
    assert list(column.cuts) == sorted(set(column.cuts)) and len(column.cuts) <= bins
    assert column.exact == (len(np.unique(known)) <= bins)
    counts = np.bincount(column.codes(known), minlength=column.bins)
    for i, cut in enumerate(column.cuts):
        here = known[column.codes(known) == i]
        if column.exact:
            assert len(here) and (here == cut).all()
        else:
            assert (here[here != cut]).size <= len(known) / bins
    assert not column.exact or counts[-2:].sum() == 0


def split(frame, rng, parts=4):
    """The patients in random groups, some of them empty."""
    group = rng.integers(0, parts, len(frame)) * rng.integers(1, 3)
    return [frame[group == g] for g in range(2 * parts)]


@pytest.mark.parametrize("seed", range(5))
def test_parts_add_up_to_the_whole_in_any_order(seed):
    rng = np.random.default_rng(seed)
    odd = WOMEN.assign(er=WOMEN["er"].where(rng.random(1500) < 0.8))
    parts = [sketch(part) for part in split(odd, rng)]
    whole, a, b = sketch(odd), parts[0], parts[1]
    assert same(a + b, b + a)
    rest = sum(parts[3:], parts[2])
    assert same((a + b) + rest, a + (b + rest)) and same(a + b + rest, whole)
    assert (a + b + rest).patients == whole.patients == 1500
    assert same(whole + sketch(odd[:0]), whole)


@pytest.mark.parametrize("every", [1, 7, 25, 400, 2000])
def test_blocks_are_sketches_of_consecutive_patients(every):
    coded = bin_codes(COLUMNS, WOMEN)
    stream = count_blocks(COLUMNS, coded, every)
    assert len(stream) == 1500 // every
    for i in range(0, len(stream), max(len(stream) // 5, 1)):
        part = sketch(WOMEN[i * every : (i + 1) * every])
        assert all(np.array_equal(b[i], c) for b, c in zip(stream.counts, part.counts, strict=True))
    whole = len(stream) * every
    for length in (0, every - 1, every, 3 * every + 1, 10_000):
        last, k = stream.last(length), min(length // every * every, whole)
        assert last.patients == k and same(last, sketch(WOMEN[whole - k : whole]))
    cut = len(stream) // 2 * every
    assert same(
        count_blocks(COLUMNS, coded[:cut], every) + count_blocks(COLUMNS, coded[cut:], every),
        stream,
    )


def test_other_bins_do_not_add():
    other = column_layout(STUDY, WOMEN[700:])
    with pytest.raises(LMError, match="different bins"):
        sketch(WOMEN) + sketch(WOMEN, other)
    stream = count_blocks(COLUMNS, bin_codes(COLUMNS, WOMEN))
    for wrong in (
        count_blocks(other, bin_codes(other, WOMEN)),
        count_blocks(COLUMNS, bin_codes(COLUMNS, WOMEN), 50),
    ):
        with pytest.raises(LMError, match="different bins or lengths"):
            stream + wrong


def test_text_among_numbers_is_refused_wherever_it_comes():
    wrong = WOMEN.astype({"age": object})
    wrong.loc[3, "age"] = "fifty"
    for attempt in (lambda: column_layout(STUDY, wrong), lambda: bin_codes(COLUMNS, wrong)):
        with pytest.raises(LMError, match="age holds a value that is not a number"):
            attempt()


def test_the_risk_is_a_column_where_it_is_known():
    assert [c.name for c in COLUMNS] == STUDY.feature_names
    assert column_layout(STUDY, WOMEN.assign(risk=WOMEN["truth"]))[-1].name == "risk"
    assert column_layout(STUDY, WOMEN.assign(risk=np.nan)) == column_layout(STUDY, WOMEN)


@pytest.mark.parametrize("seed", range(40))
def test_quantiles_are_exact_or_lie_in_their_bin(seed):
    rng = np.random.default_rng(seed)
    values = random_values(rng)
    column = number_column("a", values, bins=int(rng.integers(2, 60)))
    result, known = sketch(pd.DataFrame({"a": values}), (column,)), values[~np.isnan(values)]
    for q in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1):
        mine = sketch_quantile(result, "a", q)
        if not len(known):
            assert np.isnan(mine)
            continue
        true = np.sort(known)[max(int(np.ceil(q * len(known))) - 1, 0)]
        assert mine == (true if column.exact else column.cuts[bin_of(column, true)])


def bin_of(column, value):
    """The bin of a value; the last cut's where it lies beyond."""
    return min(int(column.codes([value])[0]), len(column.cuts) - 1)


def test_quantiles_without_any_cut_are_unknown():
    column = number_column("a", [np.nan, np.nan])
    assert column.cuts == () and column.bins == 2
    for values in ([], [np.nan], [3.0, 4.0]):
        assert np.isnan(sketch_quantile(sketch(pd.DataFrame({"a": values}), (column,)), "a", 0.5))


@pytest.mark.parametrize("seed", range(10))
def test_statistics_of_exact_bins_are_those_of_the_patients(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 30, 300).astype(float), rng.integers(2, 31, 90).astype(float)
    a[rng.random(300) < 0.1], b[rng.random(90) < 0.2] = np.nan, np.nan
    column = number_column("a", np.concatenate([a, b]))
    then, now = (sketch(pd.DataFrame({"a": v}), (column,)).counts[0] for v in (a, b))
    x, y = a[~np.isnan(a)], b[~np.isnan(b)]
    assert column.exact
    assert abs(ks_statistic(then[:-1], now[:-1]) - stats.ks_2samp(x, y).statistic) < 1e-9
    peer = stats.mannwhitneyu(y, x, method="asymptotic", use_continuity=False)
    z = rank_sum_z(then[:-1], now[:-1])
    assert abs(2 * stats.norm.sf(abs(z)) - peer.pvalue) < 1e-9
    gone = [[now[-1], 90 - now[-1]], [then[-1], 300 - then[-1]]]
    more = share_p_value(now[-1:], 90, int(then[-1]), 300, upper=True)[0]
    assert abs(more - stats.fisher_exact(gone, alternative="greater").pvalue) < 1e-9
    levels = [np.bincount((v // 8).astype(int), minlength=4) for v in (x, y)]
    statistic, freedom = chi_squared(*levels)
    assert min(levels[0] * len(y) / len(x)) > 5  # So none is pooled
    expected = stats.chi2_contingency(np.array(levels), correction=False)
    assert abs(statistic - expected.statistic) < 1e-9 and freedom == expected.dof


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("bins", [5, 50])
def test_what_the_bins_hide_is_at_most_what_is_stated(seed, bins):
    rng = np.random.default_rng(seed)
    a = np.exp(rng.normal(size=400)).round(int(rng.integers(1, 4)))
    b = np.exp(rng.normal(rng.normal(), 1, int(rng.integers(3, 200))))
    column = number_column("a", a, bins)
    then, now = (np.bincount(column.codes(v), minlength=column.bins)[:-1] for v in (a, b))
    full, binned = stats.ks_2samp(a, b).statistic, ks_statistic(then, now)
    assert binned <= full + 1e-9 and full <= binned + ks_binning_error(then, now) + 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_json_gives_back_its_input(seed):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"a": random_values(rng), "b": 1.0})
    columns = (number_column("a", random_values(rng)), number_column("b", []))
    columns = (*columns, Column('"c" é', "level", ("<=20", 'it"s'), exact=True))
    frame['"c" é'] = pd.Series(np.where(np.arange(len(frame)) % 2, 'it"s', "?"), dtype="str")
    coded = bin_codes(columns, frame)
    for thing in (
        count_codes(columns, coded),
        count_blocks(columns, coded, 5),
        count_blocks(columns, coded[:3], 5),
    ):
        again = sketch_from_json(sketch_to_json(thing))
        assert (
            type(again) is type(thing)
            and same(again, thing)
            and sketch_to_json(again) == sketch_to_json(thing)
        )
        assert [c.dtype for c in again.counts] == [np.int64] * 3
    assert sketch_from_json(sketch_to_json(count_blocks(columns, coded, 5))).every == 5
    assert sketch_from_json(sketch_to_json(count_codes(columns, coded))).patients == len(frame)


@pytest.mark.parametrize("text", ["", "no", "[]", "7", "{}", '{"columns": [7]}', '{"columns": []}'])
def test_other_text_is_no_sketch(text):
    with pytest.raises(LMError, match="this is no sketch"):
        sketch_from_json(text)


@pytest.mark.parametrize("seed", range(12))
def test_parquet_gives_what_the_frame_gives(seed, tmp_path):
    rng = np.random.default_rng(seed)
    columns = [number_column(f'n "{i}"', random_values(rng), 20) for i in range(6)]
    columns.append(Column("words", "level", ("f", "it's"), exact=True))
    frame = pd.DataFrame({c.name: pd.Series(random_values(rng)) for c in columns[:-1]})
    text = pd.Series(rng.choice(["f", "it's", "x", "", None], len(frame)), dtype="str")
    frame["words"] = text
    frame.to_parquet(tmp_path / "some.parquet")
    read = sketch_parquet(columns, tmp_path / "some.parquet")
    assert same(read, sketch(frame, columns)) and read.patients == len(frame)


def test_several_parquet_files_are_one_table(tmp_path):
    for i in range(3):
        WOMEN[i * 500 : (i + 1) * 500].to_parquet(tmp_path / f"2024-{i}.parquet")
    assert same(sketch_parquet(COLUMNS, tmp_path / "2024-*.parquet"), sketch(WOMEN))
    no_one = tmp_path / "empty.parquet"
    WOMEN[:0].to_parquet(no_one)
    assert sketch_parquet(COLUMNS, no_one).patients == 0


@pytest.mark.parametrize("what", ["no file", "no parquet", "no column", "text among numbers"])
def test_unreadable_tables_are_refused_with_a_sentence(what, tmp_path):
    path = tmp_path / "table.parquet"
    if what == "no parquet":
        path.write_text("not at all")
    elif what == "no column":
        WOMEN.drop(columns="age").to_parquet(path)
    elif what == "text among numbers":
        WOMEN.assign(age="fifty").to_parquet(path)
    with pytest.raises(LMError, match=r"^table\.parquet cannot be read: [^\n]+$"):
        sketch_parquet(COLUMNS, path)


@pytest.mark.filterwarnings("error")
def test_none_and_three_patients_have_an_answer():
    no_one, three = sketch(WOMEN[:0]), sketch(WOMEN[:3].assign(er=[np.nan, 1.0, 2.0]))
    assert no_one.patients == 0 and np.isnan(no_one.missing("er"))
    assert np.isnan(sketch_quantile(no_one, "age", 0.5))
    assert three.missing("er") == 1 / 3 and all(c.sum() == 3 for c in three.counts)
    assert len(count_blocks(COLUMNS, bin_codes(COLUMNS, WOMEN[:3]))) == 0
    assert count_blocks(COLUMNS, bin_codes(COLUMNS, WOMEN[:3])).last(100).patients == 0
    empty = column_layout(STUDY, WOMEN[:0])
    assert {c.bins for c in empty if c.kind == "number"} == {2}
    assert sketch(WOMEN, empty).patients == 1500 and len(Blocks((), 25, ())) == 0
