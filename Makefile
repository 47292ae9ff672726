# make demo   the whole way on synthetic scenes: data, training, inference, pictures, a table
# make test   the quick tests;   make soak   those that take minutes; HSI_SOAK_MINUTES=60 of load
# make weights   what ships in weights/, trained from nothing
# make bench MST_ROOT=... DATA_ROOT=...   all that is measured;   make gpu MST_ROOT=...   on a card, without a set-up
# make lint   layout, habits and types of the code
# All set up a virtual environment first. PYTHON= and VENV= can be given.

PYTHON ?= python3
VENV ?= .venv
PY = "$(VENV)/bin/python"
READY = $(VENV)/requirements.installed
REQUIREMENTS = requirements.txt requirements-extra.txt requirements-dev.txt
SHELL_SCRIPTS = *.sh .ci/run tests/slurm/*.sh

# OpenMP's threads wait busily: beside other work a training step takes ten times as long without this.
ifeq ($(GOMP_SPINCOUNT)$(OMP_WAIT_POLICY),)
export GOMP_SPINCOUNT = 1000
endif

.PHONY: demo test soak lint clean

demo: setup
	$(PY) benchmarks/demo.py --output demo

test: setup
	$(PY) -m pytest

soak: setup
	$(PY) -m pytest -vv -m soak --timeout 7200

# Trains what ships in weights/ from nothing; stopped and started again it goes on.
.PHONY: weights
weights: setup
	$(PY) benchmarks/train_weights.py

# Everything that is measured, on this machine: MST_ROOT= and DATA_ROOT= are needed.
.PHONY: bench
bench: setup
	$(PY) benchmarks/bench_all.py --mst-root "$(MST_ROOT)" --data_root "$(DATA_ROOT)"

lint: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	@if type shellcheck >/dev/null 2>&1; then shellcheck $(SHELL_SCRIPTS); \
	else echo "shellcheck is not installed: the shell scripts were not checked"; fi

# A folder's name may hold spaces, which make's own rules cannot: the shell compares the stamp.
.PHONY: setup
setup:
	@if ! cat $(REQUIREMENTS) | cmp -s - "$(READY)"; then \
	  echo "setting up $(VENV): some minutes, 1.5 GB or more" && "$(PYTHON)" -m venv "$(VENV)" && \
	  $(PY) -m pip install --quiet --disable-pip-version-check $(REQUIREMENTS:%=-r %) && \
	  cat $(REQUIREMENTS) > "$(READY)"; \
	fi

clean:
	rm -rf demo

# On a machine with a card and a Python that has torch, as it is: nothing is set up.
.PHONY: gpu
OUT ?= results
gpu:
	"$(PYTHON)" benchmarks/gpu.py --minutes 7 --out "$(OUT)" $(if $(MST_ROOT),--mst-root "$(MST_ROOT)")
