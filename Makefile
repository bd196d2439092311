# Everything runs in one virtual environment. It is made on first use, and again when the dependencies change.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
REPOSITORY := .cache/models
COMPILE = UV_CUSTOM_COMPILE_COMMAND="make requirements" $(VENV)/bin/uv pip compile --quiet --upgrade \
	--generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28

.PHONY: demo federated test tools test-image serve lint protos requirements benchmark clean

demo: $(STAMP)  ## Train, export, serve and call a model on real data, and compare the results.
	$(VENV)/bin/python examples/demo.py

federated: $(STAMP)  ## Train 100 clients by federated averaging on a server, and compare with a local program.
	$(VENV)/bin/python examples/federated_averaging.py

test: $(STAMP) tools  ## Run all tests in two processes, because most tests wait for a server of their own.
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile

tools:  # Install what tests need and is not a Python package (Redis, Prometheus and others), if it is missing.
	requirements/tools.sh

test-image: $(STAMP)  ## Build the image, run it and call it. Needs root and the packages that .ci/image installs.
	$(VENV)/bin/python -m pytest -m image

serve: $(STAMP) $(REPOSITORY)/digits/1  ## Serve an example repository on localhost:8500 until Ctrl-C.
	$(VENV)/bin/forwardpass-server serve --model-repository $(REPOSITORY)

lint: $(STAMP) tools  ## Check format, lint, types, layers and protocol.
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	npx --yes pyright@1.1.414 --level error --pythonpath $(VENV)/bin/python tests/client/programs/types_of_results.py
	npx --yes @bufbuild/buf@1.75.0 lint
	$(VENV)/bin/hadolint Dockerfile

protos:  ## Generate the Python beside the .proto files.
	PYTHON=$(PYTHON) protos/generate.sh

docs/metrics.md: $(STAMP) $(wildcard server/forwardpass_server/telemetry/*.py)  ## Write the catalogue of metrics.
	$(VENV)/bin/python -m forwardpass_server.telemetry.catalogue > $@

requirements: $(STAMP)  ## Pin the packages of the image by version and hash: the newest that pyproject.toml allows.
	$(COMPILE) deploy/image/build.in --output-file deploy/image/build.txt
	$(COMPILE) pyproject.toml --extra server --extra fast --extra redis --extra s3 --extra gcs --extra tracing --output-file deploy/image/server.txt
	$(COMPILE) pyproject.toml --extra gpu --extra fast --extra redis --extra s3 --extra gcs --extra tracing --output-file deploy/image/gpu.txt

benchmark: $(STAMP)  ## Measure floors, other servers and ours. The second part installs the other servers.
	$(VENV)/bin/python benchmarks/run.py
	$(VENV)/bin/python benchmarks/targets.py

clean:
	rm -rf $(VENV) .cache

$(STAMP): pyproject.toml
	@echo "installing into $(VENV); the first time takes some minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(REPOSITORY)/digits/1: | $(STAMP)
	rm -rf $(REPOSITORY).new
	$(VENV)/bin/python examples/digits.py $(REPOSITORY).new && mkdir -p $(@D) && mv $(REPOSITORY).new/digits/1 $@
