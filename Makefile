# Every target but `wheel`, `gpu` and `clean` makes .venv first, once: the stamp is renewed when the declared
# dependencies or the CUDA C++ sources change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2
# The tests and the audit read the CUDA C++ kernels, also beside a torch without CUDA. Only where nvcc is, sought in the
# places where setup.py seeks it.
PYFUSED_CUDA ?= $(if $(shell PATH="$${CUDA_HOME:-$$PATH:/usr/local/cuda}/bin" command -v nvcc 2>/dev/null),1)

.PHONY: test peft-tests bench bench-compare docs document check audit sanitize wheel wheel-cuda gpu gpu-kit clean
.DELETE_ON_ERROR:

# The last step, which may fail, gets PEFT's tests: the test that runs some of them is skipped without them, and says so.
# The pins keep the resolver from downloading what it would then reject; without build isolation the build sees them too.
# torch comes first: the CUDA C++ kernels are compiled against it.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard csrc/* csrc/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt ninja setuptools torch
	PYFUSED_CUDA=$(PYFUSED_CUDA) $(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	-$(BIN)/python tests/integrations/peft_suite.py --fetch
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --timeout 600 --benchmark-disable $(ARGS)

# PEFT's own tests of LoRA, plain and fused. CorDA of PEFT imports attrs, which it does not declare.
peft-tests: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt attrs
	$(BIN)/python tests/integrations/peft_suite.py $(ARGS)

bench: $(STAMP)
	$(BIN)/pyfused bench --targets $(ARGS)

# BASE: the commit that the working tree is held against.
bench-compare: $(if $(BASE),$(STAMP))
	$(if $(BASE),,$(error make bench-compare needs BASE, a commit, such as BASE=main))
	$(BIN)/python -m pyfused.bench.gate.compare "$(BASE)" $(ARGS)

# The pages of docs/, and the API from docstrings, in a folder for the version; a warning is an error.
docs: $(STAMP)
	folder=build/docs/$$($(BIN)/python -c "import pyfused; print(pyfused.__version__)") && \
	$(BIN)/python -m sphinx -q -W --keep-going -E -b html docs $$folder && echo "written: $$folder/index.html"

document: $(STAMP)
	$(BIN)/python -m pyfused.bench.show.document

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory docs

audit: $(STAMP)
	$(BIN)/python csrc/audit.py
	$(BIN)/python -m pyfused.kernels.audit $(ARGS)
	$(BIN)/python -m pyfused.bench.predict

# The C++ kernels for CPUs under the compiler's sanitizers.
sanitize: $(STAMP)
	PYTHONPATH=tests $(BIN)/python -m cpu.sanitized

# Triton and plain torch, for every platform. Without build/lib*, out of which setuptools would also pack what is no
# longer in the tree.
wheel:
	rm -rf build/lib*
	PYFUSED_CUDA=0 PYFUSED_CPU=0 $(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

# For this platform, with the CUDA C++ kernels and those for CPUs.
wheel-cuda: $(STAMP)
	rm -rf build/lib*
	PYFUSED_CUDA=1 $(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

# For a machine with a GPU and perhaps no network: the system's Python and its torch, the package from this tree.
gpu:
	$(PYTHON) -m pyfused.bench.gpu $(if $(OUT),--output $(OUT)) $(ARGS)

# For a GPU machine without network, made here; ARCH is its card's: 80, 90, 100 or 120.
gpu-kit: $(STAMP)
	$(BIN)/python -m pyfused.bench.gpu.kit --arch $(or $(ARCH),90) $(ARGS)

clean:
	rm -rf $(VENV) .peft build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
