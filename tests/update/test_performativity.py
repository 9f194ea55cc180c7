"""Decisions, weights by hand and by theory, refusals, and a clinic whose truth is known."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit

from lm.core.errors import LMError
from lm.core.settings import settings
from lm.core.study import load_study
from lm.data.synthetic import synthetic
from lm.model.predict import fit
from lm.update.performativity import (
    LEAST_UNTREATED,
    TREATMENT_POLICIES,
    Clinic,
    acted,
    adherence_weights,
    against_truth,
    relearn,
    rounds,
    visit,
)

STUDY = load_study("rotterdam")
WOMEN = synthetic(STUDY, 4000, seed=23)
BATCHES, TEST = [WOMEN[:1000], WOMEN[1000:2000]], WOMEN[2000:]


def shown(n, seed=0, middle=-1.5):
    """n patients and the log-odds that were shown."""
    z = np.random.default_rng(seed).normal(middle, 1, n)
    return pd.DataFrame({"record_id": [f"p{i}" for i in range(n)], "log_odds": z})


def reported(known, which, action="agree", day="2024-01-01"):
    """One decision for each of some patients."""
    ids = known["record_id"][which]
    return pd.DataFrame({"record_id": ids, "action": action, "decided_at": pd.Timestamp(day)})


@pytest.mark.parametrize(
    ("risk", "action", "heeded"),
    [
        *((0.3, "agree", True), (0.3, "override", False), (0.3, "unsure", False)),
        *((0.1, "agree", False), (0.1, "override", True), (0.1, "unsure", False)),
        *((0.2, "agree", True), (0.2, "override", False), (np.nan, "agree", False)),
        *((0.3, None, False), (0.1, None, False)),
    ],
)
def test_the_convention(risk, action, heeded):
    known = pd.DataFrame({"record_id": ["a"], "log_odds": [logit(risk)]})
    decisions = reported(known, slice(0, 1 if action else 0), action)
    assert acted(known, decisions, 0.2).tolist() == [heeded]


def test_the_last_decision_counts_and_strangers_do_not():
    known = pd.DataFrame({"record_id": ["a", "b"], "log_odds": [1.0, 1.0]}, index=[7, 3])
    first, last = (
        reported(known, slice(0, 2)),
        reported(known, slice(0, 1), "override", "2024-02-01"),
    )
    stranger = first.assign(record_id="x")
    both = pd.concat([last, first, stranger])
    assert acted(known, both, 0.2).to_dict() == {7: False, 3: True}
    assert acted(known, both, 0.2, above=("agree", "override")).all()


def test_weights_by_hand_where_everybody_is_alike():
    known = pd.DataFrame({"record_id": range(100), "log_odds": 0.5})
    result = adherence_weights(known, reported(known, slice(0, 60)), 0.2)
    assert result.acted.sum() == 60 and not result.weights[:60].any()
    assert np.allclose(result.chance, 0.6, atol=1e-6) and np.allclose(result.weights[60:], 1)
    assert result.effective == pytest.approx(40) and result.cut == 0
    assert "60 of 100 patients were acted on" in result.text


def test_the_weighted_patients_have_the_risks_of_all():
    known = shown(6000)
    warned = known["log_odds"] >= logit(0.2)
    heed = warned & (np.random.default_rng(1).random(6000) < expit(known["log_odds"] + 1.2))
    result = adherence_weights(known, reported(known, heed), 0.2)
    z, w = known["log_odds"], result.weights
    assert abs(np.average(z, weights=w) - z.mean()) < 0.04 < z.mean() - z[~heed].mean()
    assert abs(np.average(z**2, weights=w) - (z**2).mean()) < 0.2
    assert w.sum() == pytest.approx((~heed).sum(), rel=0.03)
    assert result.effective == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert np.allclose(w[~warned], (~heed).mean()) and (result.chance[~warned] == 0).all()


def test_the_weighted_share_of_events_is_that_without_acts():
    misses, naive = [], []
    for seed in range(60):
        rng, known = np.random.default_rng(seed), shown(2000, seed)
        y0 = rng.random(2000) < expit(known["log_odds"])
        heed = (known["log_odds"] >= logit(0.2)) & (rng.random(2000) < 0.8)
        y = y0 & ~(heed & (rng.random(2000) < 0.9))
        result = adherence_weights(known, reported(known, heed), 0.2)
        misses.append(np.average(y, weights=result.weights) - y0.mean())
        naive.append(y.mean() - y0.mean())
    error = np.std(misses, ddof=1) / np.sqrt(60)
    assert abs(np.mean(misses)) < 3 * error < 0.01 and np.mean(naive) < -0.08


def test_acts_in_spite_of_a_low_risk_have_their_own_chance():
    known, rng = shown(3000), np.random.default_rng(2)
    warned = known["log_odds"] >= logit(0.2)
    low, high = ~warned & (rng.random(3000) < 0.1), warned & (rng.random(3000) < 0.6)
    both = pd.concat([reported(known, low, "override"), reported(known, high)])
    result = adherence_weights(known, both, 0.2)
    assert result.chance[~warned].mean() == pytest.approx(0.1, abs=0.02)
    assert result.chance[warned].mean() == pytest.approx(0.6, abs=0.04)
    assert adherence_weights(known, both, 0.2, below=()).acted.equals(high.rename("acted"))


def test_those_to_whom_nothing_was_shown_count_like_those_below_the_threshold():
    known = shown(2000)
    known.loc[:499, "log_odds"] = np.nan
    heed = (known["log_odds"] >= logit(0.2)) & (np.random.default_rng(3).random(2000) < 0.5)
    result = adherence_weights(known, reported(known, heed), 0.2)
    assert result.weights.notna().all() and result.weights[:500].nunique() == 1
    assert result.weights[0] == result.weights[known["log_odds"] < -3].iloc[0]


def test_large_weights_are_cut_and_counted():
    known = shown(6000, middle=0.0)
    heed = (known["log_odds"] >= logit(0.2)) & (np.random.default_rng(4).random(6000) < 0.95)
    wide, cut = (
        adherence_weights(known, reported(known, heed), 0.2, largest=k) for k in (1e9, 5.0)
    )
    assert wide.cut == 0 < cut.cut == (~heed & (known["log_odds"] >= logit(0.2))).sum()
    assert cut.weights.max() == pytest.approx(5 * (~heed).mean())
    assert wide.weights.max() > 2 * cut.weights.max()
    assert cut.effective > wide.effective and "weights were cut" in cut.text


@pytest.mark.parametrize("spared", [0, 1, LEAST_UNTREATED - 1])
def test_none_to_use_is_refused_in_one_sentence(spared):
    known = shown(1000)
    warned = np.flatnonzero(known["log_odds"] >= logit(0.2))
    with pytest.raises(
        LMError, match=f"and {spared} were not .at least {LEAST_UNTREATED}"
    ) as error:
        adherence_weights(known, reported(known, warned[spared:]), 0.2)
    assert "untreated cannot be estimated" in str(error.value) and "\n" not in str(error.value)


def test_a_risk_at_which_everybody_was_acted_on_is_refused():
    known, rng = shown(2000, middle=0.0), np.random.default_rng(5)
    z = known["log_odds"]
    heed = (z >= logit(0.2)) & ((z > 0) | (rng.random(2000) < 0.3))
    with pytest.raises(LMError, match="had no counterpart at their risk who was not"):
        adherence_weights(known, reported(known, heed), 0.2)


def test_none_and_nothing_decided():
    known = shown(50)
    none = adherence_weights(known, reported(known, slice(0, 0)), 0.2)
    assert (none.weights == 1).all() and none.effective == 50
    empty = adherence_weights(known[:0], reported(known, slice(0, 0)), 0.2)
    assert len(empty.weights) == 0 and empty.effective == 0


def test_the_truth_is_judged_as_a_double_loop_does():
    rng = np.random.default_rng(6)
    truth, risk = rng.random(60), np.round(rng.random(60), 1)
    wins = (risk[:, None] > risk) + 0.5 * (risk[:, None] == risk)
    mass = truth[:, None] * (1 - truth)
    result = against_truth(truth, risk, 0.5)
    assert result["auroc"] == pytest.approx((wins * mass).sum() / mass.sum(), rel=1e-9)
    assert result["oe"] == pytest.approx(truth.sum() / risk.sum())
    assert result["warned"] == pytest.approx(np.mean(risk[truth >= 0.5] >= 0.5))
    assert np.isnan(against_truth(truth / 10, risk, 0.5)["warned"])


@pytest.mark.parametrize(("adherence", "effect"), [(0, 1), (1, 0), (1, 1), (0.6, 0.5)])
def test_the_clinic_acts_and_helps_as_often_as_it_says(adherence, effect):
    clinic = Clinic(adherence=adherence, effect=effect)
    z = logit(WOMEN["truth"]).to_numpy()
    seen, decisions = visit(clinic, WOMEN, z, np.random.default_rng(7))
    warned, act = z >= logit(0.2), acted(seen, decisions, 0.2).to_numpy()
    assert not act[~warned].any() and abs(act[warned].mean() - adherence) < 0.04
    sick = act & (WOMEN["y"] == 1).to_numpy()
    spared = (WOMEN["y"] != seen["y"]).to_numpy()
    assert not spared[~sick].any()
    assert not sick.any() or abs(spared[sick].mean() - effect) < 0.06


def test_clinicians_who_know_more_act_where_the_outcome_would_come():
    z = logit(WOMEN["truth"]).to_numpy()
    clinic = Clinic(adherence=0.5, hidden=4.0)
    seen, decisions = visit(clinic, WOMEN, z, np.random.default_rng(8))
    act, warned = acted(seen, decisions, 0.2).to_numpy(), z >= logit(0.2)
    sick = (WOMEN["y"] == 1).to_numpy()
    odds = [(a := act[warned & who].mean()) / (1 - a) for who in (sick, ~sick)]
    assert 2.5 < odds[0] / odds[1] < 6.5 and abs(odds[1] - 1) < 0.3


@pytest.mark.parametrize(
    "wrong",
    [
        *({"adherence": 1.2}, {"adherence": np.nan}, {"effect": -0.1}),
        *({"threshold": 0.0}, {"threshold": 1.0}, {"hidden": 0.0}, {"hidden": np.inf}),
    ],
)
def test_an_impossible_clinic_is_refused(wrong):
    with pytest.raises(LMError):
        Clinic(**wrong)


def test_where_no_patient_is_acted_on_all_policies_learn_the_same():
    clinic = Clinic(adherence=0.0)
    ends = {p: rounds(STUDY, BATCHES, TEST, clinic, p).iloc[-1] for p in TREATMENT_POLICIES[1:]}
    assert len({(e["auroc"], e["oe"], e["warned"]) for e in ends.values()}) == 1


def test_one_naive_retraining_unlearns_the_warnings_and_the_weights_keep_them():
    clinic = Clinic(adherence=0.9, effect=1.0)
    ends = {p: rounds(STUDY, BATCHES, TEST, clinic, p, seed=2).iloc[-1] for p in TREATMENT_POLICIES}
    assert ends["naive"]["auroc"] < 0.68 < 0.7 < ends["weighted"]["auroc"]
    assert ends["naive"]["warned"] < 0.3 < 0.6 < ends["weighted"]["warned"]
    assert ends["naive"]["oe"] > 1.5 and abs(ends["weighted"]["oe"] - 1) < 0.35
    assert ends["oracle"]["auroc"] > 0.73 and ends["weighted"]["effective"] < 700
    again = rounds(STUDY, BATCHES, TEST, clinic, "weighted", seed=2).iloc[-1]
    assert again.equals(ends["weighted"])


def test_where_every_warning_is_heeded_the_model_stays_and_the_reason_reported():
    result = rounds(STUDY, BATCHES, TEST, Clinic(adherence=1.0), "weighted")
    assert result["auroc"].nunique() == 1 and "cannot be estimated" in result["reason"].iloc[-1]
    assert result["acted"].iloc[-1] > 0.2 and result["effective"].iloc[-1] == 0


def test_the_weights_go_into_the_fit_of_the_machine():
    model = fit(STUDY, BATCHES[0])
    seen, decisions = visit(
        Clinic(), BATCHES[1], model.log_odds(BATCHES[1]), np.random.default_rng(9)
    )
    result = adherence_weights(seen, decisions, 0.2)
    by_hand = fit(STUDY, seen, weights=result.weights)
    learned, effective, reason = relearn(
        STUDY, "weighted", model, BATCHES[1], seen, decisions, Clinic()
    )
    assert learned.fingerprint() == by_hand.fingerprint() != model.fingerprint()
    assert effective == result.effective and reason == ""
    with pytest.raises(LMError, match="policy 'hope' is unknown"):
        relearn(STUDY, "hope", model, BATCHES[1], seen, decisions, Clinic())


def test_what_is_claimed_of_the_loops_stands_in_their_table():
    folder = settings().root / "reports" / "performativity"
    table = pd.read_csv(folder / "performativity.csv", index_col=["arm", "policy"])
    heeded = [f"adherence {share}" for share in ("0.3", "0.5", "0.7", "0.9")]
    naive, weighted, left_out, oracle = (
        table.xs(policy, level="policy") for policy in ("naive", "weighted", "left out", "oracle")
    )
    # The harm grows with adherence; at 0.9 one naive retraining takes the AUROC from 0.75 to 0.54
    assert naive.loc[heeded, "auroc"].is_monotonic_decreasing
    assert (
        naive.loc["adherence 0.9", "first"] < 0.6
        and naive.loc["adherence 0.9", "worst_high"] < 0.52
    )
    # The weights keep the AUROC within 0.02 of the oracle's and the size of the risks right
    lost = oracle["auroc"] - weighted["auroc"]
    assert (lost[heeded] < 0.02).all() and (weighted.loc[heeded, "auroc_low"] > 0.72).all()
    assert weighted.loc[heeded, "oe"].between(0.98, 1.02).all()
    # Leaving out ranks as well or better; where the truth is bent its risks are too low by a tenth
    assert (left_out.loc[heeded, "auroc"] > weighted.loc[heeded, "auroc"] - 0.002).all()
    assert left_out.loc["bent, 0.9", "oe_low"] > 1.1 > 1.05 > weighted.loc["bent, 0.9", "oe_high"]
    # Learning from all rounds hides the harm from the AUROC, not from those who need a warning
    assert naive.loc["memory, 0.9", "auroc"] > 0.74 > 0.5 > naive.loc["memory, 0.9", "warned"]
    # It fails where clinicians know more, and refuses where all warnings are heeded
    assert (
        weighted.loc["hidden, 0.7", "oe_low"] > 1.2 and (weighted.loc[heeded, "refused"] == 0).all()
    )
    assert weighted.loc["adherence 1", "refused"] == 1
    # Against drift frozen is no answer: its risks are too high by a quarter or more
    assert table.loc[("drift, 0.9", "frozen"), "oe_high"] < 0.75


def test_what_is_claimed_of_the_monitor_stands_in_its_table():
    folder = settings().root / "reports" / "performativity"
    table = pd.read_csv(folder / "monitor.csv", index_col=["arm", "way"])
    seen, weighted, left_out, free = (
        table.loc[("adherence 0.9", way)]
        for way in ("as observed", "weighted", "left out", "without acts")
    )
    assert seen["auroc"] < 0.55 and seen["oe"] < 0.5
    assert left_out["auroc_high"] < free["auroc_low"] and abs(left_out["oe"] - 1) < 0.05
    assert weighted["auroc_low"] < free["auroc"] < weighted["auroc_high"]
    assert weighted["oe_low"] < free["oe"] < weighted["oe_high"]
    assert table.loc[("hidden, 0.7", "weighted"), "oe_high"] < 0.8


def test_the_page_of_the_benchmark_states_what_its_tables_show():
    root = settings().root
    notebook = (root / "nbs" / "benchmarks" / "performativity.ipynb").read_text(encoding="utf-8")
    cells = json.loads(notebook)["cells"]
    page = " ".join(" ".join("".join(c["source"]) for c in cells).split())
    folder = root / "reports" / "performativity"
    table = pd.read_csv(folder / "performativity.csv", index_col=["arm", "policy"])
    seen = pd.read_csv(folder / "monitor.csv", index_col=["arm", "way"])
    most = table.loc["adherence 0.9"]
    sentences = [
        f"lowers the AUROC to {most.loc['naive', 'first']:.2f};",
        f"{most.loc['naive', 'auroc']:.2f} naive and {most.loc['weighted', 'auroc']:.2f} weighted",
        f"an oracle has {most.loc['oracle', 'auroc']:.2f}",
        f"O:E is {most.loc['naive', 'oe']:.2f} and {most.loc['weighted', 'oe']:.2f}.",
        f"leave {most.loc['weighted', 'effective']:.0f} effective",
        f"ranks better ({most.loc['left out', 'auroc']:.2f})",
        f"(O:E {table.loc[('bent, 0.9', 'left out'), 'oe']:.2f}, weighted "
        f"{table.loc[('bent, 0.9', 'weighted'), 'oe']:.2f})",
        f"AUROC {seen.loc[('adherence 0.9', 'left out'), 'auroc']:.2f} of a model with "
        f"{seen.loc[('adherence 0.9', 'without acts'), 'auroc']:.2f}; weighted "
        f"{seen.loc[('adherence 0.9', 'weighted'), 'auroc']:.2f}.",
        f"more than the records (O:E {table.loc[('hidden, 0.7', 'weighted'), 'oe']:.2f})",
        f"too many events (O:E {table.loc[('drift, 0.9', 'frozen'), 'oe']:.2f})",
    ]
    assert [sentence for sentence in sentences if sentence not in page] == []
    assert most.loc["naive", "least_warned"] < 0.005
