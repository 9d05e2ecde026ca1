# Shell functions that the build scripts share: the cache outside the checkout, its lock, progress with elapsed time.
# Sourced by sh; works on nothing of the checkout itself.

VIAL_CACHE=${VIAL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vial}
# make hands on when it began, so that the times of all its steps are counted from there.
vial_started=${VIAL_STARTED:-$(date +%s)}

# Progress and errors go to stderr: a script's stdout is its result.
say() { printf '[%4ds] %s\n' "$(($(date +%s) - vial_started))" "$*" >&2; }
die() { printf '%s: %s\n' "${0##*/}" "$*" >&2; exit 1; }

# sha256 of standard input, shortened: enough to name a cache entry.
digest() { sha256sum | cut -c1-20; }

# with_lock NAME: takes the lock for the rest of this process, saying so when it has to wait for another run.
with_lock() {
	mkdir -p "$VIAL_CACHE/locks"
	exec 7>"$VIAL_CACHE/locks/$1"
	flock -n 7 && return
	say "waiting for another run that builds $1"
	flock 7
}

# run_logged LOG WHAT COMMAND...: runs it with its output in LOG, a line each 15 s, and the log's end when it fails.
run_logged() {
	log=$1 what=$2
	shift 2
	say "$what"
	# Closing 7 keeps a child that outlives us from holding the lock.
	"$@" >>"$log" 2>&1 </dev/null 7>&- &
	pid=$!
	trap 'kill $pid 2>/dev/null; exit 130' INT TERM
	ticks=0
	while kill -0 "$pid" 2>/dev/null; do
		sleep 0.2
		ticks=$((ticks + 1))
		[ $((ticks % 75)) -ne 0 ] || say "$what (still at it)"
	done
	trap - INT TERM
	if wait "$pid"; then return 0; fi
	printf '%s\n' "--- the end of $log" >&2
	tail -n 60 "$log" >&2
	die "$what failed; the whole log is $log"
}

# publish TMPDIR ENTRY: makes a finished directory visible at once, or drops it when another run was first.
publish() {
	mkdir -p "$(dirname "$2")"
	mv -T "$1" "$2" 2>/dev/null || { [ -d "$2" ] && rm -rf "$1"; } || die "could not move $1 to $2; is the disk full?"
}

# scratch: a directory for a build, on the cache's own file system so that publish is a rename.
# What failed builds left there for their log's reader goes after a day.
scratch() {
	mkdir -p "$VIAL_CACHE/tmp"
	find "$VIAL_CACHE/tmp" -mindepth 1 -maxdepth 1 -mtime +0 -exec rm -rf {} +
	mktemp -d "$VIAL_CACHE/tmp/build.XXXXXX"
}

# prune DIR KEEP: of the entries in DIR keeps the KEEP that were used last.
prune() {
	[ -d "$1" ] || return 0
	find "$1" -mindepth 1 -maxdepth 1 -printf '%T@ %p\n' | sort -rn | tail -n +$(($2 + 1)) | cut -d' ' -f2- |
		while IFS= read -r old; do rm -rf "$old"; done
}

# native_obstacle PAYLOAD: says why pods of that payload cannot run on this machine itself, or nothing.
native_obstacle() {
	reason=$("$1/bin/vial-vmm" probe 2>&1 >/dev/null) || { echo "${reason#vial-vmm: }"; return; }
	[ "$(id -u)" = 0 ] || { echo "KVM is usable, but starting containers needs root"; return; }
	major=$(containerd --version 2>/dev/null | sed -n 's/.* v\{0,1\}\([0-9][0-9]*\)\.[0-9].*/\1/p')
	[ "$major" ] || { echo "KVM is usable, but containerd is not installed"; return; }
	[ "$major" -ge 2 ] || echo "KVM is usable, but containerd here is older than 2.0"
}
