# Two commands for a newcomer: `make demo` (a long video from the weights in checkpoints/, no training) and `make test`.
# `make course` trains every lesson from nothing, or goes on where it was interrupted.
# TORCH_CONSTRAINTS: a pip constraints file; the tested torch by default, since an unpinned install can pull several GB.
PYTHON ?= python3
VENV ?= .venv
TORCH_CONSTRAINTS ?= constraints.txt
PRESET ?= cpu
OUT ?= runs/$(PRESET)-driving
RUN = $(VENV)/bin/python
FLAGS = --preset $(PRESET) --out $(OUT)
LESSONS = 01_toy_alignment 02_image_ldm 03_temporal_layers 04_decoder_finetune 05_prediction 06_interpolation \
          07_upsampler

.PHONY: install demo course smoke test lint

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(TORCH_CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c $(TORCH_CONSTRAINTS) -e ".[video,dev]"
	touch $@

# Numbers are written after training: where they are missing, a lesson starts, or goes on where it was interrupted.
$(OUT)/%/numbers.json: | $(VENV)/installed
	$(RUN) $*.py $(FLAGS) --resume

$(OUT)/03_temporal_layers/numbers.json: | $(OUT)/02_image_ldm/numbers.json
$(OUT)/04_decoder_finetune/numbers.json: | $(OUT)/02_image_ldm/numbers.json
$(OUT)/05_prediction/numbers.json: | $(OUT)/03_temporal_layers/numbers.json
$(OUT)/06_interpolation/numbers.json: | $(OUT)/03_temporal_layers/numbers.json
$(OUT)/07_upsampler/numbers.json: | $(OUT)/02_image_ldm/numbers.json

demo: $(VENV)/installed
	$(RUN) 08_sample_long.py --out runs/demo --seconds 3.77 --upsampled-seconds 1 --seed 6 --night 0 --cars 1 --overwrite

course: $(LESSONS:%=$(OUT)/%/numbers.json)
	$(RUN) 08_sample_long.py $(FLAGS) --overwrite

smoke: $(VENV)/installed
	rm -rf runs/smoke-driving
	for lesson in $(LESSONS) 08_sample_long; do $(RUN) $$lesson.py --preset smoke || exit 1; done

test: $(VENV)/installed
	$(RUN) -m pytest -q

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
