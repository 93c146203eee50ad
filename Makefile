# Two commands for a newcomer: `make demo` (a long video from the weights in checkpoints/, no training) and `make test`.
# `make course` trains lessons 1 to 8 from nothing, or goes on where it was interrupted; `make text` adds 9 to 11.
# `make weights` trains the same lessons longer and packs them into checkpoints/: a day on two cores, minutes on a GPU:
# make -j3 weights EXTRA="--threads 1 --workers 5 --cuda-graphs --device-noise". Interrupted, it goes on where it was.
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
TEXT = 09_text_to_video 10_personalization 11_latent_upsampler
PROMPT ?= a red car ahead on a left curve at night in the town

.PHONY: help install demo course text weights smoke test exercises notebooks pages lint

help:
	@echo "make demo      a long video from the weights in checkpoints/, no training"
	@echo "make course    train lessons 1 to 8 from nothing, or go on; make text: lessons 9 to 11"
	@echo "make smoke     run all lessons for a moment; make test, make lint: the tests, the style"
	@echo "make weights   train longer, and pack checkpoints/"
	@echo "make exercises check what you have written; make notebooks, make pages: the lessons to read"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml $(TORCH_CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c $(TORCH_CONSTRAINTS) -e ".[video]"
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(VENV)/bin/pip install -q -c $(TORCH_CONSTRAINTS) -e ".[video,dev]"
	touch $@

# Numbers are written after training: where they are missing, a lesson starts, or goes on where it was interrupted.
$(OUT)/%/numbers.json: | $(VENV)/installed
	$(RUN) $*.py $(FLAGS) --resume $($(LONG)_$*) $(EXTRA)
	$(if $($(LONG)_last_$*),$(RUN) $*.py $(FLAGS) --resume $($(LONG)_$*) $($(LONG)_last_$*) $(EXTRA))

$(OUT)/03_temporal_layers/numbers.json: | $(OUT)/02_image_ldm/numbers.json
$(OUT)/04_decoder_finetune/numbers.json: | $(OUT)/02_image_ldm/numbers.json
$(OUT)/05_prediction/numbers.json: | $(OUT)/03_temporal_layers/numbers.json
$(OUT)/06_interpolation/numbers.json: | $(OUT)/04_decoder_finetune/numbers.json $(OUT)/05_prediction/numbers.json
$(OUT)/07_upsampler/numbers.json: | $(OUT)/02_image_ldm/numbers.json

$(OUT)/02_image_ldm-text/numbers.json: | $(OUT)/02_image_ldm/numbers.json
	$(RUN) 02_image_ldm.py $(FLAGS) --condition text --resume

$(OUT)/09_text_to_video/numbers.json: | $(OUT)/02_image_ldm-text/numbers.json
$(OUT)/10_personalization/numbers.json: | $(OUT)/09_text_to_video/numbers.json
$(OUT)/11_latent_upsampler/numbers.json: | $(OUT)/02_image_ldm-text/numbers.json

demo: $(VENV)/installed
	$(RUN) 08_sample_long.py --out runs/demo --seconds 3.77 --upsampled-seconds 1 --seed 1 --night 0 --cars 1 --overwrite

course: $(LESSONS:%=$(OUT)/%/numbers.json)
	$(RUN) 08_sample_long.py $(FLAGS) --overwrite

text: $(TEXT:%=$(OUT)/%/numbers.json) | $(OUT)/04_decoder_finetune/numbers.json
	$(RUN) 09_text_to_video.py $(FLAGS) --prompt "$(PROMPT)" --overwrite

# What `make weights` changes: batches, rates that fall with the root of the step, and last steps at a fifth of the rate.
# What checkpoints/ holds was made with nearly these (made.json has each command): 29 minutes of a GPU, an hour of a CPU.
# That was before Muon, which the course has now; what it does for batches like these is not known.
weights_02_image_ldm = --muon 0 --ae-muon 0 --ae-steps 6800 --ae-batch 32 --ae-steady 500 --gan-start 6400 \
  --steps 3300 --batch 256 --steady 600 --ema-decay 0.999 --reuse 6
weights_03_temporal_layers = --muon 0 --steps 1000 --batch 64 --steady 500 --ema-decay 0.999 --reuse 4
weights_04_decoder_finetune = --muon 0 --steps 2500 --batch 8 --steady 300 --gan-start 1900 --feature-steps 800
weights_05_prediction = --muon 0 --steps 4700 --batch 64 --steady 1000 --ema-decay 0.999 --reuse 4
weights_last_05_prediction = --steps 5300 --lr 2e-4 --steady 0 --warmup 1 --ema-decay 0.995
weights_06_interpolation = --muon 0 --steps 5400 --batch 64 --steady 1000 --ema-decay 0.999 --reuse 4
weights_last_06_interpolation = --steps 6400 --lr 2e-4 --steady 0 --warmup 1 --ema-decay 0.995
weights_07_upsampler = --muon 0 --image-steps 2500 --image-batch 64 --steps 2000 --batch 16 --steady 500 \
  --ema-decay 0.998 --reuse 3

weights: $(VENV)/installed
	$(MAKE) OUT=runs/weights LONG=weights $(patsubst %,runs/weights/%/numbers.json,$(filter-out 01%,$(LESSONS)))
	$(RUN) docs/pack.py runs/weights

smoke: $(VENV)/installed
	rm -rf runs/smoke-driving
	for lesson in $(LESSONS) 08_sample_long "02_image_ldm --condition text" $(TEXT); do \
	  set -- $$lesson; script=$$1; shift; $(RUN) $$script.py --preset smoke $$@ || exit 1; done

test: $(VENV)/tested
	$(RUN) -m pytest -q

exercises: $(VENV)/tested
	$(RUN) -m pytest -q -rf exercises

notebooks: $(VENV)/tested
	$(RUN) docs/notebooks.py

pages: $(VENV)/tested
	$(RUN) docs/pages.py

lint: $(VENV)/tested
	$(VENV)/bin/ruff check .
