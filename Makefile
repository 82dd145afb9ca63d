PYTHON ?= python3
VENV   ?= .venv
RUN     = $(VENV)/bin/python

TOY       = data/toy
OUT       = $(TOY)/saved_models
UNTRAINED = $(OUT)/untrained
GLIMPSES  = --k 1 --start_size 1 --rnn_hidden 256 --lr 1e-3
PRETRAIN_EPOCHS = 5
EPOCHS = 4
TRAIN     = --data_dir $(TOY) --save_dir $(OUT) --batch_size 32 --precision fp32 --overwrite

.PHONY: demo stanford_dogs toy_table test test-slow clean

# Everything that the repository does, on a small synthetic set, in minutes on a CPU.
demo: $(VENV)/.installed $(TOY)/lists/test_list.mat
	$(RUN) pretrain.py $(TRAIN) --weights none --arch resnet18 --patch_size 32 --lr 5e-4 --epochs 10
	$(RUN) main.py $(TRAIN) $(GLIMPSES) --epochs 0 --save_dir $(UNTRAINED) --backbone $(OUT)/pt_glimpse_model.tar
	$(RUN) main.py $(TRAIN) $(GLIMPSES) --epochs 12
	$(RUN) main.py --save_dir $(UNTRAINED) --task=view_glimpses --imgs_dir imgs/toy/before
	$(RUN) main.py --save_dir $(OUT) --task=view_glimpses --imgs_dir imgs/toy
	for policy in learned center random; do \
	    $(RUN) main.py --save_dir $(OUT) --task=test --policy=$$policy > $(OUT)/test_$$policy.txt || exit 1; \
	done
	@echo; echo "Where to look, learned or not:"
	@$(RUN) tests/demo_figure.py --data_dir $(TOY) --untrained $(UNTRAINED) --trained $(OUT) --out imgs/toy/demo.jpg

# Stanford Dogs at its own size, with the settings of the table of 120 breeds; after an interruption, go on.
resumed = $$([ ! -e data/saved_models/$(1) ] || echo --resume_training=True)
stanford_dogs: $(VENV)/.installed
	$(RUN) data/stanford_dogs.py
	$(RUN) pretrain.py --batch_size 32 --epochs $(PRETRAIN_EPOCHS) --lr 5e-5 --smallest_crop 0.6 $(call resumed,pt_last.tar)
	$(RUN) pretrain.py --task=test
	$(RUN) main.py --k 2 --start_size 2 --rnn_hidden 1024 --batch_size 32 --lr 3e-4 --epochs $(EPOCHS) $(call resumed,last.tar)
	$(RUN) main.py --task=test
	$(RUN) main.py --task=view_glimpses --imgs_dir imgs/dogs

# The table of toy dogs in tests/RESULTS.md: every policy trained and tested, three seeds.
toy_table: $(VENV)/.installed $(TOY)/lists/test_list.mat
	$(RUN) tests/toy_table.py --data_dir $(TOY) --out $(TOY)/table

test: $(VENV)/.tools-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

# The slow tests, which take minutes: dozens of kills, hundreds of epochs.
test-slow: $(VENV)/.tools-installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal -m slow

$(TOY)/lists/test_list.mat: data/toy_dogs.py | $(VENV)/.installed
	$(RUN) data/toy_dogs.py --data_dir $(TOY)

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -r requirements.txt
	@touch $@

$(VENV)/.tools-installed: $(VENV)/.installed Makefile
	$(VENV)/bin/pip install pytest==9.2.0 pytest-xdist==3.8.0 ruff==0.17.6 tensorboard matplotlib pillow-heif
	@touch $@

# Data, models and drawings stay.
clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
