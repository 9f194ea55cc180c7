from configparser import ConfigParser
from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
config = parser["DEFAULT"]
EXTRAS = ("serve", "ui", "broker", "onnx", "report", "dev")
extras = {name: config[f"{name}_requirements"].split() for name in EXTRAS}
readme = Path(__file__).with_name("README.md")
shipped = ("nbs/pipelines", "nbs/dashboards", "data")  # See lm.core.settings.shipped_folder


class Build(build_py):
    """Brings the notebooks and studies that `lm` needs at work into the wheel."""

    def run(self):
        super().run()
        for name in () if self.editable_mode else shipped:
            place = Path(self.build_lib, "lm", "assets", name)
            leave = ignore_patterns("__pycache__", ".*")
            copytree(Path(__file__).parent / name, place, ignore=leave, dirs_exist_ok=True)


setup(
    name=config["repo"],
    version=config["version"],
    description=config["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=config["author"],
    author_email=config["author_email"],
    url=config["git_url"],
    license="Apache-2.0",
    keywords=config["keywords"],
    cmdclass={"build_py": Build},
    packages=find_packages(include=["lm", "lm.*"]),
    package_data={"lm": ["py.typed", "assets/*", "assets/**/*"]},
    exclude_package_data={"lm": ["*.pyc", "**/*.pyc"]},
    python_requires=f">={config['min_python']}",
    install_requires=config["requirements"].split(),
    extras_require=extras
    | {"all": sorted({each for name in EXTRAS[:-1] for each in extras[name]})},
    entry_points={"console_scripts": config["console_scripts"].split()},
    zip_safe=False,
)
