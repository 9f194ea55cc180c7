"""Pages of the learning machine. They need the extra `ui`."""

from lm.core.errors import extra

with extra("ui"):
    import ipywidgets as _ipywidgets  # noqa: F401
    import plotly as _plotly  # noqa: F401
