# Everything a reader or a maintainer runs. Each target stands alone: on a fresh clone it makes .venv first.

VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help install notebooks test lint format refresh messages lab doctor bench gpu-evidence embedded-model clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test]'
	touch $@

install: $(INSTALLED)  ## make .venv with the pinned packages

notebooks: $(INSTALLED)  ## run every notebook; figures and their data land in figures/, executed copies in build/notebooks/
	$(BIN)/glmlab notebooks --jobs 2

refresh: $(INSTALLED)  ## run every notebook and write the outputs back into notebooks/
	$(BIN)/glmlab notebooks --in-place
	cp figures/memory_vs_context.png figures/why_the_curve_bends.png figures/*.csv figures/*.json data/figures/
	$(BIN)/glmlab notebooks index --in-place  # it shows what the others drew

messages: $(INSTALLED)  ## collect the texts of the figures into data/locale; translate there what is new
	mkdir -p build
	$(BIN)/pybabel -q extract -k "tr msg" --add-location=file -o build/glmlab.pot glmlab/figures
	$(BIN)/pybabel -q update --no-fuzzy-matching --ignore-obsolete --ignore-pot-creation-date --width 120 -D glmlab -i build/glmlab.pot -d data/locale

lab: $(INSTALLED)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks --ip=127.0.0.1 --LabApp.default_url=/lab/tree/index.ipynb --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate

test: lint  ## lint, types and tests
	$(BIN)/pytest -n 2 --durations=15

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## format code and notebooks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctor: $(INSTALLED)  ## say what works on this machine
	$(BIN)/glmlab doctor

bench: $(INSTALLED)  ## print what the suite's own code costs, as ratios and seconds; build/bench.json keeps them
	$(BIN)/glmlab bench

gpu-evidence: $(INSTALLED)  ## on a machine with an NVIDIA GPU: record what forecasts are compared with (20 minutes; called again, it goes on)
	$(BIN)/glmlab evidence

embedded-model: $(INSTALLED)  ## train the embedded model anew (30 minutes on two cores)
	$(BIN)/python data/tiny-chatglm3/recipe/train.py

clean:  ## remove what was built; .venv, recordings and figures stay
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
