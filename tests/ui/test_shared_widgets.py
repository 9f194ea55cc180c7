"""What all pages share: following the service, who may open them, kernels that end with them."""

import asyncio
import time
from html import escape
from types import SimpleNamespace

import ipywidgets as widgets
import pandas as pd
import plotly.graph_objects as go
import pytest
from support.desk import NASTY
from support.waiting import eventually_async

from lm.core.errors import LMError
from lm.core.settings import find_root, settings
from lm.machine.machine import Machine
from lm.machine.queries import PAGES
from lm.serve.app import background
from lm.serve.auth import Tokens
from lm.serve.client import Client, find_service
from lm.ui import sign_in
from lm.ui import widgets as shared
from lm.ui.sign_in import open_page
from lm.ui.state import PageState, follow_service, page_header_html
from lm.ui.widgets import PageBox, live_html, page_layout, static_html

STUDY = SimpleNamespace(name="demo", title="<b>Demo</b>", time_zone="UTC")


class Desk:
    """A client that can be lost."""

    def __init__(self, patients=0):
        self.patients, self.lost, self.asked = patients, False, 0

    def close(self):
        self.closed = True

    def status(self):
        self.asked += 1
        if self.lost:
            raise LMError("the service does not answer")
        return {"study": "demo", "champion": 1, "counts": {"records": self.patients}}


def clinician(client):
    """A page of one sentence, with the name of a real one."""
    state = PageState(client, STUDY)
    panel = page_layout(live_html(state, ["status", "lost"], lambda: page_header_html(state, "x")))
    panel.state = state
    return panel


data_scientist = type(clinician)(clinician.__code__, globals(), "data_scientist")


def text(widget):
    """All text of a widget."""
    own = getattr(widget, "value", "") if isinstance(widget, widgets.HTML) else ""
    return own + " ".join(text(child) for child in getattr(widget, "children", ()))


def detected(widget, kind, name=""):
    """The widgets of a kind."""
    mine = [widget] if isinstance(widget, kind) else []
    return mine + [w for child in getattr(widget, "children", ()) for w in detected(child, kind)]


def test_a_page_reads_again_only_what_is_new():
    state = PageState(Desk(3), STUDY)
    state.tick()
    state.tick()
    assert state.revision == 0
    state.client.patients = 4
    state.tick()
    assert state.revision == 1 and state.status["counts"]["records"] == 4


def test_a_lost_service_is_a_line_and_the_page_finds_the_new_one():
    panel = clinician(Desk(3))
    state, old, new = panel.state, panel.state.client, Desk(9)
    old.lost = True
    state.tick()
    assert "Reconnecting: the service does not answer" in text(panel)
    state.reconnect = lambda: new  # It is back, on another port
    state.tick()
    state.tick()
    assert state.client is new and old.closed and "Reconnecting" not in text(panel)
    assert state.status["counts"]["records"] == 9


def test_a_step_that_fails_is_a_sentence_and_the_page_goes_on():
    class Broken(PageState):
        def work(self):
            raise ValueError("a bug")

    state = Broken(Desk(), STUDY)
    state.tick()
    assert state.failed and "This did not work (ValueError: a bug)" in state.message
    state.client.patients = 1
    state.tick()
    assert state.revision == 1


def test_a_message_stays_while_nothing_goes_wrong():
    state = PageState(Desk(), STUDY)
    state.message = "Stored."
    state.client.patients = 1
    state.tick()
    assert state.message == "Stored."


def test_keep_follows_in_a_kernel_and_is_nothing_outside():
    state = PageState(Desk(), STUDY)
    assert follow_service(state) is None

    async def live():
        task = follow_service(state, every=0.01)
        state.client.patients = 5
        await eventually_async(lambda: state.revision)
        task.cancel()

    asyncio.run(live())
    assert state.status["counts"]["records"] == 5


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A service on an empty store, and a token of each role."""
    monkeypatch.setenv("LM_HOME", str(tmp_path))
    monkeypatch.setenv("LM_STUDY", "monica")
    with Machine("monica", tmp_path) as machine, background(machine) as url:
        tokens = Tokens(machine.store.folder)
        roles = ("viewer", "clinician", "data scientist", "machine")
        yield url, {role: tokens.create(role.title(), role) for role in roles}


MAY = {
    "patients": {"clinician", "data scientist"},
    "clinician": {"clinician", "data scientist"},
    "data_scientist": {"data scientist"},
}


@pytest.mark.parametrize("name", PAGES)
def test_the_service_says_who_may_open_a_page(served, name):
    url, tokens = served
    for role, token in tokens.items():
        with Client(url, token=token) as client:
            if role in MAY[name]:
                assert client.page(name) == {"name": role.title(), "role": role}
            else:
                with pytest.raises(LMError, match=role):
                    client.page(name)
    with Client(url, token="wrong") as client, pytest.raises(LMError):
        client.page(name)


def test_an_unknown_page_is_a_sentence_here_and_over_http(served):
    client = Client(served[0], token=served[1]["viewer"])
    with client, pytest.raises(LMError, match="page 'nowhere' is unknown"):
        client.page("nowhere")


@pytest.mark.slow
def test_each_person_signs_in_where_others_can_reach_the_pages(served, monkeypatch):
    monkeypatch.setenv("LM_DASHBOARD_TOKEN", "shared")
    whole = open_page(data_scientist)
    for token, why in {"wrong": "token", "": "a personal token is missing"}.items():
        sign(whole, token)
        result = next(w.value for w in detected(whole, widgets.HTML) if 'role="alert"' in w.value)
        assert why in result and "&lt;b&gt;Demo" not in text(whole)
    sign(whole, served[1]["clinician"])
    result = next(w.value for w in detected(whole, widgets.HTML) if 'role="alert"' in w.value)
    assert "may not GET /v1/pages/data_scientist" in result and "data scientist, admin" in result
    sign(whole, served[1]["data scientist"])
    assert "&lt;b&gt;Demo" in text(whole)
    leave = detected(whole, widgets.Button)[-1]
    assert leave.description == "Data Scientist, data scientist: change"
    leave.click()
    assert "&lt;b&gt;Demo" not in text(whole) and detected(whole, widgets.Password)


def sign(whole, token):
    """Type a token and press the button."""
    detected(whole, widgets.Password)[0].value = token
    detected(whole, widgets.Button)[-1].click()


@pytest.mark.slow
def test_on_a_machine_of_ones_own_the_page_opens_by_itself(served, monkeypatch):
    monkeypatch.delenv("LM_DASHBOARD_TOKEN", raising=False)
    whole = open_page(clinician)
    assert "&lt;b&gt;Demo" in text(whole)
    assert detected(whole, widgets.Button)[-1].description == "local, admin: change"


@pytest.mark.slow
def test_a_clinicians_token_cannot_act_through_the_data_scientists_page(served):
    client = find_service(settings().study_home("monica"), served[1]["clinician"])
    with pytest.raises(LMError, match="clinician"):
        client.rollback(reason="mine")
    with pytest.raises(LMError, match="clinician"):
        client.run("monitor", {"study": "monica"})


class Config(dict):
    """Takes every setting."""

    def __getattr__(self, name):
        return self.setdefault(name, Config())

    __setattr__ = dict.__setitem__


def test_a_kernel_ends_with_its_page_whatever_it_does(monkeypatch):
    path = find_root() / "lm" / "assets" / "voila.py"
    config, now = Config(), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    space = {"get_config": lambda: config, "__file__": str(path)}
    monkeypatch.setenv("JUPYTER_PATH", "")
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), space)
    stored = config["VoilaConfiguration"]["multi_kernel_manager_class"]
    timeout = config["MappingKernelManager"]["cull_interval"]
    ended = []
    manager = SimpleNamespace(_kernel_connections={"k": 1}, left={})

    async def shutdown_kernel(name):
        ended.append(name)

    manager.shutdown_kernel = shutdown_kernel

    def run(seconds):
        now[0] += seconds
        asyncio.run(stored.cull_kernel_if_idle(manager, "k"))
        return bool(ended)

    assert not any(run(timeout) for _ in range(50))  # Its page is open
    manager._kernel_connections["k"] = 0
    assert [run(timeout) for _ in range(5)] == [False] * 4 + [True]  # Within a minute
    assert 5 * timeout < 30
    ended.clear()
    manager.left = {}
    assert not any(run(timeout) for _ in range(20))  # A page that is still loading
    assert any(run(timeout) for _ in range(6))


def test_charts_wait_for_the_browser_and_come_then(monkeypatch):
    figure, frame = go.Figure(), pd.DataFrame({"n": ["1"]})
    drawer = shared.DeferredDrawing()
    monkeypatch.setattr(shared, "draw_when_shown", drawer)
    now = shared.chart_with_table(figure, frame, "numbers")
    drawer.hold()
    later = shared.chart_with_table(figure, frame, "numbers")
    assert isinstance(now.children[0], go.FigureWidget)
    assert isinstance(later.children[0], widgets.HTML) and "numbers" in later.children[1].value
    drawer.release()
    assert isinstance(later.children[0], go.FigureWidget)
    assert isinstance(
        shared.chart_with_table(figure, frame, "numbers").children[0], go.FigureWidget
    )


@pytest.mark.slow
def test_a_page_is_rehearsed_on_a_service_only_and_leaves_nothing(served, tmp_path, monkeypatch):
    made = []

    def rehearsed(client):
        assert type(client) is Client
        made.append(clinician(client))

    sign_in._preheat(rehearsed)
    assert len(made) == 1 and made[0].comm is None
    monkeypatch.setenv("LM_HOME", str(tmp_path / "absent"))
    sign_in._preheat(rehearsed)
    assert len(made) == 1 and not (tmp_path / "absent").exists()


# ------------------------------------------------------------------------------- without scripts


@pytest.mark.parametrize(
    ("kind", "has", "result"),
    [
        ("Button", {"description": NASTY}, f"disabled>{escape(NASTY)}</button>"),
        ("Button", dict(description="Go", button_style="primary"), "jupyter-button mod-primary"),
        ("Text", dict(value=NASTY, description="Name"), f'value="{escape(NASTY)}"'),
        ("Text", {"placeholder": "your name"}, 'placeholder="your name"'),
        ("Dropdown", dict(options=["a", "b"], value="b"), 'value="b"'),
        ("Select", {"options": [(NASTY, 1)]}, f"<option>{escape(NASTY)}</option>"),
        ("ToggleButtons", dict(options=["a", "b"], value="b"), 'mod-active" disabled>b<'),
        ("ToggleButtons", dict(options=["a"], value=None), 'toggle-button" disabled>a<'),
        ("FloatText", {"value": float("nan")}, 'value=""'),
        ("Password", {"value": "secret"}, 'value=""'),
        ("Checkbox", dict(value=True, description="seen"), ">seen</span>"),
        ("FileUpload", {"description": "Choose"}, "disabled>Choose</button>"),
        ("HTML", {"value": "<b>a page's own words</b>"}, "<b>a page's own words</b>"),
        ("Box", {"layout": {"min_height": "9px"}}, 'style="min-height:9px"'),
    ],
)
def test_a_page_says_without_scripts_what_it_says_with_them(kind, has, result):
    widget = getattr(widgets, kind)(**has)
    shown = static_html(PageBox([widget.add_class("lm-mine")]))
    assert result in shown and "lm-mine" in shown and "<script" not in shown
    widget.layout.display = "none"
    assert "lm-mine" not in static_html(PageBox([widget]))


def test_jupyter_gets_the_widget_and_its_text():
    shown = PageBox([widgets.HTML("words")])._repr_mimebundle_()
    assert list(shown)[-1] == "text/html" and "words" in shown["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in shown
