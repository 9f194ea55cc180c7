"""Rollout: who gets which model, what is shown at every run, and the limits of each kind."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, ndtr
from scipy.stats import chisquare, pearsonr

import lm.update.rollout
from lm.core.errors import LMError
from lm.core.limits import quoted
from lm.model.metrics import compare
from lm.update.rollout import (
    FEWEST_OUTCOMES,
    ROLLOUT_KINDS,
    ROLLOUT_RULES,
    SCALES,
    Answered,
    Effect,
    Rollout,
    anytime_interval,
    assign,
    assign_many,
    decide_rollout,
    effect,
    evidence_reach,
    judge,
    paired,
    place,
    posterior,
    review,
    sample,
    score_shadow,
    unpaired,
    widen,
)

ALL = [
    Rollout(),
    Rollout("shadow", 7),
    Rollout("canary", 7),
    Rollout("ab", 7, share=0.3),
    Rollout("bandit", 7),
]
IDS = [f"patient {i}" for i in range(2000)]


def frame(rollout, n, old=0.3, new=0.3, seed=0, shift=0.0):
    """Outcomes of n patients under a policy with champion 1; sd of either model's error."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(-1, 1.2, n)
    risks = expit(truth[:, None] + rng.normal(0, 1, (n, 2)) * (old, new) + [0, shift])
    inputs = assign_many(rollout, 1, [f"p{seed} {i}" for i in range(n)])
    mine = inputs.version.eq(rollout.challenger).to_numpy().astype(int)
    y = (rng.random(n) < expit(truth)).astype(float)
    who = np.arange(n)
    return inputs.assign(y=y, risk=risks[who, mine], other=risks[who, 1 - mine])


# The policy as a value


def test_the_room_is_pure():
    source = Path(lm.update.rollout.__file__).read_text(encoding="utf-8")
    used = set(re.findall(r"^from ((?:lm)?\.[\w.]+) import", source, re.M))
    assert used == {"..core.limits", "..core.errors", "..model.metrics"}
    assert not re.search(r"\b(?:open|now|random|Path|time)\(", source)


def random_policy(rng):
    """Any policy that keeps the rules."""
    kind = ROLLOUT_KINDS[rng.integers(5)]
    steps = tuple(np.sort(rng.choice(np.arange(1, 101), rng.integers(1, 6), False) / 100).tolist())
    cap = float(rng.uniform(0.01, 1))
    cleared = bool(rng.integers(2))
    share = {
        "canary": steps[rng.integers(len(steps))],
        "ab": float(rng.uniform(0.01, 0.99)),
        "bandit": float(rng.uniform(0, 1 if cleared else cap)),
    }.get(kind, 0.0)
    return Rollout(
        kind,
        int(rng.integers(1, 99)),
        share,
        "".join(map(chr, rng.integers(32, 0x2FFF, 9))),
        steps,
        cap,
        cleared,
        *map(int, rng.integers(100, 10**6, 2)),
        float(rng.uniform(0.0001, 0.25)),
        float(rng.uniform(0.5, 0.9999)),
        int(rng.integers(0, 99)),
    )


def test_json_gives_every_policy_back():
    rng = np.random.default_rng(0)
    for _ in range(300):
        policy = random_policy(rng)
        again = Rollout.from_dict(json.loads(json.dumps(policy.to_dict(), allow_nan=False)))
        assert again == policy and hash(again) == hash(policy)


def test_what_is_left_out_begins_where_the_kind_begins():
    begin = {
        p.kind: p.share
        for p in (Rollout.from_dict({"kind": k, "challenger": 3}) for k in ROLLOUT_KINDS)
    }
    assert begin == {"champion": 0, "shadow": 0, "canary": 0.05, "ab": 0.5, "bandit": 0.2}
    assert Rollout("bandit", 3, cap=0.9).share == 0.5
    assert Rollout("canary", 3, steps=[0.1, 0.4]).share == 0.1
    assert Rollout("canary", 3).salt != Rollout("canary", 4).salt
    assert Rollout.from_dict({}) == Rollout()


NAN, INF = float("nan"), float("inf")
WRONG = {
    "kind": ("green", "", None, 1, ["canary"]),
    "challenger": (0, -1, 1.0, "7", True, 10**10, [7], 10**400, NAN),
    "share": (-0.1, 1.1, "0.5", True, NAN, INF, -INF, [0.5], 10**400, -(10**400)),
    "salt": ("", 7, "x" * 201, ["a"]),
    "steps": ([], [0.5, 0.5], [0.5, 0.2], [0], [0.1, 1.1], ["a"], [NAN], 0.5, "ab", None, {}),
    "cap": (0, 1.5, "a", None, False, NAN),
    "cleared": (1, "yes", None),
    "least": (9, 100.0, "100", True, None, 10**10, 10**400, INF),
    "planned": (99, 1e4, None, True),
    "margin": (0, 0.3, NAN, "a", None, -0.1, True),
    "confidence": (0.4, 1, 1.0, NAN, None, "a"),
    "max_failed": (-1, 0.5, None, True),
}


@pytest.mark.parametrize("name", ROLLOUT_RULES)
def test_each_field_is_refused_with_its_name_its_value_and_its_rule(name):
    for value in WRONG[name]:
        with pytest.raises(LMError) as error:
            Rollout.from_dict({"kind": "ab", "challenger": 7} | {name: value})
        sentence = f"rollout: {name} = {quoted(value)} must be {ROLLOUT_RULES[name][1]}"
        assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ({"kind": "canary"}, "challenger = None must be a version: kind canary has a challenger"),
        ({"share": 0.5}, "share = 0.5 must be 0 where all patients get the champion"),
        ({"kind": "shadow", "challenger": 7, "share": 0.1}, "share = 0.1 must be 0 where the"),
        ({"kind": "canary", "challenger": 7, "share": 0.07}, "must be one of its steps 0.05, 0.25"),
        ({"kind": "ab", "challenger": 7, "share": 0}, "share = 0 must be above 0 and below 1"),
        ({"kind": "ab", "challenger": 7, "share": 1.0}, "share = 1.0 must be above 0 and below 1"),
        (
            {"kind": "bandit", "challenger": 7, "share": 0.21},
            "at most cap = 0.2 until it is cleared",
        ),
        ({"sahre": 0.5}, "sahre is unknown: choose from kind, challenger, share"),
        ({7: 1}, "7 is unknown"),
        ([], "rollout = \\[\\] must be an object"),
        (None, "rollout = None must be an object"),
        ("canary", "rollout = 'canary' must be an object"),
    ],
)
def test_what_does_not_go_together_is_refused(inputs, text):
    with pytest.raises(LMError, match=text):
        Rollout.from_dict(inputs)


def test_versions_from_tables_are_plain_numbers():
    policy = Rollout("ab", np.int64(7), np.float64(0.3))
    assert policy == Rollout("ab", 7, 0.3) and type(policy.challenger) is int
    json.dumps(policy.to_dict())


# Who gets which


def test_the_hash_is_what_it_was_when_the_first_patients_were_assigned():
    assert place("salt", "patient") == 0.6791469103246843
    assert assign(Rollout("canary", 7), 6, "patient") == Answered(
        6, "canary of 7 at 5 %: hash 0.9986"
    )


@pytest.mark.parametrize("salt", ["a", "challenger 7", "challenger 8", "übung", "\n"])
def test_places_are_uniform_and_salts_are_independent(salt):
    here = np.array([place(salt, name) for name in IDS])
    other = np.array([place(salt + "'", name) for name in IDS])
    assert here.min() >= 0 and here.max() < 1
    for bins in (10, 100):
        assert chisquare(np.histogram(here, np.linspace(0, 1, bins + 1))[0]).pvalue > 1e-4
    assert pearsonr(here, other).pvalue > 1e-4
    assert pearsonr(here[:-1], here[1:]).pvalue > 1e-4


def test_the_share_holds():
    for share in (0.01, 0.2, 0.5, 0.9):
        got = assign_many(Rollout("ab", 7, share), 6, range(20_000)).version.eq(7).mean()
        assert abs(got - share) < 4.5 * np.sqrt(share * (1 - share) / 20_000)


def test_widening_takes_the_challenger_from_no_patient():
    rng = np.random.default_rng(0)
    for _ in range(20):
        shares = np.sort(rng.uniform(0.001, 1, 4)).tolist()
        policy, had = Rollout("canary", 7, steps=shares), set()
        for share in shares:
            versions = assign_many(replace(policy, share=share), 6, IDS[:500]).version
            has = {name for name, version in zip(IDS, versions, strict=False) if version == 7}
            assert had <= has
            had = has


@pytest.mark.parametrize("policy", ALL, ids=ROLLOUT_KINDS)
def test_many_answers_are_the_single_answers(policy):
    for champion in (6, 7):
        many = assign_many(policy, champion, IDS[:200])
        assert list(many.columns) == ["version", "why", "shadow"]
        for row, name in zip(many.itertuples(index=False), IDS, strict=False):
            shadow = None if pd.isna(row.shadow) else row.shadow
            assert Answered(row.version, row.why, shadow) == assign(policy, champion, name)
    assert assign_many(policy, 6, []).empty
    assert list(assign_many(policy, 6, []).columns) == ["version", "why", "shadow"]


def test_one_patient_has_one_model_whatever_the_record():
    policy = Rollout("ab", 7)
    one = {assign(policy, 6, f"visit {i}", patient="anna").version for i in range(50)}
    assert len(one) == 1
    visits = [f"visit {i}" for i in range(50)]
    assert assign_many(policy, 6, visits, ["anna"] * 50).version.nunique() == 1
    assert assign(policy, 6, "x", patient="") != assign(policy, 6, "x")


def test_strange_names_are_answered_too():
    for name in ("", "\ud800", "a\x00b", 7, None, "x" * 100_000, "'; drop table"):
        assert assign(Rollout("ab", 7), 6, name).version in (6, 7)


def test_answers_are_the_same_in_another_process():
    program = (
        "import json, sys; from lm.update.rollout import *; "
        "from lm.update.rollout import Rollout, assign_many;"
        "p = Rollout.from_dict(json.loads(sys.argv[1]));"
        "f = assign_many(p, 6, [f'patient {i}' for i in range(300)]);"
        "print(json.dumps(f[['version', 'why']].to_numpy().tolist()))"
    )
    policy = Rollout("bandit", 7, share=0.1234, cleared=True)
    here = assign_many(policy, 6, IDS[:300])[["version", "why"]].to_numpy().tolist()
    command = [sys.executable, "-c", program, json.dumps(policy.to_dict())]
    env = os.environ | {"PYTHONHASHSEED": "4711"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == here


def test_the_phrase_never_contradicts_the_answer():
    policy = Rollout("ab", 7, share=0.3)
    for name in IDS:
        version, why, _ = assign(policy, 6, name)
        quoted = float(why.split("hash ")[1])
        assert why.startswith("ab of 7 at 30 %: hash 0.")
        assert quoted < 0.3 if version == 7 else quoted >= 0.3


def test_none_gets_a_shadow_and_a_promoted_challenger_rests():
    assert assign(Rollout("shadow", 7), 6, "a") == Answered(6, "shadow of 7", 7)
    for policy in ALL:
        assert assign(policy, 7, "a") == Answered(7, "champion", None)


# What outcomes say


def test_with_one_share_the_estimate_is_the_difference_of_means_and_its_variance_is_welchs():
    rng = np.random.default_rng(2)
    arm, loss = (rng.random(5000) < 0.3).astype(float), rng.exponential(0.1, 5000)
    value, information = unpaired(arm, np.full(5000, 0.3), loss)
    a, b = loss[arm == 1], loss[arm == 0]
    assert value == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert 1 / information == pytest.approx(a.var() / len(a) + b.var() / len(b), rel=0.06)


def test_a_small_arm_without_events_is_not_sure():
    rng = np.random.default_rng(0)
    arm, loss = np.repeat([1.0, 0.0], [50, 950]), rng.exponential(0.1, 1000)
    loss[:50] = 0.01
    alone = loss[:50].var() / 50 + loss[50:].var() / 950
    assert 1 / unpaired(arm, np.full(1000, 0.05), loss)[1] > 5 * alone


def test_a_hard_year_is_not_blamed_on_the_challenger():
    share, results = np.repeat([0.05, 0.5], 2000), []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        arm = (rng.random(4000) < share).astype(float)
        loss = rng.exponential(np.repeat([0.05, 0.2], 2000))
        value, information = unpaired(arm, share, loss)
        results.append((value * information**0.5, loss[arm == 1].mean() - loss[arm == 0].mean()))
    z, plain = np.array(results).T
    assert plain.mean() > 0.03 and abs(z.mean()) < 0.35 and 0.8 < z.std() < 1.2


def test_arms_without_comparison_say_nothing():
    assert unpaired(np.array([]), np.array([]), np.array([])) == pytest.approx(
        (NAN, 0), nan_ok=True
    )
    for arm, share in ((0, 0.2), (1, 1.0), (0, 0.0), (1, 0.2)):
        assert unpaired(np.full(99, float(arm)), np.full(99, share), np.ones(99))[1] == 0
    assert paired(np.array([0.1]))[1] == 0
    value, information = paired(np.zeros(100))
    assert value == 0 and np.isfinite(information)


def test_weights_count_as_in_the_comparison_of_two_models():
    policy, rng = Rollout("ab", 7, 0.4), np.random.default_rng(4)
    table = frame(policy, 3000, 0.3, 0.8)
    table = table.assign(ipcw=rng.integers(1, 6, len(table)).astype(float))
    mine = table.version.eq(7)
    old, new = table.other.where(mine, table.risk), table.risk.where(mine, table.other)
    expected = compare(table.y, new, old, 0.9, table.ipcw)
    result = effect(policy, table)
    assert result.value == pytest.approx(expected.value)
    assert result.value - 1.6449 / result.information**0.5 == pytest.approx(expected.low, abs=1e-6)
    again, alone = table.loc[table.index.repeat(table.ipcw.astype(int))], ["other", "ipcw"]
    for columns in (["ipcw"], alone):  # Paired and unpaired: a weight of 3 is three such patients
        whole = effect(policy, table.drop(columns=[c for c in columns if c != "ipcw"]))
        repeated = effect(policy, again.drop(columns=columns))
        assert whole.value == pytest.approx(repeated.value, abs=1e-12)
        assert whole.information < repeated.information  # But they are no three patients
        equal = effect(policy, table.drop(columns=columns).assign(ipcw=3.0))
        assert equal == pytest.approx(effect(policy, table.drop(columns=columns)))
    silent = table.assign(risk=old, other=new, version=1)
    assert score_shadow(silent).difference.value == pytest.approx(expected.value)


def test_both_risks_give_the_paired_difference_of_each_version():
    policy = Rollout("ab", 7, 0.4)
    table = frame(policy, 3000, 0.3, 0.8)
    mine = table.version.eq(7)
    old, new = table.other.where(mine, table.risk), table.risk.where(mine, table.other)
    result, expected = effect(policy, table), compare(table.y, new, old, 0.9)
    ends = (
        result.value - 1.6449 / result.information**0.5,
        result.value + 1.6449 / result.information**0.5,
    )
    assert result.paired and result.value == pytest.approx(expected.value)
    assert ends == pytest.approx(expected[1:], abs=1e-6)
    alone = effect(policy, table.drop(columns="other"))
    assert (
        not alone.paired
        and alone[2:4] == result[2:4]
        and alone.information < result.information / 3
    )


def test_rows_of_other_policies_and_rows_without_an_outcome_say_nothing():
    policy = Rollout("canary", 7, share=0.25)
    table = frame(policy, 1000).drop(columns="other")
    noise = table[:300].assign(risk=1.0, why="canary of 8 at 25 %: hash 0.1")
    rest = table[:300].assign(risk=1.0, why="champion")
    absent = [table[:300].assign(**{name: np.nan}) for name in ("y", "risk", "version")]
    assert effect(policy, pd.concat([table, noise, rest, *absent])) == effect(policy, table)
    early = frame(replace(policy, share=0.05), 800, seed=1).drop(columns="other")
    both = effect(policy, pd.concat([early, table]))
    assert both.here == table.version.eq(7).sum() < both.challenger


def test_without_phrases_every_row_counts_at_the_share_in_force():
    policy = Rollout("ab", 7, 0.3)
    table = frame(policy, 500).drop(columns="other")
    assert effect(policy, table.drop(columns="why")) == effect(policy, table)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"y": 2}, "y must be 0 or 1"),
        ({"y": "sick"}, "y must be 0 or 1"),
        ({"risk": 1.5}, "risk must be a number from 0 to 1"),
        ({"risk": "high"}, "risk must be a number from 0 to 1"),
        ({"risk": INF}, "risk must be a number from 0 to 1"),
        ({"other": -0.1}, "other must be a number from 0 to 1"),
    ],
)
def test_values_that_are_no_outcomes_are_refused(change, text):
    table = frame(Rollout("ab", 7), 50)
    with pytest.raises(LMError, match=text):
        review(Rollout("ab", 7), table.assign(**change))


@pytest.mark.parametrize("name", ["version", "y", "risk"])
def test_absent_columns_are_named(name):
    table = frame(Rollout("ab", 7), 50)
    with pytest.raises(LMError, match=f"lack {name}: they need version, y and risk"):
        review(Rollout("canary", 7), table.drop(columns=name))


# Sure at every run


def test_the_interval_ends_where_the_mixture_reaches_its_bound():
    for information in (1.0, 1e3, 1e6, 1e9):
        for margin, confidence in ((0.005, 0.95), (0.05, 0.99), (0.0001, 0.6)):
            far = evidence_reach(information, margin, confidence)
            scale = margin * SCALES
            s = 1 + information * scale**2
            u = far * information * scale / np.sqrt(s)
            mixture = np.mean(2 / np.sqrt(s) * np.exp(u**2 / 2) * ndtr(u))
            assert mixture == pytest.approx(1 / (1 - confidence), rel=1e-6)


def test_more_information_and_less_confidence_give_shorter_intervals():
    far = evidence_reach(np.logspace(0, 9, 40), 0.005, 0.95)
    assert (np.diff(far) < 0).all() and (far > 1.645 * np.logspace(0, 9, 40) ** -0.5).all()
    assert evidence_reach(1e4, 0.005, 0.99) > evidence_reach(1e4, 0.005, 0.9)
    assert np.isfinite(evidence_reach(0.0, 0.005, 0.95))


def test_a_brownian_motion_without_drift_leaves_as_rarely_as_stated():
    rng = np.random.default_rng(0)
    information = np.geomspace(1e2, 1e7, 600)
    steps = rng.normal(size=(2000, 600)) * np.sqrt(np.diff(information, prepend=0))
    bounds = evidence_reach(information, 0.005, 0.95) * information
    out = (np.cumsum(steps, axis=1) > bounds).any(axis=1).mean()
    assert 0.015 < out <= 0.05


def test_too_few_outcomes_say_nothing():
    policy = Rollout("canary", 7)
    assert np.isnan(anytime_interval(policy, Effect(0.5, 1e9, 10_000, FEWEST_OUTCOMES - 1)).low)
    assert anytime_interval(policy, Effect(0.5, 1e9, 10_000, FEWEST_OUTCOMES)).low > 0
    assert np.isnan(anytime_interval(policy, Effect(0.5, 1e9, FEWEST_OUTCOMES - 1, 0, 0, True)).low)


def life(rollout, seed, new, shift=0.0, n=4000, every=200, delay=400, pairs=True):
    """Every act of a policy over n patients whose outcomes come late; champion's error sd 0.3."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(-1, 1.2, n)
    y = rng.random(n) < expit(truth)
    loss = (expit(truth[:, None] + rng.normal(0, 1, (n, 2)) * (0.3, new)) - y[:, None]) ** 2
    loss[:, 1] += shift
    stands, share, acts = rng.random(n), np.zeros(n), []
    for start in range(0, n, every):
        share[start : start + every] = rollout.share
        m = max(0, start + every - delay)
        arm = (stands[:m] < share[:m]).astype(float)
        inputs = np.where(arm == 1, loss[:m, 1], loss[:m, 0])
        result = paired(loss[:m, 1] - loss[:m, 0]) if pairs else unpaired(arm, share[:m], inputs)
        here = int(arm[share[:m] == rollout.share].sum())
        done = decide_rollout(
            rollout, Effect(*result, m - int(arm.sum()), int(arm.sum()), here, pairs)
        )
        acts.append((done.action, rollout.share, done.rollout.cleared))
        rollout = done.rollout
        if done.action in ("retreat", "promote"):
            break
    return acts


def test_an_equal_canary_rarely_retreats_and_a_poor_one_nearly_always():
    steps = (0.1, 0.3, 1.0)
    for pairs in (True, False):
        policy = Rollout("canary", 7, steps=steps)
        equal = [life(policy, seed, 0.3, pairs=pairs)[-1][0] for seed in range(150)]
        assert equal.count("retreat") <= 0.05 * 150
    poor = [life(policy, seed, 0.9) for seed in range(60)]
    assert sum(acts[-1][0] == "retreat" for acts in poor) >= 54
    assert all(share == steps[0] for acts in poor for _, share, _ in acts)


def test_a_canary_that_is_worse_by_the_margin_is_rarely_widened():
    policy = Rollout("canary", 7, steps=(0.2, 1.0), margin=0.01)
    for pairs in (True, False):
        lives = [life(policy, seed, 0.3, shift=0.01, pairs=pairs) for seed in range(150)]
        assert sum(any(act == "move" for act, _, _ in acts) for acts in lives) <= 0.05 * 150
    fine = [life(policy, seed, 0.3, n=6000)[-1][0] for seed in range(40)]
    assert fine.count("promote") >= 36


# Canary


def test_a_canary_climbs_step_by_step_and_asks_for_outcomes_at_each():
    policy, known, climbed = Rollout("canary", 7, margin=0.02), [], []
    for seed in range(60):
        known.append(frame(policy, 300, seed=seed))
        done = widen(policy, pd.concat(known))
        if done.action == "move":
            at_step = [
                f.version.eq(7).sum()
                for f in known
                if f.why.str.contains(f" at {100 * policy.share:g} %").all()
            ]
            assert sum(at_step) >= policy.least
            climbed.append(done.rollout.share)
            assert done.rollout == replace(policy, share=done.rollout.share)
            assert done.reason.startswith(f"widen from {100 * policy.share:g} % to")
        policy = done.rollout
        if done.action == "promote":
            break
    assert climbed == [0.25, 0.5, 1.0] and policy.share == 1
    assert done.reason.startswith("promote: at 100 %, the last step") and done.rollout == policy


def test_few_outcomes_of_a_step_keep_it():
    policy = Rollout("canary", 7, share=0.5)
    sure = Effect(0.0, 1e8, 5000, 5000, 99, True)
    assert decide_rollout(policy, sure).action == "stay"
    assert "99 of 100 outcomes of this step" in decide_rollout(policy, sure).reason
    assert decide_rollout(policy, sure._replace(here=100)).rollout.share == 1.0


def test_a_retreat_gives_everybody_the_champion_and_forgets_the_way_to_the_challenger():
    policy = Rollout("canary", 7, share=0.5, margin=0.003)
    done = decide_rollout(policy, Effect(0.05, 1e6, 500, 500, 40))
    assert done.action == "retreat" and "shown to be worse" in done.reason
    assert done.rollout == replace(policy, kind="champion", challenger=None, share=0.0)
    assert set(assign_many(done.rollout, 6, IDS[:99]).version) == {6}
    assert Rollout.from_dict(done.rollout.to_dict()) == done.rollout


@pytest.mark.parametrize("policy", ALL[1:], ids=ROLLOUT_KINDS[1:])
def test_requests_that_fail_lead_back_at_once(policy):
    table = frame(policy, 20)
    if policy.kind == "shadow":
        table = table.assign(version=1)
    allowed = replace(policy, max_failed=2)
    assert review(allowed, table, failed=2).action != "retreat"
    done = review(allowed, table, failed=3)
    assert done.action == "retreat" and done.rollout.kind == "champion"
    assert "challenger 7 failed 3 requests, 2 allowed" in done.reason


def test_each_verb_asks_for_its_kind():
    table = frame(Rollout("ab", 7), 50)
    for verb, kind in ((widen, "canary"), (judge, "ab"), (sample, "bandit")):
        for policy in ALL:
            if policy.kind != kind:
                with pytest.raises(LMError, match=f"kind = '{policy.kind}' must be {kind} to be"):
                    verb(policy, table)
    assert review(Rollout(), table).reason == "all patients get the champion"


def test_none_at_all_is_an_answer_for_every_kind():
    for policy in ALL:
        done = review(policy, frame(policy, 0))
        assert done.action == "stay" and done.rollout == policy and done.reason


# Shadow


def test_a_shadow_is_scored_on_the_same_patients_and_exchanging_the_two_turns_the_sign():
    rng = np.random.default_rng(0)
    truth = rng.normal(-1, 1, 2000)
    table = pd.DataFrame({"y": rng.random(2000) < expit(truth), "risk": expit(truth), "other": 0.3})
    here = score_shadow(table)
    there = score_shadow(table.rename(columns={"risk": "other", "other": "risk"}))
    assert here.patients == 2000 and here.difference.value == pytest.approx(-there.difference.value)
    assert here.verdict.endswith("shown to be worse") and there.verdict.endswith(
        "shown to be better"
    )
    plain = compare(table.y, table.other, table.risk, 0.9)
    assert here.difference.low < plain.low < plain.value == pytest.approx(here.difference.value)
    same = score_shadow(table.assign(other=table.risk))
    assert same.difference.value == 0 and "not to be worse by more than 0.005" in same.verdict
    assert "too few outcomes" in score_shadow(table[:9]).verdict
    with pytest.raises(LMError, match="lack other"):
        score_shadow(table.drop(columns="other"))


def test_a_shadow_changes_nothing_by_itself():
    policy = Rollout("shadow", 7)
    table = frame(policy, 2000, 0.3, 0.9).assign(version=1)
    done = review(policy, table)
    assert done.action == "stay" and done.rollout == policy and "shown to be worse" in done.reason
    assert done.reason == score_shadow(table, policy).verdict


# A/B test


@pytest.mark.slow
def test_an_ab_test_is_judged_once_at_the_planned_number():
    policy = Rollout("ab", 7, planned=800)
    table = frame(policy, 2000)
    assert judge(policy, table[:799]).action == "stay"
    assert "799 of 800 outcomes" in judge(policy, table[:799]).reason
    done = judge(policy, table[:800])
    assert done.action in ("promote", "retreat")
    later = pd.concat([table[:800], table[800:].assign(risk=1.0, other=0.0)])
    assert judge(policy, later) == done


def test_an_ab_test_keeps_its_error_rates():
    policy, ends = Rollout("ab", 7, planned=1000, margin=0.02), {0.0: [], 0.02: []}
    for shift, acts in ends.items():
        acts += [life(policy, s, 0.3, shift, n=1400)[-1][0] for s in range(150)]
    assert ends[0.0].count("retreat") <= 0.1 * 150
    assert ends[0.02].count("promote") <= 0.1 * 150


def test_an_ab_test_stops_early_for_worse_outcomes_alone():
    policy = Rollout("ab", 7, planned=100_000)
    assert judge(policy, frame(policy, 2000, 0.3, 1.5)).action == "retreat"
    assert judge(policy, frame(policy, 2000, 1.5, 0.3)).action == "stay"


# Bandit


def test_the_cap_is_never_exceeded_before_the_challenger_is_cleared():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(400):
        cap = float(rng.uniform(0.05, 0.6))
        policy = Rollout("bandit", 7, cap=cap, least=10)
        for n in np.cumsum(rng.integers(1, 200, 8)).tolist():
            value, information = rng.normal(0, 0.02), rng.lognormal(9, 3)
            result = Effect(value, information, n, n, n, bool(rng.integers(2)))
            policy, _, action = decide_rollout(policy, result)
            quoted = anytime_interval(policy, result).high <= policy.margin
            assert policy.share <= cap or (policy.cleared and quoted)
            seen.add((action, policy.cleared, policy.share > cap))
            if action in ("retreat", "promote"):
                break
    assert {("move", False, False), ("retreat", False, False), ("promote", True, True)} <= seen
    assert ("move", True, True) in seen or ("move", True, False) in seen


def test_the_cap_comes_back_when_the_evidence_goes():
    policy = Rollout("bandit", 7, share=0.6, cleared=True)
    done = decide_rollout(policy, Effect(0.0, 1e3, 500, 500, 100))
    assert not done.rollout.cleared and done.rollout.share <= policy.cap


def test_a_bandit_moves_by_its_posterior_and_not_before_the_least_outcomes():
    policy = Rollout("bandit", 7, cap=0.5)
    result = Effect(0.004, 2e4, 900, 99, 99)
    assert decide_rollout(policy, result).rollout == policy
    done = decide_rollout(policy, result._replace(challenger=100))
    mean, sd = posterior(policy, result)
    assert done.rollout.share == pytest.approx(ndtr(-mean / sd), abs=1e-4)
    assert done.action == "move" and mean == pytest.approx(0.004 * 2e4 / (2e4 + 0.015**-2))
    got = assign_many(done.rollout, 6, range(20_000)).version.eq(7).mean()
    assert got == pytest.approx(done.rollout.share, abs=0.015)
    again = assign_many(Rollout.from_dict(done.rollout.to_dict()), 6, IDS)
    pd.testing.assert_frame_equal(again, assign_many(done.rollout, 6, IDS))


def test_a_bandit_never_goes_on_with_a_model_that_is_worse_by_the_margin():
    policy = Rollout("bandit", 7, confidence=0.8)
    done = decide_rollout(policy, Effect(0.02, 1.2e4, 900, 40))
    assert anytime_interval(policy, Effect(0.02, 1.2e4, 900, 40)).low < 0  # The posterior alone
    assert done.action == "retreat" and "worse by the margin with probability 0.8" in done.reason
    lives = [life(Rollout("bandit", 7), seed, 0.9) for seed in range(40)]
    assert sum(acts[-1][0] == "retreat" for acts in lives) >= 36


def test_a_bandit_stops_when_it_is_decided():
    policy = Rollout("bandit", 7)
    better, same = Effect(-0.02, 1e6, 900, 200), Effect(0.0, 1e7, 900, 200)
    done = decide_rollout(policy, better)
    assert (done.action, done.rollout.share, done.rollout.cleared) == ("promote", 1.0, True)
    done = decide_rollout(policy, same)
    assert done.action == "retreat" and "no better by more than 0.005" in done.reason


def test_late_outcomes_change_the_share_only_when_they_are_known():
    policy = Rollout("bandit", 7)
    table = frame(policy, 1500, seed=3).drop(columns="other")
    open_ = table.assign(y=table.y.where(table.index < 700))
    assert sample(policy, open_) == sample(policy, table[:700])
