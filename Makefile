# Everything a developer types. Each target sets up what it needs; nothing has to be installed by hand but Python >= 3.11, Go and make.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
CACHE := .cache
SANITY_VERSION := v5.6.0
SANITY := $(CACHE)/bin/csi-sanity-$(SANITY_VERSION)
HELM_VERSION := v3.22.0
HELM := $(CACHE)/bin/helm-$(HELM_VERSION)
PYTEST := $(VENV)/bin/python -m pytest

.PHONY: help
help: ## Show this list
	@[ -t 1 ] && { bold=$$'\033[1m'; plain=$$'\033[0m'; }; \
	awk -v "bold=$$bold" -v "plain=$$plain" -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / {printf "  %s%-14s%s %s\n", bold, $$1, plain, $$2}' $(MAKEFILE_LIST)

# --- set-up -------------------------------------------------------------------------------------------------------------------------
$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (make PYTHON=/path/to/python3)")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/runtime.stamp: requirements/runtime.txt | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/runtime.txt
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt pyproject.toml | $(VENV)/bin/pip
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@ $(VENV)/runtime.stamp

# Programs that tests run for real: file systems to make, an NFS server, a kernel that runs as a process.
.PHONY: packages
packages: ## Install the Debian packages that the tests use (as root; nothing to do when they are there)
	@if [ "$$(id -u)" = 0 ]; then tests/uml/install.sh; else echo "not root: tests that need mounts are skipped, and say so"; fi

.PHONY: setup
setup: $(VENV)/dev.stamp ## Make the virtual environment with everything a developer needs

# The version is in the name, so another pin is another file and nothing stale is ever run.
$(SANITY):
	@mkdir -p $(dir $@)
	GOBIN=$(abspath $(CACHE)/bin) CGO_ENABLED=0 go install github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$(SANITY_VERSION)
	mv $(CACHE)/bin/csi-sanity $@

$(HELM):
	@mkdir -p $(dir $@)
	GOBIN=$(abspath $(CACHE)/bin) CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' helm.sh/helm/v3/cmd/helm@$(HELM_VERSION)
	mv $(CACHE)/bin/helm $@

.PHONY: lock
lock: $(VENV)/dev.stamp ## Renew the locked dependencies from pyproject.toml
	$(VENV)/bin/uv pip compile --quiet --upgrade --universal --generate-hashes --no-header --no-emit-index-url pyproject.toml -o requirements/runtime.txt
	$(VENV)/bin/uv pip compile --quiet --upgrade --universal --generate-hashes --no-header --no-emit-index-url pyproject.toml --group dev -o requirements/dev.txt
	grep -m 1 -oE '^hatchling==[^ ]+' requirements/dev.txt | $(VENV)/bin/uv pip compile --quiet --universal --generate-hashes --no-header --no-emit-index-url -c requirements/dev.txt - -o requirements/build.txt

.PHONY: proto
proto: $(VENV)/dev.stamp ## Generate the protocols' code from proto/*.proto
	$(VENV)/bin/python proto/generate.py

# --- use ----------------------------------------------------------------------------------------------------------------------------
.PHONY: run
run: $(VENV)/runtime.stamp ## Run the driver on a directory of its own and watch a volume's whole life
	@$(VENV)/bin/python -m csi_driver try --directory run

# --- deploy -------------------------------------------------------------------------------------------------------------------------
.PHONY: image
image: ## Build the image with docker, podman or buildah (IMAGE=name:tag)
	deploy/build-image $(IMAGE)

.PHONY: wheels
wheels: $(VENV)/dev.stamp ## Fetch the wheels that the image is made of, for a build that reaches no package index
	$(VENV)/bin/pip download --quiet --disable-pip-version-check --require-hashes -r requirements/runtime.txt -d wheels
	$(VENV)/bin/pip download --quiet --disable-pip-version-check --require-hashes -r requirements/build.txt -d wheels

.PHONY: manifests
manifests: $(VENV)/dev.stamp $(HELM) ## Render deploy/manifests from the chart
	HELM=$(abspath $(HELM)) $(VENV)/bin/python deploy/render.py

# --- test ---------------------------------------------------------------------------------------------------------------------------
.PHONY: test
test: lint test-fast test-minutes ## Everything: lint, types, unit, mounts, csi-sanity, storms

.PHONY: lint
lint: $(VENV)/dev.stamp ## Style, types, layers, generated code (seconds)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/python proto/generate.py --check

.PHONY: format
format: $(VENV)/dev.stamp ## Put the code into shape
	$(VENV)/bin/ruff check --fix --quiet .
	$(VENV)/bin/ruff format --quiet .

.PHONY: test-fast
test-fast: $(VENV)/dev.stamp packages $(if $(shell command -v go),$(HELM)) ## Tests that take seconds
	HELM=$(abspath $(HELM)) $(PYTEST) -m "not minutes"

.PHONY: test-minutes
test-minutes: $(VENV)/dev.stamp $(SANITY) packages ## Tests that take minutes: csi-sanity, storms, many volumes
	CSI_SANITY=$(abspath $(SANITY)) $(PYTEST) -m minutes --durations=30

.PHONY: sanity
sanity: $(VENV)/dev.stamp $(SANITY) ## csi-sanity against the driver on hostPath
	CSI_SANITY=$(abspath $(SANITY)) $(PYTEST) -m minutes tests/sanity -s

.PHONY: test-nfs
test-nfs: $(VENV)/dev.stamp $(SANITY) packages ## The driver on real NFS servers and clients, in user-mode Linux
	CSI_SANITY=$(abspath $(SANITY)) $(PYTEST) -m minutes tests/uml

# A whole cluster on this machine: namespaces, a bridge, loop devices. As root.
.PHONY: cluster
cluster: $(VENV)/dev.stamp $(HELM) ## Bring up Kubernetes with two nodes and the driver, from nothing (as root; ARGS=--nfs: and NFS)
	tests/cluster/install.sh
	cd tests && HELM=$(abspath $(HELM)) $(abspath $(VENV))/bin/python -m cluster up $(ARGS)

.PHONY: cluster-down
cluster-down: $(VENV)/dev.stamp ## Leave nothing of the cluster, nor of one whose making was killed
	cd tests && $(abspath $(VENV))/bin/python -m cluster down

.PHONY: test-cluster
test-cluster: $(VENV)/dev.stamp $(HELM) ## Stories in a real Kubernetes: in the cluster that is up, or in one of their own (as root)
	tests/cluster/install.sh
	HELM=$(abspath $(HELM)) $(PYTEST) -m cluster tests/cluster --durations=0 --durations-min=1

.PHONY: test-all
test-all: test test-cluster ## All tiers: make test, and the stories in a real Kubernetes (an hour and a half)

.PHONY: test-external
test-external: $(VENV)/dev.stamp $(HELM) ## Kubernetes' own external-storage suite (as root; BACKEND=hostpath; ARGS="--help")
	tests/cluster/install.sh
	cd tests && HELM=$(abspath $(HELM)) $(abspath $(VENV))/bin/python -m cluster.external $(BACKEND) $(ARGS)

.PHONY: bench
bench: $(VENV)/dev.stamp packages ## Captures beside cp and tar, side by side (as root; an hour; ARGS="--help", "--only copies", "--output json")
	@$(VENV)/bin/python -m tests.bench.captures $(ARGS)

.PHONY: clean
clean: ## Remove what was built, but not the caches of other tools
	rm -rf $(VENV) $(CACHE) run build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
