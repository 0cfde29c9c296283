# The course in one place: `make help` lists what there is to make.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install course figures ledger refresh lab test clean bench paper-list paper graph data weights submit
.NOTPARALLEL:

# Parameters of the notebooks. They are orthogonal; an unknown one, or an unknown value, is an error.
DATA = world
PROFILE = lab
EDITION = as_described
SEED = 0
DEVICE = auto
NOTEBOOKS =
# Notebooks, or tests, at a time.
JOBS = auto
# Where things are.
VENV = .venv
BUILD = build
# `make ledger` with uncommitted changes: the rows' commit is marked +dirty.
ALLOW_DIRTY =
# Full-size runs: which (`make paper-list`; several, parted by spaces), which folds of a detector, how many images a
# batch, how many steps of a trial, and the table of data/bench/ that gets a row of it.
MODEL =
FOLD =
BATCH =
STEPS =
TABLE =
# Who does the tasks of `make graph`: local or ray.
ENGINE = local
# A submission, what to say of it, and SEND=1 to send it.
FILE =
MESSAGE =
SEND =

KNOWN = DATA PROFILE EDITION SEED DEVICE NOTEBOOKS JOBS VENV BUILD ALLOW_DIRTY MODEL FOLD BATCH STEPS TABLE ENGINE FILE MESSAGE SEND WHALE_REFERENCE WHALE_KAGGLE WHALE_CACHE WHALE_WEIGHTS
given = $(findstring command line,$(origin $(1)))
GIVEN = $(foreach name,$(.VARIABLES),$(if $(call given,$(name)),$(name)))
UNKNOWN := $(filter-out $(KNOWN),$(GIVEN))
ifneq ($(UNKNOWN),)
$(error unknown parameter $(UNKNOWN); the parameters are $(KNOWN))
endif
# What each target takes, besides VENV and the variables WHALE_*. `make test` hands what it is given on to install.
SETTINGS = DATA PROFILE EDITION SEED DEVICE
TAKES_course = $(SETTINGS) NOTEBOOKS JOBS BUILD
TAKES_figures = $(TAKES_course)
TAKES_ledger = $(SETTINGS) NOTEBOOKS BUILD ALLOW_DIRTY
TAKES_refresh = NOTEBOOKS
TAKES_test = JOBS
TAKES_paper-list = PROFILE EDITION
TAKES_paper = $(SETTINGS) MODEL FOLD BATCH STEPS TABLE
TAKES_graph = $(SETTINGS) MODEL ENGINE BUILD
TAKES_submit = FILE MESSAGE SEND
TAKES_help = $(KNOWN)
TAKES_install = $(TAKES_test)
$(foreach target,$(MAKECMDGOALS),$(foreach name,$(filter-out VENV WHALE_% $(TAKES_$(target)),$(GIVEN)),$(error \
  make $(target) doesn't take $(name); it takes $(or $(TAKES_$(target)),no parameters))))
ifneq ($(filter-out 1,$(ALLOW_DIRTY)),)
$(error ALLOW_DIRTY = $(ALLOW_DIRTY): leave it empty or give 1)
endif
ifneq ($(filter-out 1,$(SEND)),)
$(error SEND = $(SEND): leave it empty or give 1)
endif

# Exported, so that recipes can quote them whatever characters they hold.
export DATA PROFILE EDITION SEED DEVICE NOTEBOOKS JOBS BUILD MODEL FOLD BATCH STEPS TABLE ENGINE FILE MESSAGE
ifneq ($(WHALE_REFERENCE),)
REFERENCE := $(shell cd '$(WHALE_REFERENCE)' 2>/dev/null && pwd)
ifeq ($(REFERENCE),)
$(error WHALE_REFERENCE = $(WHALE_REFERENCE): there is no such folder)
endif
override WHALE_REFERENCE := $(REFERENCE)
export WHALE_REFERENCE
endif
export NO_ALBUMENTATIONS_UPDATE = 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

PYTHON = $(VENV)/bin/python
CHOICE = --data "$$DATA" --profile "$$PROFILE" --edition "$$EDITION" --seed "$$SEED" --device "$$DEVICE" \
	--notebooks "$$NOTEBOOKS" --build "$$BUILD"
# Full-size runs are of the profile paper, unless another one is given.
FULL_SIZE = $(if $(call given,PROFILE),--profile "$$PROFILE")

help:
	@echo 'make course    execute the notebooks that are not up to date; pages, figures and results in build/'
	@echo 'make figures   the same, ending with the list of figures'
	@echo 'make lab       open the notebooks in JupyterLab'
	@echo 'make test      lint, tests, and every notebook executed again'
	@echo 'make ledger    measure apart from the course, and enter the values in data/results/ledger.csv'
	@echo 'make refresh   execute the notebooks in place, keeping their new outputs'
	@echo 'make bench     measure how fast the parts are; tables in data/bench/ (under ten minutes)'
	@echo 'make data      fetch the contest with the client of Kaggle into data/humpback-whale-identification/'
	@echo 'make weights   fetch the ImageNet weights of the published networks into data/weights/'
	@echo 'make paper-list   list the full-size runs: size, batch, epochs, hours'
	@echo 'make paper     train full-size runs, or try them'
	@echo 'make graph     detectors, trainings, answers and their notebooks, on this machine or a Ray cluster'
	@echo 'make submit    check a submission and show what would be sent, or send it'
	@echo 'make clean     remove build/ and the caches (the environment and the data stay)'
	@echo
	@echo 'What takes which parameters (all: VENV):'
	@$(foreach target,course figures ledger refresh test paper-list paper graph submit,\
	  printf '  %-10s  %s\n' $(target) '$(TAKES_$(target))';)
	@echo
	@echo 'Parameters with their defaults:'
	@echo '  DATA=world              world:tiny, world:lab, world:competition, kaggle, or the path of a folder or CSV'
	@echo '  PROFILE=lab             lab (a laptop), small (a laptop, a night) or paper (the published sizes; the default of'
	@echo '                          paper and paper-list)'
	@echo '  EDITION=as_described    as_described (the report) or as_shipped (the code of the solutions)'
	@echo '  SEED=0                  a whole number; for ledger also several: SEED=0,1,2'
	@echo '  DEVICE=auto             auto, cpu or cuda'
	@echo '  NOTEBOOKS="02_* 01_02"  only these'
	@echo '  JOBS=auto               how many at a time: a number; auto is two more than cores'
	@echo '                          (test: one a core), 4 at most, and 1 notebook where it needs all (paper, cuda)'
	@echo '  BUILD=build             where executed notebooks, pages and results go'
	@echo '  VENV=.venv              the Python environment; made when missing'
	@echo '  ALLOW_DIRTY=1           enter values of code that is not committed'
	@echo '  MODEL="4.2/a 5.2/*"     these runs of make paper-list (default: all)'
	@echo '  FOLD=0                  these folds of the landmark detectors'
	@echo '  BATCH=16                so many images a batch, in place of the published number'
	@echo '  STEPS=2                 a trial of so many steps, which keeps nothing'
	@echo '  TABLE=trials            but a row of what it took, in data/bench/trials.csv'
	@echo '  ENGINE=local            local, or ray (RAY_ADDRESS: of a cluster; pip install -e .[cluster])'
	@echo '  FILE=submission.csv     what to check'
	@echo '  MESSAGE="first try"     what Kaggle shows beside it'
	@echo '  SEND=1                  send it, in place of showing what would be sent'

# ---- the environment: made once, brought up to date when pyproject.toml, constraints.txt or the place changes
STAMP = $(VENV)/.whalelib
STATE = $(shell { pwd; cat pyproject.toml constraints.txt; } | cksum)
UNTESTED = ^(torch|torchvision|triton|nvidia-|cuda-)

$(PYTHON):
	@for candidate in python3.11 python3; do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi; \
	  candidate=; \
	done; \
	if [ -z "$$candidate" ]; then echo 'Python 3.11 or newer is needed, as python3.11 or python3.' >&2; exit 1; fi; \
	echo "environment: making $(VENV) with $$($$candidate --version)"; \
	"$$candidate" -m venv "$(VENV)"

install: $(PYTHON)
	@if [ "$$(cat "$(STAMP)" 2>/dev/null)" = '$(STATE)' ]; then exit 0; fi; \
	if [ -e "$(STAMP)" ]; then quiet=--quiet; echo 'environment: bringing it up to date'; \
	else quiet=; echo 'environment: installing the dependencies (a few minutes and about 6 GB, most of it torch)'; fi; \
	if ! $(PYTHON) -m pip install $$quiet -e '.[course,test]' -c constraints.txt; then \
	  echo 'environment: the tested versions are not offered here; trying another torch that pyproject.toml allows'; \
	  grep -Ev '$(UNTESTED)' constraints.txt > "$(VENV)/constraints.txt"; \
	  $(PYTHON) -m pip install $$quiet -e '.[course,test]' -c "$(VENV)/constraints.txt"; \
	fi; \
	echo '$(STATE)' > "$(STAMP)"

# ---- what there is to make
bench: install
	@OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" $(PYTHON) -m whalelib.bench tables

data: install
	@$(PYTHON) -m whalelib.data.kaggle fetch

submit: install
	@if [ -z "$$FILE" ]; then echo 'Which file? make submit FILE=submission.csv' >&2; exit 2; fi; \
	$(PYTHON) -m whalelib.data.kaggle submit "$$FILE" --message "$$MESSAGE" $(if $(filter 1,$(SEND)),--send)

weights: install
	@$(PYTHON) -m whalelib.weights

paper-list: install
	@$(PYTHON) -m whalelib.paper list --edition "$$EDITION" $(FULL_SIZE)

paper: install
	@$(PYTHON) -m whalelib.paper run --data "$$DATA" --edition "$$EDITION" --seed "$$SEED" --device "$$DEVICE" \
	  $(FULL_SIZE) $(if $(MODEL),--model "$$MODEL") $(if $(FOLD),--fold "$$FOLD") $(if $(BATCH),--batch "$$BATCH") \
	  $(if $(STEPS),--steps "$$STEPS") $(if $(TABLE),--table "$$TABLE")

graph: install
	@$(if $(call given,BUILD),WHALE_BUILD="$$BUILD") $(PYTHON) -m whalelib.graph --data "$$DATA" --profile "$$PROFILE" --edition "$$EDITION" --seed "$$SEED" \
	  --device "$$DEVICE" --engine "$$ENGINE" $(if $(MODEL),--model "$$MODEL")

course: install
	@$(PYTHON) -m whalelib.course run $(CHOICE) --jobs "$$JOBS"

figures: install
	@$(PYTHON) -m whalelib.course figures $(CHOICE) --jobs "$$JOBS"

ledger: install
	@$(PYTHON) -m whalelib.course ledger $(CHOICE) $(if $(ALLOW_DIRTY),--allow-dirty)

refresh: install
	@$(PYTHON) -m whalelib.course refresh --notebooks "$$NOTEBOOKS"
	@$(PYTHON) -m ruff format --quiet notebooks

lab: install
	@$(PYTHON) -m jupyterlab notebooks

# Notebooks are executed with their figures and results kept out of the way, so that the working tree stays as it is.
# A cell may wait while another notebook trains the network that both need: hence the long timeouts. Its output is read
# when it has ended, so progress bars move seldom: ten times a second for minutes is more than the queue holds.
test:
	@echo '[1/3] install'
	@$(MAKE) --no-print-directory install
	@echo '[2/3] lint'
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@echo '[3/3] tests, then every notebook cell by cell'
	@WHALE_FIGURES=build/test/figures WHALE_RESULTS=build/test/results OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" \
	  TQDM_MININTERVAL=5 $(if $(filter Linux,$(shell uname)),JUPYTER_DEFAULT_PROVISIONER_NAME=whalelib-forked) $(PYTHON) -m pytest -n "$$JOBS" --dist loadfile --no-loadscope-reorder \
	  --nbval-lax --nbval-cell-timeout=1800 --timeout=1900 tests $$($(PYTHON) -m whalelib.course order)

clean:
	rm -rf build data/cache .pytest_cache .ruff_cache .hypothesis
	@echo 'The environment (.venv) and made worlds (data/world) stay; delete those folders yourself.'
