# make demo   the whole way on synthetic scenes: data, training, inference, pictures, a table
# make test   the tests
# Both set up a virtual environment first. PYTHON= and VENV= can be given.

PYTHON ?= python3
VENV ?= .venv
PY = "$(VENV)/bin/python"
READY = $(VENV)/requirements.installed
REQUIREMENTS = requirements.txt requirements-extra.txt requirements-dev.txt

.PHONY: demo test lint clean

demo: setup
	$(PY) benchmarks/demo.py --output demo

test: setup
	$(PY) -m pytest

lint: setup
	$(PY) -m ruff check .

# A folder's name may hold spaces, which make's own rules cannot: the shell compares the stamp.
.PHONY: setup
setup:
	@if ! cat $(REQUIREMENTS) | cmp -s - "$(READY)"; then \
	  echo "setting up $(VENV)" && "$(PYTHON)" -m venv "$(VENV)" && \
	  $(PY) -m pip install --quiet --disable-pip-version-check $(REQUIREMENTS:%=-r %) && \
	  cat $(REQUIREMENTS) > "$(READY)"; \
	fi

clean:
	rm -rf demo
