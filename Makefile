# Everything installs into a virtual environment of the project's own.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-browser coverage lint bench bench-quality bench-features bench-speed faults docs

demo: $(VENV)/installed
	$(BIN)/python -m pipelines.demo

# A file at a time on each core.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The page in Chromium. Gradio needs an older Pillow than the other tests run with, so it goes into
# an environment of its own, which finds all else in the first.
PAGE = $(VENV)/page
test-browser: $(PAGE)/installed
	command -v chromium || apt-get install --yes --no-install-recommends chromium
	$(PAGE)/bin/python -m pytest -m browser tests/pipelines/test_page.py

$(PAGE)/installed: $(VENV)/installed
	$(BIN)/python -m venv $(PAGE)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(PAGE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
	grep -v '^pillow==' constraints.txt > $(PAGE)/constraints.txt
	$(PAGE)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(PAGE)/bin/python -m pip install --quiet --constraint $(PAGE)/constraints.txt --group browser \
		--editable ".[app]"
	touch $@

# Lines and branches of the three packages that the tests reach, in processes of their own too.
coverage: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	$(BIN)/coverage report --format=markdown > benchmarks/results/coverage.md

# DATA: a folder with train/ and test/; WEIGHTS: MobileNetV2 as .safetensors; BUDGET: cpu or gpu.
BUDGET ?= cpu
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.cifar10 --data $(DATA) --weights $(WEIGHTS) --budget $(BUDGET)

bench-quality: $(VENV)/installed
	$(BIN)/python -m benchmarks.quality --data $(DATA) --weights $(WEIGHTS) --budget $(BUDGET)

bench-features: $(VENV)/installed
	$(BIN)/python -m benchmarks.features --data $(DATA) --budget $(BUDGET)

bench-speed: $(VENV)/installed
	$(BIN)/python -m benchmarks.speed --budget $(BUDGET)

faults: $(VENV)/installed
	$(BIN)/python -m tests.faults

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Strictly: a warning ends it. The pages lie in build/site.
docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group test --group lint --editable ".[bench,text]"
	touch $@
