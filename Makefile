# Two commands do everything on a machine with Python >= 3.10 and make: `make demo`, `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-reliability check format docs check-site bench-quick bench-step clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[test,dev]'
	@touch $@

demo: $(INSTALLED)  ## Align a small model with SFT and with Booster, attack both, show table and plot
	$(BIN)/python examples/lora_alignment.py

test: $(INSTALLED)  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-reliability: $(INSTALLED)  ## Run the fault and fuzz tests at length, and print what they counted
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m reliability

check: $(INSTALLED)  ## Lint, formatting and strict types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## Build the documentation into site/, warnings being errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check-site: docs  ## Look at every page of the site in Chromium, at two widths, and follow its links
	$(BIN)/python docs/check_site.py site --screenshots build/site

bench-quick: $(INSTALLED)  ## Run every experiment of the benchmark at toy size: the machinery, no claim
	rm -rf build/bench-quick
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.harmful_finetuning all --preset quick --seeds 0 \
		--cache build/bench-quick/cache --output build/bench-quick

bench-step: $(INSTALLED)  ## Measure what a step costs beside its passes, against rivals
	$(BIN)/python benchmarks/step_cost.py --output build/step_cost.json

clean:  ## Remove the environment and what tools left
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
