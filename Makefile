# Two commands matter: `make demo` and `make test`. Both make .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/demo
DATA ?=
STUDY ?= runs/study
SOURCES ?=

.PHONY: help demo study test test-fast test-all check clean-demo

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/installed  ## pairs -> scores -> partition -> sDPO -> H4 -> report, into runs/demo (DATA=folder: benchmark files of your own)
	$(BIN)/python -m sdpo_data.partition $(RUN) --config configs/demo.yaml
	$(BIN)/python -m sdpo_train $(RUN)
	$(BIN)/python -m sdpo_eval $(RUN) $(if $(DATA),--data-dir $(DATA))
	$(BIN)/python -m sdpo_eval.held_out $(RUN)
	$(BIN)/python -m sdpo_train.card $(RUN)
	$(BIN)/python -m sdpo_eval.report $(RUN)

study: .venv/installed  ## configs/study.yaml: seven arms, five seeds, into runs/study; hours on two cores, resumable (SOURCES="files of pairs")
	$(BIN)/python -m sdpo_data.pairs $(STUDY) --config configs/study.yaml $(if $(SOURCES),--source $(SOURCES)) --check
	$(BIN)/python -m sdpo_eval $(STUDY) --documents $(if $(DATA),--data-dir $(DATA))
	$(BIN)/python -m sdpo_data.decontaminate $(STUDY)
	$(BIN)/python -m sdpo_data.partition $(STUDY)
	$(BIN)/python -m sdpo_train $(STUDY)
	$(BIN)/python -m sdpo_eval.held_out $(STUDY)
	$(BIN)/python -m sdpo_eval $(STUDY) $(if $(DATA),--data-dir $(DATA))
	$(BIN)/python -m sdpo_train.card $(STUDY)
	$(BIN)/python -m sdpo_eval.report $(STUDY)

clean-demo:  ## remove runs/demo
	rm -rf runs/demo

test: .venv/installed  ## every test but the slow ones: real model, real data, a short end to end
	$(BIN)/python -m pytest -m "not slow and not network"

test-fast: .venv/installed  ## no network, no real model, under a minute
	$(BIN)/python -m pytest -m "not real and not slow and not network"

test-all: .venv/installed  ## the slow tests too
	$(BIN)/python -m pytest -m "not network"

check: .venv/installed  ## ruff and pyrefly
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
