# Two commands: `make demo` and `make test`. Each sets up what it needs in .venv; a second run installs nothing.
# Another Python: PYTHON=python3.12 make demo

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# threads that wait sleep: on a busy machine everything else is many times slower
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help demo test install lab export readme notebooks weights

help:
	@echo 'make demo       let every shipped model draw 16 image-text pairs, and read them back (writes demo/)'
	@echo 'make test       run every test: the package, the repository, each notebook'
	@echo 'make install    only set up: a virtual environment in $(VENV) with the versions of constraints.txt'
	@echo 'make lab        open the notebooks in JupyterLab'
	@echo
	@echo 'For those who change something:'
	@echo 'make export     write jointgen/*.py from the notebooks'
	@echo 'make notebooks  run every notebook from top to bottom and save it'
	@echo 'make readme     write README.md from nbs/index.ipynb'
	@echo 'make weights    train again what is shipped in jointgen/weights'
	@echo
	@echo 'Another Python than $(PYTHON): PYTHON=python3.12 make demo (3.10 or newer)'

demo: install
	@$(PY) -m jointgen.cli demo

test: install
	$(PY) -m pytest

install: $(STAMP)

lab: install
	$(PY) -m jupyterlab nbs/index.ipynb

export: install
	$(VENV)/bin/nbdev_export

readme: install
	$(PY) -m jointgen.dev readme

notebooks: install
	$(PY) -m jointgen.dev refresh nbs/*.ipynb

weights: install
	$(PY) -m jointgen.cli train reader --side 32 --out jointgen/weights
	$(PY) -m jointgen.cli train reader --side 64 --steps 400 --out jointgen/weights
	$(PY) -c "from jointgen.matching import make_matcher; make_matcher()"
	$(PY) -m jointgen.cli train lnfmm --preset tutorial --out runs/lnfmm
	cp runs/lnfmm/lnfmm.json runs/lnfmm/lnfmm.safetensors jointgen/weights/
	$(PY) -m jointgen.cli evaluate lnfmm --out runs/lnfmm
	cp runs/lnfmm/evaluation.json nbs/results/lnfmm.json
	cp runs/lnfmm/lnfmm_log.json nbs/results/
	$(PY) -c "from jointgen.recipes.lnfmm import compare, PRIORS; compare('nbs/results/lnfmm_priors.json', {k: PRIORS[k] for k in ('flow', 'Gaussian')})"
	$(PY) -c "from jointgen.recipes.lnfmm import compare, TIES; compare('nbs/results/lnfmm_ties.json', TIES, share=0.3)"
	$(PY) -m jointgen.cli train hdgan --preset tutorial --out runs/hdgan
	cp runs/hdgan/hdgan.json runs/hdgan/hdgan.safetensors jointgen/weights/
	$(PY) -m jointgen.cli evaluate hdgan --out runs/hdgan
	cp runs/hdgan/evaluation.json nbs/results/hdgan.json
	cp runs/hdgan/hdgan_log.json nbs/results/
	$(PY) -c "from jointgen.recipes.hdgan import compare, NESTS, PARTS; compare('runs/hdgan/hdgan_nests.json', NESTS | {k: PARTS[k] for k in ('no local branch', 'kl 1')}, seeds=(0,), steps=1000)"
	cp runs/hdgan/hdgan_nests.json nbs/results/
	$(PY) -m jointgen.cli train dte-gan --preset tutorial --out runs/dte-gan
	cp runs/dte-gan/dte_gan.json runs/dte-gan/dte_gan.safetensors jointgen/weights/
	$(PY) -m jointgen.cli evaluate dte-gan --out runs/dte-gan
	cp runs/dte-gan/evaluation.json nbs/results/dte_gan.json
	cp runs/dte-gan/dte_gan_log.json nbs/results/
	$(PY) -c "from jointgen.recipes.dte_gan import compare, MODES; compare('runs/dte-gan/dte_gan_modes.json', {k: v for k, v in MODES.items() if k != 'swap'}, seeds=(0,), steps=1000)"
	cp runs/dte-gan/dte_gan_modes.json nbs/results/
	$(PY) -m jointgen.cli train vhe-gan --preset tutorial --out runs/vhe-gan
	cp runs/vhe-gan/vhe_gan.json runs/vhe-gan/vhe_gan.safetensors jointgen/weights/
	$(PY) -m jointgen.cli evaluate vhe-gan --out runs/vhe-gan
	cp runs/vhe-gan/evaluation.json nbs/results/vhe_gan.json
	cp runs/vhe-gan/vhe_gan_log.json nbs/results/
	$(PY) -m jointgen.cli train vhe-gan --preset stack --out runs/vhe-gan-stack
	$(PY) -m jointgen.cli evaluate vhe-gan --weights runs/vhe-gan-stack/vhe_gan.safetensors --out runs/vhe-gan-stack
	cp runs/vhe-gan-stack/evaluation.json nbs/results/vhe_gan_stack.json
	$(PY) -c "from jointgen.recipes.vhe_gan_studies import compare, JOINT; compare('runs/vhe-gan/vhe_gan_joint.json', JOINT)"
	$(PY) -c "from jointgen.recipes.vhe_gan_studies import compare; compare('runs/vhe-gan/vhe_gan_short.json', {'two short steps': dict(joint=False)}, longer=False)"
	$(PY) -c "from jointgen.recipes.vhe_gan_studies import compare, PARTS; compare('runs/vhe-gan/vhe_gan_parts.json', PARTS, seeds=(0,))"
	$(PY) -c "from jointgen.recipes.vhe_gan_studies import compare, TOPICS; compare('runs/vhe-gan/vhe_gan_topics.json', TOPICS, seeds=(0,))"
	$(PY) -c "from jointgen.recipes.vhe_gan_studies import weigh; weigh('runs/vhe-gan/vhe_gan_kl.json')"
	$(PY) -c "from jointgen.recipes.vhe_gan_studies import study_rows; study_rows('runs/vhe-gan/vhe_gan_rows.json')"
	$(PY) -c "from jointgen.recipes.vhe_gan_unseen import compare; compare('runs/vhe-gan/vhe_gan_unseen.json')"
	for f in joint short parts topics kl rows unseen; do cp runs/vhe-gan/vhe_gan_$$f.json nbs/results/; done
	cp runs/vhe-gan/vhe_gan_rows.png nbs/images/
	$(PY) -c "from jointgen.manipulation import train_manipulator; train_manipulator('runs/manipulator', steps=2500)"
	cp runs/manipulator/manipulator_32.* jointgen/weights/
	$(PY) -m jointgen.cli train mxq-vae --preset tutorial --out runs/mxq-vae
	cp runs/mxq-vae/mxq_vae.json runs/mxq-vae/mxq_vae.safetensors jointgen/weights/
	$(PY) -m jointgen.cli evaluate mxq-vae --out runs/mxq-vae
	cp runs/mxq-vae/evaluation.json nbs/results/mxq_vae.json
	cp runs/mxq-vae/mxq_vae_log.json nbs/results/
	$(PY) -m jointgen.cli demo --out runs/demo
	cp runs/demo/mxq-vae/pairs.png nbs/images/mxq_pairs.png
	for f in runs/demo/*/everything.png; do cp $$f nbs/images/gallery_$$(basename $$(dirname $$f)).png; done
	$(PY) -c "from jointgen.recipes.mxq_vae import compare_starts; compare_starts('nbs/results/starts.json')"
	$(PY) -c "from jointgen.recipes.mxq_vae import ablate; ablate('nbs/results/ablations.json')"

$(STAMP): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'pass' || { echo '$(PYTHON) does not run: install Python 3.10 or newer, or name one: PYTHON=python3.12 make ...'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$$($(PYTHON) --version 2>&1) is too old, Python 3.10 or newer fits: name one with PYTHON=python3.12 make ..."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo '$(PYTHON) cannot make virtual environments: on Debian and Ubuntu, sudo apt install python3-venv'; exit 1; }
	@echo 'Setting up $(VENV) (once, a few minutes, about 3 GB on Linux) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@
