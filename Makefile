# Needs make and Python 3.11-3.13. Every target but help makes .venv and installs into it first, when it has to.
.DEFAULT_GOAL := help
.PHONY: help install demo test lab readme
BIN := .venv/bin
PYTHON ?=
FLAGS ?= slow
CORES := $(shell nproc 2>/dev/null || echo 2)

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

.venv/.installed: requirements.txt settings.ini setup.py
	@PYTHON="$(PYTHON)" scripts/venv.sh

install: .venv/.installed ## make .venv and install everything into it

demo: install ## run the whole flow on the built-in data; leaves runs/demo/report.html
	@scripts/demo.sh $(ARGS)

test: install ## check that notebooks are clean and in sync, run them, run pytest
	@$(BIN)/python -m pytest -q tests/test_sync.py
	@echo "notebooks: running all of them, two at a time (flags: $(FLAGS))"
	@OMP_NUM_THREADS=$$(( ($(CORES) + 1) / 2 )) timeout 1800 $(BIN)/nbdev_test --n_workers 2 --flags "$(FLAGS)" --timing
	@$(BIN)/python -m pytest

lab: install ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab nbs

readme: install ## write README.md from nbs/index.ipynb
	@$(BIN)/python scripts/readme.py
