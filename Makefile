# The everyday commands. The first that needs the environment sets it up (.ci/environment.py), from settings.ini alone.
#   make leaderboard   run the embedded suite (goes on where it stopped), write leaderboard/, print the board
#   make test          everything that must hold: export and clean in sync, every notebook, pytest
#   make lab           JupyterLab on the notebooks
#   make slow          the slow notebook cells and the slow tests
#   make mutants       change constants and operators of some modules, and list the changes that no test notices
#   make bench         time the library itself
#   make docs          the chapters as web pages, in _docs
#   make fix           after editing notebooks: export, clean, export
#   make check-entries, make check-board: every entry obeys the rules; the tables follow from the entries
#   make check-submission SUBMISSION=folder OUT=folder: check another checkout by the code of this one
#   make lint, make hooks, make clean (build output and caches), make distclean (.venv too)
# Another environment: make VENV=path ...      Another interpreter for a new one: make PYTHON=python3.12 ...
VENV    ?= .venv
PYTHON  ?= python3
JOBS    ?= 2
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

BIN := $(abspath $(VENV))/bin
PY  := "$(BIN)/python"
PB  := $(PY) -c "from pruning_bench.bench import main; main()"
export PYTHONPATH := $(CURDIR)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
CALM := OMP_NUM_THREADS=1 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=33554432
CALM += HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PRUNING_BENCH_OFFLINE=1 PYTHONUNBUFFERED=1
DATA := $(if $(PRUNING_BENCH_DATA),data)
heading = @printf '\n== %s\n' "$(1)"

MODULES ?= core/allocate core/score core/schedule core/pattern weight/dynamic_sparse

ENTRIES ?= leaderboard/entries
DEVICE  ?= cpu

.PHONY: leaderboard test lab slow mutants bench docs fix lint hooks env versions clean distclean
.PHONY: check-entries check-board check-submission comment shards reproduce commit-receipts wheel check-wheel check-tag
.DEFAULT_GOAL := leaderboard

env:
	@$(PYTHON) .ci/environment.py "$(VENV)"

leaderboard: env
	@$(PB) suite embedded --jobs $(JOBS); code=$$?; [ $$code -le 1 ] || exit $$code; $(PB) board && exit $$code

test: env
	$(call heading,notebooks and modules in sync)
	@$(PY) -m pytest -q tests/test_export.py
	$(call heading,every notebook$(if $(DATA),,: cells that need PRUNING_BENCH_DATA are skipped))
	@$(CALM) $(PY) .ci/notebooks.py --flags "$(DATA)" --workers $(WORKERS)
	$(call heading,pytest)
	@$(CALM) $(PY) -m pytest -q -n $(WORKERS) --durations 8

lab: env
	@"$(BIN)/jupyter" lab nbs

slow: env
	$(call heading,every notebook with its slow cells)
	@$(CALM) $(PY) .ci/notebooks.py --flags "slow $(DATA)" --workers $(WORKERS) --limit 7200
	$(call heading,slow tests)
	@$(CALM) $(PY) -m pytest -q -m slow

mutants: env
	@$(CALM) $(PY) tests/mutants.py $(MODULES)

bench: env
	@$(PY) -m pytest -q -s --tb=short tests/benchmarks

docs: env
	@$(PY) .ci/docs.py

fix: env
	@"$(BIN)/nbdev_export" && "$(BIN)/nbdev_clean" && "$(BIN)/nbdev_export"

lint: env
	@"$(BIN)/ruff" check .

hooks: env
	@git config --local include.path ../.gitconfig
	@"$(BIN)/pre-commit" install

versions: env
	@$(PY) -m pip freeze

# what the workflows run (.github/workflows)

check-entries: env
	@$(PB) check $(ENTRIES)

check-board: env
	@$(PB) board --check

check-submission: env
	@$(CALM) $(PY) .ci/submission.py "$$SUBMISSION" "$$OUT"

comment:
	@$(PYTHON) .ci/comment.py "$$COMPARISON"

shards:
	@$(PYTHON) .ci/nightly.py shards

reproduce: env
	@$(PY) .ci/nightly.py reproduce "$$TASK" "$$OUT" "$(DEVICE)"

commit-receipts: env
	@$(CALM) $(PY) .ci/nightly.py commit "$$RECEIPTS"

wheel:
	@$(PYTHON) -m pip wheel . --no-deps -w dist

check-wheel:
	@$(PYTHON) .ci/wheel.py dist

check-tag:
	@$(PYTHON) .ci/wheel.py dist --tag "$$TAG"

clean:
	@rm -rf _docs _proc build dist *.egg-info .pytest_cache .ruff_cache
	@find . -path "./$(VENV)" -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

distclean: clean
	@rm -rf .venv
