"""Count the words that GLOSSARY.md replaces.

python tools/glossary.py         print how many each area has
python tools/glossary.py AREA    print each of them with its place
"""

import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = {  # Names in code: avoided -> use
    r"told|said|saying|given|kept": "message, response, rows, stored",
    r"found": "result, rows, matches",
    r"words": "text, labels",
    r"dice": "rng",
    r"deeds?": "action, request",
    r"doors?|keeper|guard": "entry point, middleware",
    r"looks?": "monitoring run",
    r"harm|prices?|priced": "impact",
    r"ripe": "matured",
    r"rivals?|reign": "challenger",
    r"grove|express": "trees, fast path",
    r"learners?": "family",
    r"unlike|apart": "OOD score",
    r"versus|differ": "compare",
    r"wished|settling|whoever|somebody|nobody": "counterfactual, refit, person",
    r"imitat\w*": "synthetic",
}
PROSE = {  # Text, comments, docstrings, messages: avoided -> use
    r"somebody|nobody|whoever": "person, patient, user",
    r"who comes|who has come": "patients, records",
    r"imitat\w+": "synthetic",
    r"told|tells?|foretold|foretells?": "reports, states, predicted",
    r"said|saying": "message, states, returns",
    r"kept": "stored",
    r"ripe": "matured",
    r"deeds?": "action, request",
    r"doors?": "entry point",
    r"(?:an?|the|each|every|last|first|next|per|one|this|that|of|many) looks?": "monitoring run",
    r"rivals?|reigns?": "champion, challenger, other policies",
    r"pric(?:e|es|ed)|what .{1,30} costs the": "impact",
    r"lets? (?:\w+ )?through|serves on|on trial|may it replace": "accepts, stays champion, rollout",
    r"learn(?:s|ed|t)? from|models? (?:knows?|knew)": "trained on, training data",
    r"(?<!online )learners?": "model family, estimator",
    r"what was known then|moment of knowledge": "as-of query, known time",
    r"other outcomes of the same patients": "label shift, concept drift",
    r"versus": "compared with",
    r"grove|whole records": "ensemble of trees, complete records",
    r"wished": "counterfactual",
}
EXCEPTIONS = {  # Phrase that stays -> reason
    "`unlike`": "a column of stored predictions and a field of the API",
    "`nobody`": "the system's user without rights",
    '"nobody"': "the system's user without rights",
    "(nobody)": "the system's user without rights",
    "LM_JOB_USER=nobody": "the system's user without rights",
    '"kept"': "a field of the scheduler's state on disk",
    "root to nobody": "the system's user without rights",
    'f"imitated ': "on disk since version 0.1: the source of a synthetic patient",
    "tell apart": "plain English: distinguish",
    '"learner"': "the field of a model's family on disk up to schema 2",
    "'learner'": "the field of a model's family on disk up to schema 2",
    '"imitated "': "on disk since version 0.1: the source of a synthetic patient",
    '"imitate"': "on disk since version 0.1: what the audit log notes of a synthetic stream",
    '"learners"': "a key of the change-control plan, on disk",
    "learners = [": "a key of the change-control plan, on disk",
    "plan.learners": "a key of the change-control plan, on disk",
}
FIELDS = {  # Name that stays -> reason
    "unlike": "a column of stored predictions and a field of the API",
    "missing_words": "a key of study.toml",
    "learner": "the field of a stored recipe, and a parameter of the retraining job",
    "learners": "a key of plan.toml",
}
MARKED = re.compile(r"\b(?:" + "|".join(PROSE) + r")\b", re.I)
NAMED = re.compile(r"(?:" + "|".join(NAMES) + r")")


def areas() -> dict[str, list[Path]]:
    """Files of each area: a package of the library, or a kind of page."""
    files = {}
    for folder in sorted((ROOT / "nbs" / "library").iterdir()):
        if folder.is_dir() and re.match(r"\d\d_", folder.name):
            files[folder.name[3:]] = sorted(folder.rglob("*.ipynb"))
    for kind in ("lessons", "pipelines", "dashboards", "benchmarks"):
        files[kind] = sorted((ROOT / "nbs" / kind).glob("*.ipynb"))
    pages = [path for path in ROOT.glob("*.md") if path.name not in {"GLOSSARY.md", "CHANGELOG.md"}]
    files["pages"] = [*sorted(pages), ROOT / "nbs/index.ipynb", *sorted(ROOT.glob("data/**/*.md"))]
    files["tools"] = sorted(set((ROOT / "tools").glob("*.py")) - {Path(__file__).resolve()})
    files["tests"] = [p for p in sorted((ROOT / "tests").rglob("*.py")) if "glossary" not in p.name]
    return {name: [p for p in paths if "checkpoint" not in str(p)] for name, paths in files.items()}


def parts(path: Path) -> Iterator[tuple[str, str]]:
    """(kind, text) of a file: `code` or `prose`."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        for cell in json.loads(text)["cells"]:
            kind, source = cell["cell_type"], "".join(cell["source"])
            if "| module |" not in source:  # The map repeats what the notebooks themselves say
                yield "code" if kind == "code" else "prose", source
    else:
        yield "code" if path.suffix == ".py" else "prose", text


def split(code: str) -> tuple[list[str], str]:
    """Names of a piece of code, and its comments and strings as one text."""
    code = re.sub(r"(?m)^\s*[%!].*$", "", code)
    names, texts = [], []
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.NAME:
            names.append(token.string)
        elif (
            token.type in (tokenize.COMMENT, tokenize.STRING)
            or "STRING_MIDDLE" in (tokenize.tok_name[token.type])
        ):
            texts.append(token.string)
    return names, "\n".join(texts)


def theirs(text: str) -> set[str]:
    """Names that a script imports from other libraries, such as hypothesis' `given`."""
    imports = re.findall(r"(?m)^from (?!lm\b|support\b)[\w.]+ import ([\w, ]+)$", text)
    return {name.strip() for names in imports for name in names.split(",")}


def hits(path: Path) -> Iterator[str]:
    """Each avoided word of a file, with its neighbourhood."""
    for kind, text in parts(path):
        names, prose = split(text) if kind == "code" else ([], text)
        foreign = theirs(text) | FIELDS.keys()
        for name in names:
            if name not in foreign and any(
                NAMED.fullmatch(word) for word in name.lower().split("_")
            ):
                yield name
        for phrase in EXCEPTIONS:
            prose = prose.replace(phrase, "")
        for match in MARKED.finditer(" ".join(prose.split())):
            line = " ".join(prose.split())
            yield line[max(0, match.start() - 40) : match.end() + 30]


def counts() -> dict[str, int]:
    """Avoided words of each area."""
    return {name: sum(len(list(hits(p))) for p in paths) for name, paths in areas().items()}


if __name__ == "__main__":
    for area in sys.argv[1:]:
        for path in areas()[area]:
            print(*(f"{path.relative_to(ROOT)}: {hit}" for hit in hits(path)), sep="\n")
    if not sys.argv[1:]:
        print(*(f"{name:<12} {count:>6}" for name, count in counts().items()), sep="\n")
