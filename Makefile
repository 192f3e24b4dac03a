# One command each. `make` alone lists them; CONTRIBUTING.md explains them.
#
# Every command makes the virtual environment it needs and reinstalls only when a file it depends
# on has changed. PYTHON=... chooses the Python, CXX=... the compiler, JOBS=... how many tests run
# at a time, EVERY=1 all variants of every test in place of one in four.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

DEV_VENV  ?= .venv
TEST_VENV ?= .venv-test
DEMO_VENV ?= .venv-demo
HF_VENV   ?= .venv-hf
ASAN_VENV ?= .venv-asan
CLIENTS_VENV ?= .venv-clients
JOBS      ?= 2
EVERY     ?= 4

# What an installed octavo is made of.
NATIVE_SOURCES := CMakeLists.txt $(shell find csrc tests/emulator -type f)
PYTHON_SOURCES := pyproject.toml $(shell find python reference -type f \
                    -not -path '*/__pycache__/*' -not -name '*.so')
SOURCES := $(NATIVE_SOURCES) $(PYTHON_SOURCES)
CXX_FILES := csrc tests/native tests/emulator -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

PIP := bin/python -m pip -qq --disable-pip-version-check
# Building with the environment's own CMake keeps the object files from one build to the next.
# (pip older than 23.1, which Python 3.10 and 3.11 bring, knows --config-settings but not -C.)
SET := --config-settings=
# One build serves the environments of all tests.
TEST_BUILD := "$(SET)build-dir=build/test/{wheel_tag}" $(SET)cmake.define.OCTAVO_CUDA=OFF \
  $(SET)cmake.define.OCTAVO_EMULATE_AMX=ON $(SET)cmake.define.OCTAVO_EMULATE_CUDA=ON
# (lm-eval needs rouge_score, which comes as source only and is built with setuptools' bdist_wheel.)
BUILD_TOOLS := "scikit-build-core>=1.0" "nanobind>=3.0" "cmake>=3.28" "ninja>=1.10" "setuptools>=70.1"

.PHONY: help
help: ## List the commands
	@echo "octavo: make COMMAND"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)$$/  \1|\2/p' $(MAKEFILE_LIST) | \
	  awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

# ---- the two commands for a newcomer ----

.PHONY: demo
demo: $(DEMO_VENV)/.installed ## Build octavo from source, fetch a small model and ask it something
	$(DEMO_VENV)/bin/octavo pull smollm2-135m
	$(DEMO_VENV)/bin/octavo generate "What is the capital of France?"

# Exactly what a user does: `pip install .`, with the build requirements fetched by pip.
$(DEMO_VENV)/.installed: $(SOURCES) scripts/venv.sh
	@scripts/venv.sh $(DEMO_VENV)
	@echo "building and installing octavo (some minutes; with nvcc, up to ten more on two cores)"
	@$(DEMO_VENV)/$(PIP) install .
	@touch $@

.PHONY: test
test: $(TEST_VENV)/.installed ## Run the tests that need no torch, against an installed octavo; EVERY=1: all variants
	$(TEST_VENV)/bin/octavo pull smollm2-135m
	$(TEST_VENV)/bin/python -m pytest --ignore=tests/hf --ignore=tests/clients --ignore=tests/slurm --ignore=tests/docs --timeout=300 -n $(JOBS) --every $(EVERY) $(ARGS)

$(TEST_VENV)/.installed: $(SOURCES) scripts/venv.sh
	@scripts/venv.sh $(TEST_VENV)
	@echo "building and installing octavo with what its tests need (some minutes)"
	@$(TEST_VENV)/$(PIP) install $(BUILD_TOOLS)
	@$(TEST_VENV)/$(PIP) install --no-build-isolation ".[test]" $(TEST_BUILD)
	@touch $@

.PHONY: test-page
test-page: $(TEST_VENV)/.installed ## The server's pages in headless Chromium, which has to be there
	$(TEST_VENV)/$(PIP) install "octavo[browser]"
	$(TEST_VENV)/bin/python -m pytest tests/server/test_server_page*.py --timeout=300 $(ARGS)

# Starts slurmctld and slurmd on this machine, as root: apt install slurmctld slurmd slurm-client munge
.PHONY: test-slurm
test-slurm: $(TEST_VENV)/.installed ## Jobs on a real Slurm of one node, which this starts: killed, resumed
	$(TEST_VENV)/bin/python -m pytest tests/slurm --timeout=280 $(ARGS)

.PHONY: docs
docs: $(TEST_VENV)/.installed ## Build the documentation as a site, in build/site
	$(TEST_VENV)/$(PIP) install "octavo[docs]"
	NO_MKDOCS_2_WARNING=1 $(TEST_VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

.PHONY: test-docs
test-docs: docs ## Every command of README and docs/, the learning path, the site
	$(TEST_VENV)/bin/octavo pull smollm2-135m
	$(TEST_VENV)/bin/python -m pytest tests/docs --timeout=300 -n $(JOBS) $(ARGS)

# The plots and tables of docs/learn, on a quiet machine.
.PHONY: learn
learn: $(TEST_VENV)/.installed ## Measure the experiments of docs/learn and the ladder anew
	$(TEST_VENV)/bin/octavo pull smollm2-135m
	for script in docs/learn/experiments/0*.py benchmarks/ladder/ladder.py; do \
	  echo "$$script"; $(TEST_VENV)/bin/python $$script || exit 1; done
	$(TEST_VENV)/bin/python docs/learn/include.py

# Apart from the other tests, whose versions of packages these clients would change.
.PHONY: test-clients
test-clients: $(CLIENTS_VENV)/.installed ## The server with other people's clients: openai, anthropic, litellm …
	$(CLIENTS_VENV)/bin/octavo pull smollm2-135m
	$(CLIENTS_VENV)/bin/python -m pytest tests/clients --timeout=300 $(ARGS)

$(CLIENTS_VENV)/.installed: $(SOURCES) scripts/venv.sh
	@scripts/venv.sh $(CLIENTS_VENV)
	@echo "building and installing octavo with clients of its server (some minutes)"
	@$(CLIENTS_VENV)/$(PIP) install $(BUILD_TOOLS)
	@$(CLIENTS_VENV)/$(PIP) install --no-build-isolation ".[test,clients]" $(TEST_BUILD)
	@touch $@

# ---- development ----

.PHONY: dev
dev: $(DEV_VENV)/.tools build ## Make .venv for development: editable install, tools, pre-commit hooks
	@$(DEV_VENV)/$(PIP) install --no-build-isolation --editable ".[dev,test,hf]" \
	  $(SET)wheel.cmake=false $(SET)editable.mode=inplace
	@if [ -d .git ]; then $(DEV_VENV)/bin/pre-commit install; fi
	@echo "ready: . $(DEV_VENV)/bin/activate"

# An editable install without its native part, which `make build` puts beside the Python files.
$(DEV_VENV)/.tools: pyproject.toml scripts/venv.sh
	@scripts/venv.sh $(DEV_VENV)
	@echo "installing the development tools"
	@$(DEV_VENV)/$(PIP) install $(BUILD_TOOLS)
	@$(DEV_VENV)/$(PIP) install --no-build-isolation --editable ".[dev,test]" \
	  $(SET)wheel.cmake=false $(SET)editable.mode=inplace
	@touch $@

.PHONY: build
build: $(DEV_VENV)/.tools ## Build the native module in place, compiling only what changed
	@PATH="$(CURDIR)/$(DEV_VENV)/bin:$$PATH" cmake -S . -B build/dev -G Ninja --log-level=WARNING \
	  -DPython_EXECUTABLE="$(CURDIR)/$(DEV_VENV)/bin/python" -DOCTAVO_EMULATE_AMX=ON \
	  -DOCTAVO_EMULATE_CUDA=ON
	@PATH="$(CURDIR)/$(DEV_VENV)/bin:$$PATH" cmake --build build/dev

# Apart, so that `make -k check` goes on after the first that complains.
.PHONY: check lint types rooms clang-format
check: lint types rooms clang-format ## Lint, types, imports, formatting: ruff, mypy --strict, clang-format

lint: $(DEV_VENV)/.tools
	$(DEV_VENV)/bin/ruff check
	$(DEV_VENV)/bin/ruff format --check

types: $(DEV_VENV)/.tools
	$(DEV_VENV)/bin/mypy

rooms: $(DEV_VENV)/.tools
	$(DEV_VENV)/bin/lint-imports --no-cache

clang-format: $(DEV_VENV)/.tools
	@echo "$(DEV_VENV)/bin/clang-format --dry-run -Werror csrc tests/native tests/emulator"
	@find $(CXX_FILES) | sort | xargs $(DEV_VENV)/bin/clang-format --dry-run -Werror

.PHONY: format
format: $(DEV_VENV)/.tools ## Let the formatters rewrite Python and C++
	$(DEV_VENV)/bin/ruff check --fix
	$(DEV_VENV)/bin/ruff format
	find $(CXX_FILES) | xargs $(DEV_VENV)/bin/clang-format -i

.PHONY: asan native-asan asan-python
asan: native-asan asan-python ## Native tests and the ops' tests under address and UB sanitizers

native-asan: $(ASAN_VENV)/.installed
	UBSAN_OPTIONS=print_stacktrace=1 build/asan/tests/native/octavo_tests
	@emulator=build/asan/tests/emulator/emulator_tests; if [ -x $$emulator ]; then \
	  echo $$emulator; UBSAN_OPTIONS=print_stacktrace=1 $$emulator; fi

# Python itself is not instrumented: the sanitizer is loaded before it, and leaks are not counted.
asan-python: $(ASAN_VENV)/.installed
	scripts/asan_pytest.sh $(ASAN_VENV)/bin/python -n $(JOBS) $(ARGS)

# One build for both.
$(ASAN_VENV)/.installed: $(SOURCES) $(wildcard tests/native/*) scripts/venv.sh
	@scripts/venv.sh $(ASAN_VENV)
	@echo "building and installing octavo with sanitizers (some minutes)"
	@$(ASAN_VENV)/$(PIP) install $(BUILD_TOOLS)
	@$(ASAN_VENV)/$(PIP) install --no-build-isolation ".[test]" "$(SET)build-dir=build/asan" \
	  $(SET)cmake.define.OCTAVO_WERROR=ON $(SET)cmake.define.OCTAVO_SANITIZE=ON \
	  $(SET)cmake.define.OCTAVO_BUILD_TESTS=ON $(SET)cmake.define.OCTAVO_CUDA=OFF \
	  $(SET)cmake.define.OCTAVO_EMULATE_AMX=ON $(SET)cmake.define.OCTAVO_EMULATE_CUDA=ON \
	  $(SET)install.strip=false
	@touch $@

# native-NAME builds and runs tests/native with the options of that variant.
.PHONY: native-tsan native-clang native-scalar native-neon
native-tsan:   NATIVE_OPTIONS = -DOCTAVO_WERROR=ON -DCMAKE_BUILD_TYPE=None "-DCMAKE_CXX_FLAGS=-O1 -g1 -fsanitize=thread"
native-clang:  NATIVE_OPTIONS = -DOCTAVO_WERROR=ON -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_COMPILER=clang++ "-DCMAKE_CXX_FLAGS=-O1 -Wno-pass-failed -stdlib=libc++"
native-scalar: NATIVE_OPTIONS = -DOCTAVO_WERROR=ON "-DOCTAVO_DISABLE_ISAS=avx2;avx512;amx"
# For 64-bit ARM, on any machine: needs g++-aarch64-linux-gnu and qemu-user.
native-neon:   NATIVE_OPTIONS = -DOCTAVO_WERROR=ON "-DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/cmake/aarch64-linux-gnu.cmake"
native-neon:   NATIVE_RUN = qemu-aarch64 -L /usr/aarch64-linux-gnu
native-tsan native-clang native-scalar native-neon: $(DEV_VENV)/.tools
	@PATH="$(CURDIR)/$(DEV_VENV)/bin:$$PATH" cmake -S . -B build/$@ -G Ninja --log-level=WARNING \
	  -DOCTAVO_BUILD_PYTHON=OFF -DOCTAVO_BUILD_TESTS=ON -DOCTAVO_CUDA=OFF -DOCTAVO_EMULATE_AMX=ON \
	  $(NATIVE_OPTIONS)
	@PATH="$(CURDIR)/$(DEV_VENV)/bin:$$PATH" cmake --build build/$@
	$(NATIVE_RUN) build/$@/tests/native/octavo_tests

.PHONY: mutants
mutants: $(DEV_VENV)/.tools ## Plant mistakes in copies of the tree; count those that no test catches
	PATH="$(CURDIR)/$(DEV_VENV)/bin:$$PATH" $(DEV_VENV)/bin/python tests/mutants/mutants.py $(ARGS)

# ---- CUDA ----

.PHONY: cuda-resources
cuda-resources: $(DEV_VENV)/.tools ## Compile every CUDA kernel; registers and spills (needs nvcc); ARGS=--record
	PATH="$(CURDIR)/$(DEV_VENV)/bin:$$PATH" $(DEV_VENV)/bin/python scripts/kernel_resources.py $(ARGS)

# ---- beside Hugging Face ----

.PHONY: test-hf
test-hf: $(HF_VENV)/.installed ## Compare with live Hugging Face (installs torch, 200 MB or more)
	$(HF_VENV)/bin/octavo pull smollm2-135m
	@# A thread for each test process, and whole files of tests, which share their models.
	OMP_NUM_THREADS=1 OCTAVO_NUM_THREADS=1 $(HF_VENV)/bin/python -m pytest tests/hf --timeout=600 \
	  -n $(JOBS) --dist loadfile $(ARGS)

.PHONY: golden
golden: $(HF_VENV)/.installed ## Make the golden files of the tests anew from Hugging Face
	$(HF_VENV)/bin/python tests/golden/make_golden.py

# The installation, the first time, does not count among the 15 minutes. ARGS="--rounds 1" …
.PHONY: bench
bench: $(HF_VENV)/.installed $(HF_VENV)/.llama ## octavo, transformers, llama.cpp: 15 minutes; JSON and a report
	$(HF_VENV)/bin/octavo pull smollm2-135m
	@# The report is written where a gate fails, too: it says which.
	$(HF_VENV)/bin/python benchmarks/run.py benchmarks/specs/quick.yaml --output build/bench/quick.json $(ARGS); \
	  status=$$?; $(HF_VENV)/bin/octavo report build/bench/quick.json -o build/bench/report.html && exit $$status

# Where llama.cpp cannot be built, the benchmark states that as a gap.
$(HF_VENV)/.llama: benchmarks/build_llama.sh | $(HF_VENV)/.installed
	@echo "building llama.cpp for this processor (some minutes, once)"
	@JOBS=$(JOBS) benchmarks/build_llama.sh $(HF_VENV) && touch $@ || \
	  echo "llama.cpp was not built: the report will say so"

$(HF_VENV)/.installed: $(SOURCES) scripts/venv.sh
	@scripts/venv.sh $(HF_VENV)
	@echo "building and installing octavo, torch and transformers (some minutes)"
	@$(HF_VENV)/$(PIP) install $(BUILD_TOOLS)
	@$(HF_VENV)/$(PIP) install --no-build-isolation ".[test,hf,bench]" $(TEST_BUILD)
	@touch $@

.PHONY: clean
clean: ## Remove builds, caches and the virtual environments of demo and of tests
	rm -rf build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  $(TEST_VENV) $(DEMO_VENV) $(ASAN_VENV) $(HF_VENV) $(CLIENTS_VENV)
	find python reference tests -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f python/octavo/_native*.so
