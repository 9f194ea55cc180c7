"""Write the JSON schemas of the files that people write; editors complete and check with them.

python tools/schemas.py   write lm/assets/schemas
"""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "lm" / "assets" / "schemas"


def schemas() -> dict[str, str]:
    """Name of each schema's file, and its text."""
    from lm.core.configuration import json_schema
    from lm.core.study import StudyFile
    from lm.report.owner_answers import answers_file
    from lm.serve.automation import Automation
    from lm.update.change_control import PlanFile

    made = {
        "study": json_schema(StudyFile, "study.toml"),
        "plan": json_schema(PlanFile, "plan.toml", partial=True),
        "automation": json_schema(Automation, "automation.toml"),
        "answers": json_schema(answers_file(), "answers.toml", partial=True),
    }
    return {f"{name}.json": json.dumps(schema, indent=1) + "\n" for name, schema in made.items()}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in schemas().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
