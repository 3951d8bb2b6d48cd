# The habits. Needs nothing but Python >= 3.11 and make; everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export OMP_NUM_THREADS := 1
# where it is set, every process compiles torch, ray and flwr anew, twice the time of a start
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test test-deploy fuzz check arrows format bench docs wheel clean

setup: $(VENV)/ready

# torch goes first and exactly: an open range would fetch a CUDA build of several gigabytes; uv does the rest in a fifth of pip's time
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile "$$(grep '^torch==' constraints.txt)" "$$(grep '^uv==' constraints.txt)"
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --constraint constraints.txt --editable '.[dev,fast,lm,privacy]'
	touch $@

# local, FedAvg, FedMD and KnFu on digits: 10 clients, Dirichlet 0.3, two seeds, on the Ray runtime
demo: setup
	$(BIN)/fedfuse compare strategy=local,fedavg,fedmd,knfu seed=0,1 data=digits clients=10 partition.alpha=0.3 \
		rounds=10 train.epochs=5 evaluate.every=5 out=runs/demo

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# real processes, real kills: minutes, so not in CI
test-deploy: setup
	$(BIN)/python -m pytest tests/deploy tests/engines -m "deploy or not deploy" -v --durations=0 --timeout=1200

# ten thousand orders and ten thousand replies that nobody would write; CI tries a few hundred
fuzz: setup
	FEDFUSE_FUZZ=10000 $(BIN)/python -m pytest tests/deploy/test_fuzz.py -v -rP --durations=0 --timeout=3600

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory arrows

# the contracts of imports in pyproject.toml, on the package as it is installed: with strategies in it
arrows: setup
	rm -rf build/arrows && mkdir -p build/arrows/fedfuse && ln -s $(CURDIR)/fedfuse/* build/arrows/fedfuse/
	ln -sfn $(CURDIR)/strategies build/arrows/fedfuse/strategies
	ln -s $(CURDIR)/pyproject.toml build/arrows/
	cd build/arrows && PYTHONPATH=. $(CURDIR)/$(BIN)/lint-imports --no-cache

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/fedfuse bench

# a searchable site of docs/, the generated reference and the studies, in build/site; links checked, nothing fetched at build
docs: setup
	$(BIN)/python -c 'import mkdocs' 2>/dev/null || \
		VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python docs/site.py build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --config-file mkdocs.yml
	@echo "build/site/index.html"

# the wheel, installed elsewhere beside what setup has installed, runs README's first command from an empty folder
wheel: setup
	rm -rf build/wheel build/lib && $(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python tests/wheel.py build/wheel/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis runs
