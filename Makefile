# `make demo` and `make test` need Python 3.11 and make; everything else they set up themselves, once.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
OUTPUTS ?= outputs
UI_PORT ?= 5000
# The study of quality trains a dozen models, for hours, that of dictionaries three dozen, that of full retraining four: only when they are named.
BENCH ?= $(filter-out pair_weights quality retraining dictionaries hacking,$(patsubst tests/bench/bench_%.py,%,$(wildcard tests/bench/bench_*.py)))
# These run in the environment of the libraries that they are compared with, and this one in that of the frameworks whose clients are tested.
BESIDE_OTHERS := sae sarm
WITH_TRL := hacking

export PYTHONUNBUFFERED := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo docs test test-quick test-site test-gpu test-kernels bench-gpu evidence test-fuzz test-docs test-chaos test-formats test-official test-clients test-vllm test-load test-package test-tutorials lint types audit bench ui lock clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

$(VENV)/.ready: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "error: $(PYTHON) is missing. Install Python 3.11, or pass make PYTHON=/path/to/python3.11."; exit 2; }
	@echo "setting up $(VENV) (once; downloads about 1 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(VENV)/.ready  ## the whole chain on a real model and real preferences, on this machine
	$(BIN)/python jobs/pipeline.py demo

# mypy keeps one core busy for a minute, and the tests now and then leave one idle: side by side.
test: $(VENV)/.ready lint  ## everything that checks the project
	$(MAKE) --no-print-directory -j 2 types tests

.PHONY: tests
tests: $(VENV)/.ready .triton/.ready
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-quick: $(VENV)/.ready .triton/.ready lint  ## style, and the tests that need no cluster but one for the whole chain: before a commit
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow"

test-docs: $(VENV)/.ready  ## every command of README, docs and help, unchanged, the whole demo among them: half an hour; DOCS=FOLDER keeps it
	SARM_DOCS=$(or $(DOCS),1) $(BIN)/python -m pytest tests/test_documented_commands.py --timeout 3600

.venv-official/.ready: tests/evaluate/official/requirements.txt
	$(PYTHON) -m venv .venv-official
	.venv-official/bin/python -m pip install --progress-bar on torch==2.13.0
	.venv-official/bin/python -m pip install --progress-bar on -r tests/evaluate/official/requirements.txt
	.venv-official/bin/python -m pip install --no-deps rewardbench==0.1.4
	@touch $@

test-official: $(VENV)/.ready .venv-official/.ready  ## our scores against the published rewardbench 0.1.4, to the last bit
	$(BIN)/python -m pytest tests/evaluate/test_official.py

# On top of the locked packages, whose folder it adds to its own: only what those lack is installed.
.venv-clients/.ready: tests/integrations/clients/requirements.txt $(VENV)/.ready
	$(PYTHON) -m venv .venv-clients
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	  > $$(.venv-clients/bin/python -c 'import site; print(site.getsitepackages()[0])')/locked.pth
	.venv-clients/bin/python -m pip install --progress-bar on --no-deps -r tests/integrations/clients/requirements.txt
	# OpenRLHF's and verl's wheels bring a package `tests`, which would hide this project's.
	rm -rf .venv-clients/lib/python*/site-packages/tests
	.venv-clients/bin/python -m pip install --progress-bar on --no-deps --target .venv-clients/llamafactory llamafactory==0.9.5
	@touch $@

test-clients: .venv-clients/.ready  ## reward clients of OpenRLHF, verl, TRL and LLaMA-Factory against our server; SLIME=FOLDER of a checkout for slime's
	SLIME="$(SLIME)" .venv-clients/bin/python -m pytest tests/integrations/test_their_clients.py -rs

# vLLM pins other versions than the lock. Its wheel for CPUs comes with packages that are built for another torch, and it does without them.
.venv-vllm/.ready: tests/integrations/vllm/requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --progress-bar on -r tests/integrations/vllm/requirements.txt
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

test-vllm: $(VENV)/.ready .venv-vllm/.ready  ## SARMs inside vLLM's own server on this machine's cores, each family; 3.5 GB to set up
	SARM_VLLM=.venv-vllm/bin/python $(BIN)/python -m pytest tests/integrations/test_inside_vllm.py -rs

test-load: $(VENV)/.ready  ## the reward server over 100,000 requests: none wrong, memory flat; LOAD=N for another number
	SARM_LOAD=$(or $(LOAD),100000) $(BIN)/python -m pytest tests/serve/test_load.py -s

.venv-docs/.ready: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --progress-bar on --no-deps -r docs/requirements.txt
	@touch $@

# A site of files that loads nothing from elsewhere; a link that leads nowhere fails.
docs: .venv-docs/.ready  ## the pages of docs/ as a site, to outputs/site; needs no network once it is set up
	PATH="$(abspath .venv-docs/bin):$$PATH" NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet --strict
	@echo "outputs/site/index.html; its search needs a server: .venv-docs/bin/python -m http.server --directory outputs/site"

test-site: docs $(VENV)/.ready  ## that the site builds, and asks the network for nothing; in a browser too, where there is chromium
	SARM_SITE=outputs/site $(BIN)/python -m pytest tests/test_site.py tests/test_docs.py -rs

# On top of the locked packages, as the frameworks' environment: Jupyter's kernel, and TRL, whose trainer a tutorial runs.
.venv-tutorials/.ready: docs/requirements.txt $(VENV)/.ready
	$(PYTHON) -m venv .venv-tutorials
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	  > $$(.venv-tutorials/bin/python -c 'import site; print(site.getsitepackages()[0])')/locked.pth
	.venv-tutorials/bin/python -m pip install --progress-bar on --no-deps -r docs/requirements.txt trl==1.16.0
	@touch $@

test-tutorials: .venv-tutorials/.ready  ## the notebooks of docs/tutorials, whole, in a kernel, against the outputs that they show; KEEP=1 keeps new ones
	$(if $(KEEP),rm -rf outputs/tutorials && .venv-tutorials/bin/python -m tests.tutorials outputs/tutorials --keep,SARM_TUTORIALS=1 .venv-tutorials/bin/python -m pytest tests/test_tutorials.py --timeout 7200)

lint: $(VENV)/.ready  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready  ## types
	$(BIN)/mypy

.venv-bench/.ready: tests/bench/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --progress-bar on --no-deps -r tests/bench/requirements.txt
	@touch $@

bench: .venv-bench/.ready $(VENV)/.ready $(if $(filter $(WITH_TRL),$(BENCH)),.venv-clients/.ready)  ## figures, beside other libraries where there are any: all, or one by BENCH=sae
	@set -e; for name in $(BENCH); do \
	  python=$(BIN)/python; \
	  case " $(BESIDE_OTHERS) " in *" $$name "*) python=.venv-bench/bin/python;; esac; \
	  case " $(WITH_TRL) " in *" $$name "*) python=.venv-clients/bin/python;; esac; \
	  $$python tests/bench/bench_$$name.py; done

evidence: $(VENV)/.ready  ## measure what the claims of docs/evidence.md rest on, in pieces; hours. CLAIMS=NAME for one, MINUTES=45 for some
	$(BIN)/python -m tests.evidence $(if $(CLAIMS),--claims $(CLAIMS)) $(if $(PIECES),--pieces $(PIECES)) $(if $(MINUTES),--minutes $(MINUTES))

test-chaos: $(VENV)/.ready  ## kills of nodes, actors, drivers and MLflow, hosts that are cut off; SEED=2 for others
	SARM_CHAOS=$(or $(SEED),1) $(BIN)/python -m pytest tests/chaos tests/hosts -s

# Tests of generated layouts, files, tokenizers, templates and configs.
FUZZED := tests/data tests/contracts tests/passes/test_reward_heads.py tests/nn/test_backbone_files.py tests/serve/test_bad_requests.py
test-fuzz: $(VENV)/.ready  ## 2,000 generated inputs for each test of layouts, files, tokenizers and configs; minutes
	SARM_HYPOTHESIS=fuzz $(BIN)/python -m pytest -n 2 -m hypothesis --timeout 7200 $(FUZZED)

PACKAGE := .venv-package
# Nothing of the locked environment: what a user gets who installs the wheel.
test-package: $(VENV)/.ready  ## the wheel in a fresh environment: installs, loads, scores, explains, evaluates without what trains
	rm -rf $(PACKAGE) build
	$(PYTHON) -m venv $(PACKAGE)
	$(PACKAGE)/bin/python -m pip wheel --quiet --no-deps --wheel-dir $(PACKAGE)/dist .
	rm -rf build
	$(PACKAGE)/bin/python -m pip install --progress-bar on torch==2.13.0
	$(PACKAGE)/bin/python -m pip install --progress-bar on $(PACKAGE)/dist/sarm-*.whl
	SARM_PACKAGE=$(abspath $(PACKAGE))/bin/python $(BIN)/python -m pytest tests/test_package.py

test-formats: $(VENV)/.ready .venv-bench/.ready  ## SAE files, exchanged with the libraries whose formats they are
	$(BIN)/python -m pytest tests/formats tests/data/formats/test_sae_formats.py

AUDIT := .venv-audit
$(AUDIT)/.ready:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --progress-bar on 'pip-audit>=2.9,<3'
	@touch $@

# A machine without a GPU says so in one line, and that is no failure.
NO_GPU = import torch; torch.cuda.is_available() or print(f"skipped: torch {torch.__version__} sees no GPU")

test-gpu: $(VENV)/.ready  ## everything that needs a GPU, six minutes; on a machine with two, what needs two as well
	@reason=$$($(BIN)/python -c '$(NO_GPU)') || exit 2; if [ -n "$$reason" ]; then echo "$$reason"; else $(BIN)/python -m pytest tests/gpu -rs; fi

# On top of the locked packages, whose torch has CUDA there. flash-attn has no wheel for every torch: without it TRL takes SDPA, and
# OpenRLHF is left out.
.venv-bench-gpu/.ready: tests/bench/gpu/requirements.txt $(VENV)/.ready
	$(PYTHON) -m venv .venv-bench-gpu
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	  > $$(.venv-bench-gpu/bin/python -c 'import site; print(site.getsitepackages()[0])')/locked.pth
	.venv-bench-gpu/bin/python -m pip install --progress-bar on --no-deps -r tests/bench/gpu/requirements.txt
	-.venv-bench-gpu/bin/python -m pip install --no-deps --no-build-isolation flash-attn==2.8.3
	@touch $@

bench-gpu: $(VENV)/.ready $(if $(PEERS),.venv-bench-gpu/.ready)  ## figures of the papers' largest shapes on a GPU, four minutes, to outputs/bench/gpu.json; PEERS=1 sets up other libraries to time beside
	$(BIN)/python tests/bench/gpu/bench_gpu.py

# Where torch brings it, nothing is fetched; where there is none to fetch, the test that needs it says that it is skipped.
.triton/.ready: $(VENV)/.ready
	@mkdir -p .triton
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("triton") is None)' \
	  || $(BIN)/python -m pip install --progress-bar on --no-deps --target .triton triton==3.7.1 \
	  && touch $@ || echo "note: triton cannot be fetched here, so its kernels are not compiled"

test-kernels: .triton/.ready  ## every Triton kernel, compiled for A100, H100 and B200 without any of them
	$(BIN)/python -m pytest tests/nn/test_kernels_compile.py

audit: $(AUDIT)/.ready  ## the locked dependencies against the published vulnerabilities; asks pypi.org
	$(AUDIT)/bin/pip-audit --requirement requirements.lock --no-deps --disable-pip --strict

ui: $(VENV)/.ready  ## the list of runs in MLflow, on this machine; OUTPUTS=FOLDER for another place
	$(BIN)/python jobs/ui.py --outputs "$(OUTPUTS)" --port $(UI_PORT)

lock:  ## pin what pyproject.toml asks for, as it resolves today
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --progress-bar on torch==2.13.0 setuptools wheel
	.lock-venv/bin/python -m pip install --progress-bar on --editable '.[dev]'
	{ echo "# Made by \`make lock\`; torch's own CUDA packages are left to the platform that installs it."; \
	  .lock-venv/bin/python -m pip freeze --all --exclude-editable | grep -viE '^(nvidia-|triton|pip==|cuda-)' | sed -E 's/^(torch==[0-9.]+)\+.*/\1/'; } > requirements.lock
	rm -rf .lock-venv

clean:  ## remove outputs and caches of tools; the virtual environment stays
	rm -rf outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
