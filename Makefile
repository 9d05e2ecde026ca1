# Vial: what can be made. `make` alone lists it.

# All programs are static, and built in one go: there is nothing to load in the guest's image and in the VMM's jail, and
# the others then run on any host, whatever its libraries.
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
TRIPLE := x86_64-unknown-linux-gnu
RELEASE := $(TARGET)/$(TRIPLE)/release
GUEST := target/guest
PAYLOAD := target/payload

# All steps of one make count their time from here.
export VIAL_STARTED := $(or $(VIAL_STARTED),$(shell date +%s))
STEP := tests/host/step

.PHONY: help deps build kernel image images host payload shell suite demo bench baseline models fuzz fuzz-smoke deny sbom reproducible test fmt clippy clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

deps: ## install what is missing (apt on Debian and Ubuntu; elsewhere name it)
	@tests/host/install-deps

# cargo and the kernel's make count their own jobs: beside each other, each fills the pauses of the other.
OWN_JOBS := env -u MAKEFLAGS -u MFLAGS

# Where the sources are is nobody's business and no part of a program: the same sources make the same program anywhere.
REMAP := --remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)/registry/src=r --remap-path-prefix=$(CURDIR)=.

build: deps ## the programs: vial-vmm, containerd-shim-vial-v2, vial, vial-agent
	@$(STEP) build "building the programs" $(OWN_JOBS) LIBSECCOMP_LINK_TYPE=static LIBCAPNG_LINK_TYPE=static \
		RUSTFLAGS="-C target-feature=+crt-static -C force-unwind-tables=no $(REMAP)" \
		LIBSECCOMP_LIB_PATH="$$(dirname "$$(gcc -print-file-name=libseccomp.a)")" \
		LIBCAPNG_LIB_PATH="$$(dirname "$$(gcc -print-file-name=libcap-ng.a)")" \
		cargo build --release --bins --target $(TRIPLE) --workspace

kernel: deps ## the guest kernel, in the cache outside the checkout
	@$(OWN_JOBS) kernel-config/build

image: build ## the guest image, in target/guest/
	@mkdir -p $(GUEST)
	@$(RELEASE)/vial-mkimage --agent $(RELEASE)/vial-agent --output $(GUEST)/image.erofs

images: deps ## the OCI images of demo and tests, made locally
	@tests/images/build

host: deps ## the emulated host, in the cache outside the checkout
	@tests/host/build

payload: deps ## all that a host needs to run pods, in target/payload/
	@$(MAKE) --no-print-directory -j2 image kernel >/dev/null
	@kernel=$$(kernel-config/build) && images=$$(tests/images/build) && \
		tests/host/payload $(RELEASE) "$$kernel" $(GUEST)/image.erofs "$$images" $(PAYLOAD)

shell: payload host ## a shell on the emulated host, with containerd and Vial
	@$(PAYLOAD)/bin/vial-host shell --payload $(PAYLOAD)

suite: payload host ## only the end-to-end cases whose names contain FILTER, on the emulated host
	@$(PAYLOAD)/bin/vial-host run --timeout 900 --payload $(PAYLOAD) -- \
		vial-suite --import /payload/images/busybox.tar --import /payload/images/pause.tar $(FILTER)

demo: payload ## run a pod in a microVM behind containerd
	@tests/demo/run

bench: payload ## measure starts, memory and files beside runc: a table, and target/bench/report.json
	@tests/bench/run $(BENCH)

baseline: payload ## write what a start costs now, in counted instructions, to tests/bench/baseline.json
	@tests/bench/run --baseline

models: deps ## run what threads of the VMM share in all orders, by loom
	@tests/models

fuzz: deps ## run the fuzz targets for an hour each; FUZZ="--seconds N TARGET..." for less
	@tests/fuzz/run --seconds 3600 $(FUZZ)

fuzz-smoke: deps ## run the fuzz targets for a minute each
	@tests/fuzz/run --seconds 60

deny: deps ## hold the dependencies against deny.toml; DENY=--advisories for known faults, too
	@tests/supply-chain/deny $(DENY)

sbom: deps ## write what each program is made of to target/sbom/
	@tests/supply-chain/sbom

reproducible: deps ## build programs and image twice and compare the bytes
	@tests/supply-chain/reproducible

test: deps ## every check and test; ends with "N passed, N failed"
	@tests/host/run-all

fmt: ## format the code
	@cargo fmt --all

clippy: deps ## check the code, warnings are errors
	@cargo clippy --workspace --all-targets -- -D warnings

clean: ## remove what was built in the checkout (the cache stays: see kernel-config/build --help)
	@rm -rf target
