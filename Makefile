# make run and make test are all that a new user needs; make help lists the rest.

STEPS =
# Two worker processes with one thread each use two cores better than one process with two threads.
PYTEST = OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist worksteal

.PHONY: help run test test-all lint types layers check golden pages evidence-check evidence-confirm bench clean

help:
	@echo 'make run [STEPS=20]  set up, train a small model on real text, show its learning curve, write text with it'
	@echo 'make test            set up, run the tests that are not marked slow'
	@echo 'make test-all        run every test'
	@echo 'make lint            check style and formatting'
	@echo 'make types           check types'
	@echo 'make layers          check which package imports which'
	@echo 'make check           lint, types and layers'
	@echo 'make golden          write the golden losses, and the pairs that no model can have, anew'
	@echo 'make pages           write the pages of parts and papers, and the table of papers, anew'
	@echo 'make evidence-confirm keep evidence whose sources changed and whose numbers did not (SLUG=tim)'
	@echo 'make evidence-check  run drawn pieces of evidence again and compare (CELLS=2)'
	@echo 'make bench           measure speed beside other libraries'
	@echo 'make clean           remove build files and caches; .venv and runs stay'

run:
	@sh scripts/setup.sh
	@STEPS='$(STEPS)' sh scripts/run.sh

test:
	@sh scripts/setup.sh test
	$(PYTEST) -m 'not slow'

test-all:
	@sh scripts/setup.sh test
	$(PYTEST)

lint:
	@sh scripts/setup.sh test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types:
	@sh scripts/setup.sh test
	.venv/bin/mypy

layers:
	@sh scripts/setup.sh test
	.venv/bin/lint-imports

check: lint types layers

golden:
	@sh scripts/setup.sh test
	TORCHSTONE_GOLDEN=write OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/golden
	TORCHSTONE_GOLDEN=write OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/conformance -k impossible

pages:
	@sh scripts/setup.sh test
	.venv/bin/python scripts/papers_pages.py
	.venv/bin/python scripts/parts_page.py

CELLS = 2
evidence-check:
	@sh scripts/setup.sh test
	.venv/bin/python scripts/evidence_check.py --cells $(CELLS) --draw $$(git rev-list --count HEAD 2>/dev/null || echo 0)

evidence-confirm:
	@sh scripts/setup.sh test
	.venv/bin/python scripts/evidence_confirm.py $(SLUG)

bench:
	@sh scripts/setup.sh test
	@for script in benchmarks/[!_]*.py; do echo "$$script"; .venv/bin/python "$$script" || exit 1; done

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
