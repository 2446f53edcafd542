# Each target does its own set-up: `make demo` on a fresh Debian 12 with python3 and make is enough.
# As root, Debian packages that are missing are installed; a plain user is told what is missing.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
SHELL  := /bin/sh

.PHONY: demo test test-debian-kernel lint bench venv clean packages test-packages daemon-packages guest-packages
.DEFAULT_GOAL := test

demo: packages $(STAMP)
	$(PY) -m pipeline demo

# pytest's exit status 5 (no test ran) is a failure like any other.
test: test-packages $(STAMP)
	$(PY) -m tests $(TESTS)

# What depends on the kernel, on that of this Debian: in a virtual machine, which changes nothing here. Root only.
KERNEL := .kernel
GUEST_TESTS ?= tests/kernel \
  $(foreach one,memory_tracking memory_pages anonymous pipes tasks_state userfault,tests/resources/test_$(one).py) \
  $(foreach one,sockets anonymous huge_pages answering,tests/test_carried_states.py::test_state_is_carried[$(one)-depth2]) \
  tests/test_live_migration.py::test_no_page_is_ever_wrong[huge-precopy] \
  tests/test_dump_precopy.py::test_a_tree_that_never_rests_has_every_page[depth2-whole] \
  tests/test_live_migration.py::test_a_family_changes_while_its_draft_is_sent[depth1-precopy]
test-debian-kernel: test-packages guest-packages $(STAMP) $(KERNEL)
	$(PY) -m tests.guest --kernel $(KERNEL) -- $(PY) -m tests -q -o timeout=1200 $(GUEST_TESTS)

$(KERNEL): | guest-packages
	rm -rf $@.new && mkdir $@.new
	cd $@.new; fetch() { \
	  apt-get download -qq "$$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -n 's/^ *Depends: //p' | head -n 1)"; \
	}; fetch 2>/dev/null || { apt-get update -qq && fetch; }
	dpkg -x $@.new/*.deb $@.new && rm $@.new/*.deb && mv $@.new $@

lint: packages $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: test-packages $(STAMP)
	$(PY) -m bench $(BENCH)

venv: packages $(STAMP)

# Made again when the dependencies change; an environment whose Python is gone is thrown away.
$(STAMP): pyproject.toml | packages
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.11" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); } || \
	  { echo "make: no virtual environment without the package python3-venv: apt-get install python3-venv" >&2; exit 1; }
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@

clean:
	rm -rf $(KERNEL) $(KERNEL).new build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage

# command-or-probe=package; what is there already is not touched.
define install_missing
	@missing=; \
	for pair in $(1); do \
	  case $${pair%%=*} in \
	    ensurepip) $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null ;; \
	    libc-headers) test -e /usr/include/stdio.h ;; \
	    postgres) ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 ;; \
	    *) PATH=$$PATH:/usr/sbin:/sbin command -v $${pair%%=*} >/dev/null ;; \
	  esac || missing="$$missing $${pair#*=}"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	  echo "make: missing on this machine:$$missing; going on with what is there" >&2; exit 0; \
	fi; \
	echo "make: installing$$missing" >&2; log=$$(mktemp); \
	{ apt-get install -y -qq --no-install-recommends $$missing || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; }; } \
	  >$$log 2>&1 </dev/null || \
	  { tail -n 5 $$log >&2; echo "make: could not install$$missing; going on" >&2; }; \
	rm -f $$log
endef

packages: export DEBIAN_FRONTEND = noninteractive
packages:
	$(call install_missing,ensurepip=python3-venv newuidmap=uidmap)

test-packages: export DEBIAN_FRONTEND = noninteractive
test-packages: packages
	$(call install_missing,cc=gcc libc-headers=libc6-dev ip=iproute2 \
	  Xvnc=tigervnc-standalone-server xclock=x11-apps xterm=xterm xwininfo=x11-utils tmux=tmux vim=vim top=procps \
	  nft=nftables strace=strace bwrap=bubblewrap fio=fio \
	  runc=runc busybox=busybox-static make=make rsync=rsync perl=perl-base sqlite3=sqlite3 gzip=gzip less=less \
	  node=nodejs javac=openjdk-17-jdk-headless go=golang-go wrk=wrk \
	  ping=iputils-ping dnsmasq=dnsmasq-base)

guest-packages: export DEBIAN_FRONTEND = noninteractive
guest-packages: packages
	$(call install_missing,qemu-system-x86_64=qemu-system-x86 cpio=cpio modprobe=kmod busybox=busybox-static)

# Daemons that tests move, each started by its test and in namespaces of its own. Debian's packages also set the machine's
# own up, which is kept from starting now, but not at the next boot: so only who asks for them gets them.
DENY := /usr/sbin/policy-rc.d
daemon-packages: export DEBIAN_FRONTEND = noninteractive
daemon-packages: packages
	@if [ "$$(id -u)" = 0 ] && [ ! -e $(DENY) ]; then \
	  printf '#!/bin/sh\nexit 101 # made by make daemon-packages\n' >$(DENY) && chmod 755 $(DENY); \
	fi
	$(call install_missing,postgres=postgresql redis-server=redis-server nginx=nginx-light sshd=openssh-server \
	  systemctl=systemd)
	@if grep -qs 'made by make daemon-packages' $(DENY); then rm -f $(DENY); fi
