# make setup   everything into .venv (once; about 8 minutes of it for the build of mmcv on two cores)
# make test    set up, then the tests without the slow ones      make test-all  with them
# make demo    set up, then the main job: teacher, student alone, distilled student, table and picture
#              TASK=segmentation (default), detection or yolo;
#              TASK=adaptation: a student of scenes by day, trained further and adapted to scenes in fog
# make lint    ruff
#
# PYTHON=python3.11    the Python to use (3.10 to 3.12; default: a suitable one on PATH)
# VENV=folder          the environment (default .venv)
# MM=onedl             the maintained forks of the OpenMMLab packages instead of the originals; with a VENV of its own
# MMCV_OPS=auto|cpu|cuda   which operators of mmcv to build (auto: CUDA where a GPU and a fitting nvcc are there)

VENV ?= .venv
MM ?=
TASK ?= segmentation
MMCV_OPS ?= auto
PYTHON ?=
PYTEST_ARGS ?=

STARTER := $(or $(shell command -v python3 || command -v python3.12 || command -v python3.11 || command -v python3.10 \
	|| command -v python),python3)
SETUP := $(STARTER) tools/setup_env.py --venv "$(VENV)" --family "$(MM)" --mmcv-ops $(MMCV_OPS) --python "$(PYTHON)"
RUN := $(abspath $(VENV))/bin/python

# Ultralytics: nothing from the network, no pip, settings in the environment and not in the user's home folder.
export YOLO_OFFLINE := true
export YOLO_AUTOINSTALL := false
export YOLO_CONFIG_DIR := $(abspath $(VENV))
export MPLBACKEND := Agg
# Threads that wait for work let others run: a busy machine is slowed down less.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup ready test test-all demo lint format clean

setup:
	@$(SETUP) --verify

ready:
	@$(SETUP)

test: ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(RUN) -m pytest -q -m "not slow" $(PYTEST_ARGS)

test-all: ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(RUN) -m pytest -q $(PYTEST_ARGS)

demo: ready
	$(RUN) tools/demo.py --task $(TASK)

lint: ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: ready
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf work_dirs .pytest_cache .ruff_cache
