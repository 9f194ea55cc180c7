# Only relative paths: the folder's name may hold spaces, quotes or any letter.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PY := .venv/bin/python

export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DISABLE_TELEMETRY := true
export PYTHONUTF8 := 1
export JUPYTER_PLATFORM_DIRS := 1
# Jupyter must write below HOME: where that is impossible, lend it a folder of this one.
export HOME := $(shell if [ -n "$$HOME" ] && [ -w "$$HOME" ]; then printf %s "$$HOME"; \
	else mkdir -p .home && cd .home && pwd -P; fi)

.PHONY: help demo docs test test-quick campaigns env dashboards lab results peers benchmarks reliability lock lock-check export schemas types style format clean

help: ## List the verbs
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1|\2/p' Makefile | while IFS='|' read -r verb does; \
	do printf '  %-18s %s\n' "$$verb" "$$does"; done

demo: env ## Stream real patients through the machine and show what it learned
	@$(PY) -m lm.cli.cli demo

test: env ## Run everything that CI runs
	@export OMP_NUM_THREADS=1; status=0; \
	$(PY) tools/notebooks.py test || status=1; \
	$(PY) -m pytest -n 2 || status=1; \
	exit $$status

test-quick: env ## Run what takes no browser, no service and no patience, for the daily loop
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -q -m "not slow and not browser and not service" \
	--ignore tests/benchmarks --ignore tests/end_to_end

campaigns: ## Run the tests that draw, kill and shuffle at length, hours: more of what `make test` does
	@OMP_NUM_THREADS=1 LM_LONG=1 LM_DOORS=5000 LM_FUZZ=10000 $(PY) -m pytest -n 2 --timeout 14400 $$( \
	grep -rlE --include='test_*.py' 'support.long|LM_DOORS|LM_FUZZ' tests)

env: ## Make .venv from requirements.lock (PYTHON=... chooses the interpreter)
	@{ pwd -P; cat requirements.lock; } | cmp -s - .venv/made && $(PY) -c pass 2>/dev/null && exit; \
	set -- python3.13 python3.12 python3.11 python3; [ -z "$$PYTHON" ] || set -- "$$PYTHON"; \
	for python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	exec "$$python" tools/environment.py env; done; \
	echo "No Python 3.11 or newer found: install one, or say make PYTHON=/path/to/python" >&2; \
	exit 1

dashboards: env ## Open the dashboards on the state that the demo leaves
	@$(PY) -m lm.cli.cli dashboards

lab: env ## Open JupyterLab on the notebooks
	@$(PY) -m jupyterlab --notebook-dir=nbs

results: env ## Remake the tables below reports/ and in README.md
	@$(PY) -m lm.cli.cli results

peers: env ## Make environments of the libraries that the benchmarks stand beside, in .peers
	@$(PY) tools/peers.py make

benchmarks: peers ## Measure the monitor beside them, two hours (NAMES="detection cost": only these)
	@$(PY) -m lm.cli.cli benchmarks $(NAMES)

reliability: env ## Kill, crowd and starve the live service, an hour, and show what was lost
	@$(PY) -m lm.cli.cli benchmarks reliability

lock: env ## Remake requirements.lock and environment.yml from settings.ini (UPGRADE=1: newest)
	@$(PY) tools/environment.py lock $(if $(UPGRADE),--upgrade)

lock-check: env ## Install the lock with every Python of this machine, in passing environments
	@$(PY) tools/environment.py check

export: env ## Make lm/ from the library notebooks, and clean all notebooks
	@$(PY) tools/notebooks.py export

schemas: env ## Write the JSON schemas of study.toml, plan.toml and the other files
	@$(PY) tools/schemas.py

docs: env ## Build the documentation as HTML, in _docs
	@$(PY) tools/docs.py

types: env ## Check the types of the package
	@$(PY) -m mypy --cache-dir build/mypy

style: env ## Measure the rhythm of the notebooks and the length of the sentences
	@$(PY) tools/style.py

format: env ## Let ruff format and mend notebooks and scripts
	@$(PY) -m ruff check --fix . && $(PY) -m ruff format .

clean: ## Remove .venv, caches and built files; state/ and reports/ stay
	@rm -rf .venv .home .pytest_cache .ruff_cache .hypothesis build ./*.egg-info
	@find . -name __pycache__ -prune -exec rm -rf {} +
