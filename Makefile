PYTHON ?= python3
VENV   ?= .venv
RUN     = $(VENV)/bin/python

TOY     = data/toy
OUT     = data/toy/saved_models
UNTRAINED = $(OUT)/untrained
GLIMPSES  = --k 1 --start_size 1 --rnn_hidden 256
SHARED  = --data_dir $(TOY) --save_dir $(OUT) --batch_size 32 --lr 1e-3
TEST    = $(RUN) main.py $(SHARED) --task=test

SHELL       := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.PHONY: demo toy_table test test-slow clean

# Everything that the repository does, on a small synthetic set, in minutes on a CPU.
demo: $(VENV)/.installed $(TOY)/lists/test_list.mat
	$(RUN) pretrain.py $(SHARED) --weights none --arch resnet18 --patch_size 32 --epochs 10
	rm -f $(UNTRAINED)/saved_model.tar
	$(RUN) main.py $(SHARED) $(GLIMPSES) --epochs 0 --save_dir $(UNTRAINED) --backbone $(OUT)/pt_glimpse_model.tar
	$(RUN) main.py $(SHARED) $(GLIMPSES) --epochs 10
	$(RUN) main.py $(SHARED) --task=view_glimpses --imgs_dir imgs/toy/before --save_dir $(UNTRAINED)
	$(RUN) main.py $(SHARED) --task=view_glimpses --imgs_dir imgs/toy
	$(TEST) | tee $(OUT)/test_learned.txt
	$(TEST) --policy=center | tee $(OUT)/test_center.txt
	$(TEST) --policy=random | tee $(OUT)/test_random.txt
	@echo; echo "Where to look, learned or not:"; grep -hE "^(policy|glimpse)" $(OUT)/test_{learned,center,random}.txt
	@echo "Where the model looks is drawn in imgs/toy/glimpse_<i>.jpg, and before training in imgs/toy/before."

# The README's table of the toy set: every policy trained and tested, three seeds.
toy_table: $(VENV)/.installed $(TOY)/lists/test_list.mat
	$(RUN) tests/toy_table.py --data_dir $(TOY) --out $(TOY)/table

test: $(VENV)/.tools-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

# What takes minutes: dozens of kills, hundreds of epochs.
test-slow: $(VENV)/.tools-installed
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal -m slow

$(TOY)/lists/test_list.mat: data/toy_dogs.py | $(VENV)/.installed
	$(RUN) data/toy_dogs.py --data_dir $(TOY)

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -r requirements.txt
	@touch $@

$(VENV)/.tools-installed: $(VENV)/.installed
	$(VENV)/bin/pip install pytest==9.2.0 pytest-xdist==3.8.0 ruff==0.17.6 tensorboard pillow-heif
	@touch $@

clean:
	rm -rf $(VENV) $(TOY) imgs/toy
