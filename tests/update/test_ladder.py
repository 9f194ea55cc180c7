"""The ladder against statsmodels, chance and odd patients: the smallest update that suffices."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.special import expit
from scipy.stats import chi2, poisson
from sklearn.linear_model import LogisticRegression

import lm.update.ladder as room
from lm.core.errors import LMError
from lm.core.settings import settings
from lm.core.study import load_study
from lm.core.study_rows import read_rows
from lm.model.metrics import calibration
from lm.model.predict import fit
from lm.monitor.follow_up import HAZARD_STEPS
from lm.update.ladder import (
    RUNGS,
    RungChoice,
    bootstrap_test,
    build_rung,
    calibration_shift,
    choose_rung,
    closed_test,
    intercept_shift,
    survival_shift,
)

STUDY = load_study("rotterdam")
ROWS = read_rows(STUDY).dropna(subset="y").reset_index(drop=True)
OLD, RECENT = ROWS[:1200], ROWS[1200:]
STRAIGHT = np.linspace(0, 1, HAZARD_STEPS + 1)


@dataclass(frozen=True)
class Recipe:
    family: str
    hyper: dict = field(default_factory=dict)
    selected: tuple | None = None


@pytest.fixture(scope="module")
def champion():
    return fit(STUDY, OLD)


def world(seed, n, shift=0.0, slope=1.0, changed=0.0, base=-1.2):
    """Outcomes, log-odds and design of new patients of a known model."""
    rng = np.random.default_rng(seed)
    x = np.column_stack([rng.normal(size=(n, 5)), rng.random((n, 3)) < 0.2])
    z = base + x @ np.array([0.8, -0.5, 0.4, 0.3, 0.0, 0.6, -0.6, 0.4])
    true = shift + slope * z + changed * x[:, 0]
    return (rng.random(n) < expit(true)).astype(float), z, x


def plain(monkeypatch):
    """Switch Bartlett's factor off."""
    monkeypatch.setattr(room, "PLENTY", 0)


def ratios(y, z, x):
    """Statistic and degrees of freedom of the three tests, by statsmodels."""
    ones, family = np.ones((len(y), 1)), sm.families.Binomial()
    free = sm.GLM(y, np.column_stack([ones, x]), family=family).fit(tol=1e-12)
    large = sm.GLM(y, ones, family=family, offset=z).fit(tol=1e-12)
    both = sm.GLM(y, np.column_stack([ones, z]), family=family).fit(tol=1e-12)
    keep = (y * z - np.logaddexp(0, z)).sum()
    rank = x.shape[1] + 1
    return [(2 * (free.llf - own), rank - k) for k, own in enumerate((keep, large.llf, both.llf))]


def test_the_p_values_are_those_of_statsmodels(monkeypatch):
    plain(monkeypatch)
    for seed, n, changed in ((1, 400, 1.0), (2, 1000, -0.8)):
        y, z, x = world(seed, n, 0.7, 0.5, changed)
        choice = closed_test(y, z, x, as_published=True)
        results = [chi2.sf(*each) for each in ratios(y, z, x)]
        assert choice.rung == "refit" and list(choice.p) == ["keep", *RUNGS[:2]]
        assert np.allclose(list(choice.p.values()), results, rtol=1e-6)


def test_each_answer_is_tested_only_after_a_smaller_one_was_rejected():
    for seed in range(12):
        choice = closed_test(*world(seed, 300, 0.3 * (seed % 4)))
        p = list(choice.p.values())
        assert all(v <= 0.05 for v in p[:-1]) and list(choice.p)[-1] == choice.rung
        assert p[-1] > 0.05 and f"{choice.patients} outcomes" in choice.reason


def test_a_larger_answer_is_a_test_of_its_own(monkeypatch):
    plain(monkeypatch)
    y, z, x = world(1, 400, 0.3)
    (keep, *_), ones = ratios(y, z, x), np.ones((400, 1))
    likely = [0.0, 0.0]
    for k, design, offset in ((0, ones, z), (1, np.column_stack([ones, z]), None)):
        likely[k] = sm.GLM(y, design, family=sm.families.Binomial(), offset=offset).fit().llf
    own = (y * z - np.logaddexp(0, z)).sum()
    p = [chi2.sf(2 * (likely[0] - own), 1), chi2.sf(2 * (likely[1] - own), 2), chi2.sf(*keep)]
    assert closed_test(y, z, x).p["keep"] == pytest.approx(min(1, 3 * min(p)), rel=1e-6)


@pytest.mark.parametrize("as_published", [True, False])
def test_the_closed_test_errs_no_oftener_than_its_level_with_few_events(as_published):
    wrong = []
    for seed in range(160):
        choice = closed_test(*world(seed, 150, base=-1.8), 0.05, seed, as_published)
        wrong.append(choice.rung != "keep")
    assert np.mean(wrong) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 160)


def test_bartletts_factor_lowers_what_few_events_would_overstate(monkeypatch):
    def rejected():
        streams = (world(seed, 120, base=-2.2) for seed in range(100))
        return np.mean([closed_test(*each, as_published=True).p["keep"] for each in streams])

    corrected = rejected()
    plain(monkeypatch)
    assert rejected() < corrected - 0.02 and corrected < 0.55


@pytest.mark.slow
def test_a_larger_update_than_needed_is_as_rare_whatever_is_true():
    for shift, slope, most in ((1.2, 1.0, 1), (0.6, 0.4, 2)):
        tried = [closed_test(*world(s, 400, shift, slope)).rung for s in range(40)]
        place = [("keep", *RUNGS).index(rung) for rung in tried]
        assert np.mean(np.array(place) > most) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 40)
        assert np.mean(np.array(place) == most) >= 0.8


def test_columns_that_distinguish_no_patient_cost_no_degree_of_freedom():
    y, z, x = world(5, 400, 0.5)
    dull = np.column_stack([x, np.zeros(400), np.ones(400), x[:, 0], x[:, 1] + x[:, 2]])
    one, two = closed_test(y, z, x), closed_test(y, z, dull)
    assert one.rung == two.rung and np.allclose(list(one.p.values()), list(two.p.values()))


@pytest.mark.parametrize("events", [0, 1])
def test_a_level_whose_patients_all_end_alike_gives_a_finite_answer(monkeypatch, events):
    plain(monkeypatch)
    y, z, x = world(6, 400)
    y[:4], flag = events, (np.arange(400) < 4).astype(float)
    choice = closed_test(y, z, np.column_stack([x, flag]), as_published=True)
    rest = np.arange(400) >= 4  # At the limit the four are predicted for certain
    free = sm.GLM(y[rest], sm.add_constant(x[rest]), family=sm.families.Binomial()).fit(tol=1e-12)
    ratio = 2 * (free.llf - (y * z - np.logaddexp(0, z)).sum())
    assert choice.p["keep"] == pytest.approx(chi2.sf(ratio, 10), rel=1e-4)


def test_kinds_that_are_fully_separated_equal_risks_and_no_patients_are_answered():
    y, z, x = world(7, 200)
    distant = closed_test((x[:, 0] > 0).astype(float), z, x)
    assert distant.rung == "refit" and all(0 <= p <= 1 for p in distant.p.values())
    even = closed_test(y, np.full(200, -1.0), np.zeros((200, 2)))
    assert even.rung in ("keep", RUNGS[0]) and not np.isnan(list(even.p.values())).any()
    assert np.isfinite(closed_test(y, 40 * z, x).p["keep"])
    for result in (np.zeros(0), np.zeros(200), np.ones(200)):
        n = len(result)
        for choice in (closed_test(result, z[:n], x[:n]), bootstrap_test(result, z[:n], {})):
            assert choice.rung == "keep" and "too few" in choice.reason and choice.p == {}


def test_the_answers_are_nested_for_log_odds_outside_the_design():
    y, _, x = world(8, 500)
    bent = -1 + np.abs(x[:, 0]) * np.sign(x[:, 1])
    full = room._basis(np.column_stack([np.ones(500), bent, x]))
    for answer in (np.ones((500, 0)), np.ones((500, 1)), full[:, :0]):
        assert room._ratio(answer, full, y[None], bent)[0] >= 0
    follow = (np.random.default_rng(1).random(500) < expit(bent)).astype(float)
    assert closed_test(follow, bent, x).rung == "keep"


def refitting(seed, y, x):
    """A refit on 800 patients of the old world and the sample."""
    before, _, old = world(seed + 5000, 800)

    def refit(sample):
        family = LogisticRegression(solver="newton-cholesky")
        family.fit(np.vstack([old, x[sample]]), np.r_[before, y[sample]])
        return family.decision_function(x)

    return {"refit": refit}


@pytest.mark.slow
def test_the_bootstrap_test_errs_no_oftener_than_its_level():
    wrong = []
    for seed in range(50):
        y, z, x = world(seed, 200)
        wrong.append(bootstrap_test(y, z, refitting(seed, y, x), draws=8).rung != "keep")
    assert np.mean(wrong) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 50)


@pytest.mark.parametrize(
    ("truth", "rung"),
    [
        ({"shift": 1.0}, RUNGS[0]),
        ({"shift": 0.8, "slope": 0.3}, RUNGS[1]),
        ({"changed": -2.0}, "refit"),
    ],
)
def test_the_bootstrap_test_finds_the_rung_that_is_needed(truth, rung):
    y, z, x = world(1, 1500, **truth)
    choice = bootstrap_test(y, z, refitting(1, y, x), draws=15)
    assert choice.rung == rung and choice.method == "bootstrap"
    assert choice == bootstrap_test(y, z, refitting(1, y, x), draws=15)


def test_left_out_patients_are_judged_by_what_was_learned_without_them():
    y, z, _ = world(3, 150)
    seen, rng = [], np.random.default_rng(4)
    spy = {"refit": lambda sample: (seen.append(sample), z)[1]}
    losses = room._left_out(y, z, spy, 12, rng)
    total, times = np.zeros((150, 4)), np.zeros(150)
    for sample in seen:
        a, (b, slope) = (
            intercept_shift(z[sample], y[sample]),
            calibration_shift(z[sample], y[sample]),
        )
        for i in set(range(150)) - set(sample):
            total[i] += [(expit(v) - y[i]) ** 2 for v in (z[i], a + z[i], b + slope * z[i], z[i])]
            times[i] += 1
    assert np.allclose(losses, total[times > 0] / times[times > 0, None])


def test_equal_answers_are_never_rejected():
    losses = np.repeat(np.random.default_rng(1).random((80, 1)), 3, axis=1)
    assert room._p_values(losses, np.random.default_rng(2)) == [1, 1, 1]


def test_choose_takes_the_test_that_fits_the_champion(champion):
    choice = choose_rung(STUDY, champion, RECENT, ROWS)
    assert isinstance(choice, RungChoice) and choice.method == "closed"
    assert choice.patients == len(RECENT) and choice.events == RECENT["y"].sum()
    trees = fit(STUDY, OLD, "boosting", trees=8, members=2)
    few = choose_rung(STUDY, trees, RECENT[:400], ROWS, draws=3)
    assert few.method == "bootstrap" and few == choose_rung(
        STUDY, trees, RECENT[:400], ROWS, draws=3
    )


@pytest.mark.parametrize(("outcomes", "events"), [(101, 1), (1, 11), (10**6, 1)])
def test_too_few_outcomes_keep_the_champion_and_say_so(champion, outcomes, events):
    part = RECENT[RECENT["y"] == 0][:90], RECENT[RECENT["y"] == 1][:10]
    choice = choose_rung(STUDY, champion, pd.concat(part), ROWS, 0.05, outcomes, events)
    assert (
        choice.rung == "keep" and choice.p == {} and (choice.patients, choice.events) == (100, 10)
    )
    assert "100 matured outcomes, 10 of the rarer kind" in choice.reason


def test_features_that_the_champion_does_not_use_cannot_reject_it():
    part = fit(STUDY, OLD, selected=("age", "grade"))
    z = part.log_odds(RECENT)
    nodes = np.log1p(RECENT["nodes"].to_numpy(float))
    risk = expit(z + 1.2 * (nodes - nodes.mean()))
    table = RECENT.assign(y=(np.random.default_rng(5).random(len(z)) < risk).astype(float))
    whole = closed_test(table["y"], z, part.encoded(table))
    assert whole.rung == "refit" and choose_rung(STUDY, part, table, ROWS).rung != "refit"
    assert build_rung("refit", STUDY, ROWS, table, part).selected == ("age", "grade")


def test_unknown_outcomes_are_left_out(champion):
    gaps = RECENT.assign(y=RECENT["y"].where(np.arange(len(RECENT)) % 2 == 0))
    assert choose_rung(STUDY, champion, gaps, ROWS) == choose_rung(
        STUDY, champion, RECENT[::2], ROWS
    )
    assert choose_rung(STUDY, champion, RECENT[:0], ROWS).rung == "keep"


def test_no_refit_of_the_bootstrap_learns_from_those_it_predicts(champion, monkeypatch):
    frames = []
    monkeypatch.setattr(room, "fit", lambda s, frame, *_, **k: (frames.append(frame), champion)[1])
    recent = RECENT[:150]
    refit = room._refits(STUDY, champion, recent, ROWS[:1500], 0, None)["refit"]
    refit(np.arange(100))
    taught = set(frames[0].index)
    assert taught & set(recent.index) == set(recent.index[:100]) and set(OLD.index) <= taught


@pytest.mark.slow
def test_a_candidate_is_selected_only_where_it_beats_the_refit(champion):
    rng, years = np.random.default_rng(1), (ROWS["age"] - 55).abs()
    risk = expit(np.where(years > 12, 1.5, -2.0))
    bent = ROWS.assign(y=(rng.random(len(ROWS)) < risk).astype(float))
    trees = Recipe("boosting", {"trees": 20, "members": 2})
    choice = choose_rung(STUDY, champion, bent[1200:], bent, candidate=trees, draws=3)
    assert choice.rung == "reselect" and choice.p["refit"] <= 0.05 and choice.method == "closed"
    same = choose_rung(STUDY, champion, bent[1200:], bent, candidate=Recipe("logistic"), draws=3)
    assert same.rung == "refit" and same.p["refit"] > 0.05


def test_a_ranking_that_has_turned_is_refitted_not_turned_around(champion):
    z, rng = champion.log_odds(RECENT), np.random.default_rng(3)
    turned = RECENT.assign(y=(rng.random(len(z)) < expit(-1.5 - 0.8 * z)).astype(float))
    choice = choose_rung(STUDY, champion, turned, ROWS)
    assert choice.rung == "refit" and choice.p[RUNGS[1]] > 0.05 and "above 0" in choice.reason
    with pytest.raises(LMError, match="above 0"):
        build_rung("recalibrate", STUDY, ROWS, turned, champion)


def test_recalibrations_are_those_of_statsmodels(champion):
    y, z = RECENT["y"].to_numpy(), champion.log_odds(RECENT)
    ones = np.ones(len(y))
    large = sm.GLM(y, ones, family=sm.families.Binomial(), offset=z).fit(tol=1e-12).params
    both = sm.Logit(y, np.column_stack([ones, z])).fit(disp=0, tol=1e-12).params
    models = [build_rung(rung, STUDY, ROWS, RECENT, champion) for rung in RUNGS[:2]]
    assert models[0].recalibration_ == pytest.approx((large[0], 1.0), abs=1e-6)
    assert models[1].recalibration_ == pytest.approx(tuple(both), abs=1e-5)
    again = calibration(y, models[1].predict_proba(RECENT)[:, 1])
    assert (again["intercept"].value, again["slope"].value) == pytest.approx((0, 1), abs=1e-6)


def test_a_refit_keeps_the_recipe_and_moves_the_intercept_with_the_recent():
    strict = fit(STUDY, OLD, C=0.01)
    model = build_rung("refit", STUDY, ROWS, RECENT, strict)
    assert model.C == 0.01 and model.recalibration_[1] == 1.0
    assert model.predict_proba(RECENT)[:, 1].sum() == pytest.approx(RECENT["y"].sum())
    gaps = RECENT.assign(y=np.nan)
    bare = fit(STUDY, ROWS, C=0.01).fingerprint()
    assert build_rung("refit", STUDY, ROWS, gaps, strict).fingerprint() == bare
    first = build_rung("refit", STUDY, ROWS, ROWS[:0], None, learner="logistic")
    assert first.fingerprint() == fit(STUDY, ROWS).fingerprint()


def test_what_cannot_be_built_is_stated_in_one_sentence(champion):
    for rung, served, result in (
        ("retrain", champion, "'retrain' is unknown: choose one of recalibrate in the large"),
        ("recalibrate", None, "no model yet"),
        ("reselect", champion, "no candidate"),
    ):
        with pytest.raises(LMError, match=result):
            build_rung(rung, STUDY, ROWS, RECENT, served)
    for rung in RUNGS[:2]:
        for recent in (RECENT[:0], RECENT[RECENT["y"] == 1][:30]):
            with pytest.raises(LMError):
                build_rung(rung, STUDY, ROWS, recent, champion)


def followers(seed, n=1500, factor=1.0):
    """Patients of three years with a straight hazard, and a stand-in of their model."""
    rng, day = np.random.default_rng(seed), pd.Timedelta(days=1)
    z = rng.normal(-1, 0.8, n)
    due = 1000 * rng.exponential(size=n) / (factor * np.logaddexp(0, z))
    arrived = pd.Timestamp("2000-01-01") + np.sort(rng.uniform(0, 1095, n)) * day
    table = pd.DataFrame({"arrived": arrived, "z": z})
    table["event"] = (table["arrived"] + due * day).where(due <= 1000)
    return table.assign(followed_until=table["event"].fillna(table["arrived"] + 1000 * day))


class Reported:
    """Has the log-odds that its patients carry."""

    def log_odds(self, patients):
        return patients["z"].to_numpy(float)


AS_OF = pd.Timestamp("2003-01-01")


def test_the_interval_of_theta_leaves_1_out_exactly_where_poisson_rejects():
    left = 0
    for seed in range(60):
        factor = (1.0, 0.75, 1.35)[seed % 3]
        result = survival_shift(Reported(), followers(seed, 400, factor), AS_OF, STRAIGHT, 1000)
        o, e = result["observed"], result["expected"]
        tails = 2 * min(poisson.cdf(o, e), poisson.sf(o - 1, e))
        assert (tails < 0.05) == (not result["low"] <= 1 <= result["high"])
        assert result["theta"] == pytest.approx((o + 15) / (e + 15))
        assert result["low"] <= result["theta"] <= result["high"]
        left += tails < 0.05
    assert 10 < left < 50


def test_theta_is_right_on_average_and_ends_where_it_began():
    thetas = [
        survival_shift(Reported(), followers(s, 1500, 0.6), AS_OF, STRAIGHT, 1000, prior=1e-9)[
            "theta"
        ]
        for s in range(12)
    ]
    assert abs(np.mean(thetas) - 0.6) < 0.05
    people = followers(1, 1500, 0.6)
    result = survival_shift(Reported(), people, AS_OF, STRAIGHT, 1000)
    people["z"] += result["intercept"]
    hazard = np.logaddexp(0, people["z"] - result["intercept"])
    wanted = -np.expm1(-result["theta"] * hazard).sum()
    assert expit(people["z"]).sum() == pytest.approx(wanted, rel=1e-9)
    assert result["intercept"] < 0 and result["patients"] == len(people)


def test_only_the_window_counts_and_nothing_later():
    people = followers(2)
    result = survival_shift(Reported(), people, AS_OF, STRAIGHT, 1000)
    early = people["event"] < "2001-12-01"
    moved = people.assign(event=people["event"].mask(early, people["event"] - pd.Timedelta(days=1)))
    moved["followed_until"] = moved["event"].fillna(people["followed_until"])
    assert (
        survival_shift(Reported(), moved, AS_OF, STRAIGHT, 1000)["observed"] == result["observed"]
    )
    blind = people.assign(event=people["event"].where(people["event"] <= AS_OF))
    assert survival_shift(Reported(), blind, AS_OF, STRAIGHT, 1000) == result


def test_none_in_follow_up_changes_nothing_and_dates_are_needed():
    no_one = survival_shift(Reported(), followers(1)[:0], AS_OF, STRAIGHT, 1000)
    assert no_one["theta"] == 1 and no_one["intercept"] == 0
    even = survival_shift(Reported(), followers(1).assign(z=-1.0), AS_OF, STRAIGHT, 1000)
    assert np.isfinite(list(even.values())).all()
    with pytest.raises(LMError, match="event"):
        survival_shift(Reported(), followers(1).drop(columns="event"), AS_OF, STRAIGHT, 1000)


def test_the_measured_error_of_the_ladder_holds_its_level():
    table = pd.read_csv(settings().root / "reports" / "ladder" / "ladder.csv")
    known = table[table["scenario"] != "estimated"]
    assert (known["low"] <= 0.05).all() and set(table["method"]) >= {"closed", "bootstrap"}
    closed = known[(known["method"] == "closed") & (known["scenario"] == "keep")]
    assert (closed["too large"] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / closed["streams"])).all()


def test_what_is_claimed_of_the_ladder_stands_in_its_table():
    table = pd.read_csv(settings().root / "reports" / "ladder" / "ladder.csv")
    table = table.set_index(["method", "scenario", "patients"]).sort_index()
    result = table.loc["closed", RUNGS[0]]["intercept"]
    assert (
        result[200] > 0.7
        and result[200] > table.loc["closed, as published", RUNGS[0]]["intercept", 200]
    )
    for scenario, rung in (("intercept", RUNGS[0]), ("line", RUNGS[1]), ("nodes", "refit")):
        shares = table.loc["closed", rung][scenario]
        assert shares[500] >= 0.8 and shares[200] > table.loc["bootstrap", rung][scenario][200]
    assert table.loc[("closed", "estimated", 500), "too large"] > 0.1
