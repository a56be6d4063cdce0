# make test | test-long | test-oldest | docs | notebooks | browser | page | hammer | torture | serve-ray | load | demo | table | pixels | plots | lint | types | bench | bench-forward | bench-training | bench-grid | bench-engine | bench-int8 | bench-int8-adapters | bench-rotary | cost | backbones | gates | kernels-report | gpu | gpu-here | gpu-table | tune | release-check | dist | clean | help
#   PYTHON=python3.12   interpreter to create the environment with
#   VENV=path           environment to create or reuse (default .venv)
#   PIP_FLAGS=...       more flags for pip, for example an extra index with CPU builds of torch
#   OLDEST=path         environment of test-oldest (default .venv-oldest)
#   TESTS=tests/vit     run part of the suite
#   JOBS=2              number of processes that run the suite
#   IF=changed          for gates: run nothing if results/gates.json is up to date
#   FLAGS='...'         for tune: its options
#   ONLY="dist docs"    for release-check: these steps alone; SKIP= leaves some out
#   FOLDER=path         for page: folder written by `fastprompt export --client`
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
PIP_FLAGS ?=
TESTS ?= tests
JOBS ?= 2
FOLDER ?=
FLAGS ?=
ONLY ?=
SKIP ?=
PY := $(VENV)/bin/python
STAMP := $(VENV)/.fastprompt-installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install test lint types pytest test-long test-oldest browser page hammer torture serve-ray load demo table pixels plots docs notebooks bench bench-forward bench-training bench-grid bench-engine bench-int8 bench-int8-adapters bench-rotary cost backbones gates kernels-report gpu gpu-here gpu-table tune release-check dist clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-15s %s\n", $$1, $$2}'

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(f"fastprompt needs Python 3.10 or newer, but {sys.executable} is {sys.version.split()[0]}: set PYTHON=" if sys.version_info < (3, 10) else 0)'
	@$(PYTHON) -m venv $(VENV) || { echo 'could not create a virtual environment: on Debian, apt-get install python3-venv' >&2; rm -rf $(VENV); exit 1; }

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*) | $(PY)
	@echo 'installing fastprompt and its dependencies into $(VENV); this takes minutes, and about 6 GB if torch comes with CUDA'
	@$(PY) -m pip install -qq --no-compile $(PIP_FLAGS) -c constraints.txt setuptools torch
	@$(PY) -m pip install -qq --no-compile $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

install: $(STAMP)  ## create the environment and install fastprompt in it, editable

test: lint types pytest  ## run ruff, mypy and the whole test suite

lint: $(STAMP)  ## run ruff: lint and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP)  ## run mypy on the package, its ops and the client
	$(PY) -m mypy

test-long: $(STAMP)  ## run the slow variants of quicker tests, which `make test` leaves out
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n $(JOBS) --dist loadfile -m long $(TESTS)

OLDEST_TESTS := tests/kernels tests/engine tests/vit tests/test_interoperation.py tests/test_streams.py tests/test_kept.py

test-oldest:  ## test kernels, engine and the GPU stages' dry run with the oldest versions allowed; write results/oldest.txt
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install -qq $(PIP_FLAGS) -c constraints-oldest.txt 'setuptools>=77' pytest pytest-xdist scipy torch
	@$(OLDEST)/bin/python -m pip install -qq $(PIP_FLAGS) -c constraints-oldest.txt --no-build-isolation -e .
	@$(OLDEST)/bin/python -m pip list --format=freeze | grep -iE '^(torch|torchvision|triton|timm|numpy)==' > results/oldest.txt
	OMP_NUM_THREADS=1 $(OLDEST)/bin/pytest -q -n $(JOBS) --dist loadfile $(OLDEST_TESTS) >> results/oldest.txt; \
		status=$$?; tail -n 40 results/oldest.txt; exit $$status

pytest: $(STAMP)  ## run only the test suite
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q -n $(JOBS) --dist loadfile --durations=20 $(TESTS)

PAGE := build/page
NODE_MODULES := .cache/page/node_modules
ORT := ort.wasm.min.mjs ort-wasm-simd-threaded.mjs ort-wasm-simd-threaded.wasm

$(NODE_MODULES): client/web/package.json client/web/package-lock.json
	@command -v npm >/dev/null || { echo 'npm is needed: on Debian, apt-get install npm' >&2; exit 1; }
	@mkdir -p .cache/page && cp $^ .cache/page && cd .cache/page && npm ci --ignore-scripts --no-audit --no-fund --silent
	@touch $@

page: $(NODE_MODULES)  ## build the client as a web page with onnxruntime-web in build/page, with FOLDER= as its model
	@rm -rf $(PAGE) && mkdir -p $(PAGE)/ort
	@cp client/web/index.html client/web/*.js $(PAGE)
	@cd $(NODE_MODULES)/onnxruntime-web/dist && cp $(ORT) $(CURDIR)/$(PAGE)/ort
	@if [ -n '$(FOLDER)' ]; then cp -r '$(FOLDER)' $(PAGE)/model; fi
	@echo 'run python3 -m http.server --directory $(PAGE) and open http://localhost:8000/?host=http://HOST'

browser: $(STAMP)  ## test the client's page and the web demo in headless Chromium against the Python client (needs node, npm and chromium)
	@$(MAKE) --no-print-directory page FOLDER= PAGE=.cache/page/site >/dev/null
	FASTPROMPT_PAGE=.cache/page/site FASTPROMPT_NODE_MODULES=$(NODE_MODULES) OMP_NUM_THREADS=1 \
		$(VENV)/bin/pytest -q tests/client/test_browser.py tests/webdemo/test_browser.py

hammer: $(STAMP)  ## call an engine thousands of times from eight threads, with adapters swapped and failures injected
	FASTPROMPT_HAMMER_TURNS=500 OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q tests/engine/test_engine.py -k hammered

torture: $(STAMP)  ## test kills, full disks, flipped bits, hostile clients, swapped states; write results/torture.md (minutes, Linux)
	OMP_NUM_THREADS=1 $(PY) bench/torture.py

serve-ray: $(STAMP)  ## test the host on a local Ray, which this installs into the environment (a minute)
	@$(PY) -m pip install -qq $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[dev,ray]'
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -q tests/serve/test_cluster.py

load: $(STAMP)  ## load a host: batching against batch size 1, hostile clients; write results/serve.md (minutes, on an idle machine)
	$(PY) bench/load_serve.py

demo: $(STAMP)  ## adapt a real ViT-S/14 to real images and write an HTML report (minutes)
	$(PY) experiments/demo.py

table: $(STAMP)  ## compare all methods with three seeds (hours; resumable)
	$(PY) experiments/table.py

pixels: $(STAMP)  ## compare prompts as pixels on two data sets with three seeds, before and after PNG (hours; resumable)
	$(PY) experiments/pixels.py

plots: $(STAMP)  ## draw the two plots of the README from results/table.json and results/engine.md
	$(PY) experiments/plots.py

docs: $(STAMP)  ## build the documentation site in build/docs; warnings are errors
	@$(PY) -m pip install -qq $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[dev,docs]'
	$(PY) experiments/method_tables.py
	$(PY) -m mkdocs build --strict

notebooks: $(STAMP)  ## run the notebooks of examples/ at real size and keep their outputs in them (minutes)
	PYTHONWARNINGS='ignore:IProgress not found' $(VENV)/bin/jupyter-execute --inplace --NotebookClient.record_timing=False \
		examples/*.ipynb

bench: $(STAMP)  ## time every op and method against its peers and print a table of ratios
	$(VENV)/bin/pytest --benchmark-only

bench-forward: $(STAMP)  ## time forward and training step against the papers' graph; write results/forward.md
	$(VENV)/bin/pytest bench/bench_forward.py --benchmark-only -s --benchmark-json=.benchmarks/forward.json
	$(PY) bench/forward_table.py .benchmarks/forward.json results/forward.md

bench-training: $(STAMP)  ## measure speed, memory and reading of a training step against the papers' graph; write results/training.md
	$(PY) bench/training_table.py

bench-grid: $(STAMP)  ## time grids in one batch against separate runs; write results/grid.md
	$(PY) bench/grid_table.py

bench-engine: $(STAMP)  ## time fp.Engine against the papers' graph in other engines; write results/engine.md and the table of docs/results.md
	$(VENV)/bin/pytest bench/bench_engine.py --benchmark-only -s --benchmark-json=.benchmarks/engine.json
	$(PY) bench/engine_table.py .benchmarks/engine.json results/engine.md docs/results.md

bench-int8: $(STAMP)  ## time int8 and its error against ONNX Runtime and OpenVINO; write results/int8.md and the table of docs/int8.md
	@$(PY) -m pip install -qq $(PIP_FLAGS) 'nncf==3.4.0'
	$(PY) bench/int8.py errors
	$(PY) bench/int8.py products
	$(PY) bench/int8.py peers
	$(PY) bench/int8.py times
	$(PY) bench/int8.py table

cost: $(STAMP)  ## compare FLOPs, saved bytes and dispatches by formula with measurements; write results/cost.md (minutes)
	OMP_NUM_THREADS=1 $(PY) bench/cost.py

backbones: $(STAMP)  ## read every pretrained timm name of the supported families, without weights; write results/backbones.md (minutes)
	OMP_NUM_THREADS=1 $(PY) experiments/backbones.py

bench-int8-adapters: $(STAMP)  ## train adapters on real sets, compare them in int8 and float32, time training through int8; write results/int8-adapters.md
	$(PY) bench/int8_adapters.py accuracy
	$(PY) bench/int8_adapters.py steps
	$(PY) bench/int8_adapters.py table

bench-rotary: $(STAMP)  ## time both graphs on the shape of DINOv3's ViT-B/16; write results/rotary.md (minutes, on an idle machine)
	$(PY) bench/rotary.py --out results/rotary.md

gates: $(STAMP)  ## run every gate of the Triton kernels; write results/gates.json (minutes, no GPU); IF=changed skips unchanged kernels
	$(PY) tests/kernels/gates/run.py $(if $(filter changed,$(IF)),--if-changed)

kernels-report: $(STAMP)  ## compile every Triton kernel for every part; write results/kernels.md (minutes, no GPU)
	OMP_NUM_THREADS=1 $(PY) tests/kernels/gates/report.py

gpu: $(STAMP)  ## on a GPU, measure what only a GPU can show, in nine minutes at most; write results/gpu.json and .md
	@$(MAKE) --no-print-directory gpu-here

gpu-here:  ## the same without an install, by PY=python3; LONG=1 for the sanitizer and autotuned models; OUT=path without suffix
	PYTHONPATH=bench $(PY) -m gpu $(if $(LONG),--long) $(if $(OUT),--out '$(OUT)')

gpu-table:  ## write the tables of results/gpu.json into docs/results.md
	PYTHONPATH=bench $(PY) -m gpu.table results/gpu.json docs/results.md

tune:  ## on a GPU, measure tile sizes of the Triton kernels, by PY=python3; FLAGS="--ops add_norm --write"; make gates after --write
	PYTHONPATH=.:bench:tests/kernels/gates $(PY) -m gpu.tune $(FLAGS)

release-check: $(STAMP)  ## run what a release has to pass, a step at a time (hours); ONLY="dist wheel-oldest" or SKIP="torture demo" choose
	PIP_FLAGS='$(PIP_FLAGS)' $(PY) release/check.py $(if $(ONLY),--only $(ONLY)) $(if $(SKIP),--skip $(SKIP))

dist: $(STAMP)  ## build sdist and wheel with the C++ kernels into dist/, and check them as PyPI does
	rm -rf dist
	FASTPROMPT_REQUIRE_NATIVE=1 $(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*

clean:  ## remove .venv and everything built
	rm -rf .venv .cache build dist *.egg-info client/*.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
