# apt with sources of our own: a private list and a private index under .cache/apt, nothing under /etc/apt touched.
# Sourced by `setup` and `kernel`.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
ARCHIVE=$checkout/.cache/apt
KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

release() { (. /etc/os-release && echo "${VERSION_CODENAME:-}"); }

# The mirror this Debian already uses, so that a house with its own keeps using it; Debian's elsewhere.
debian_mirror() {
	local mirror=
	if (. /etc/os-release && [ "${ID:-}" = debian ]); then
		mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: '"$(release)" 2>/dev/null | head -n 1)
	fi
	echo "${mirror:-http://deb.debian.org/debian/}"
}

archive_line() { echo "deb [signed-by=$KEYRING] $(debian_mirror) $1 main"; }

# Takes the system's sources and the named Debian suites for the calls that follow.
archive_use() {
	mkdir -p "$ARCHIVE/lists/partial"
	cat /etc/apt/sources.list >"$ARCHIVE/sources.list" 2>/dev/null || : >"$ARCHIVE/sources.list"
	local suite
	for suite; do archive_line "$suite" >>"$ARCHIVE/sources.list"; done
	apt_options=(-o Dir::Etc::SourceList="$ARCHIVE/sources.list" -o Dir::State::Lists="$ARCHIVE/lists"
		-o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root
		-o APT::Update::Post-Invoke-Success::= -o Acquire::Retries=3)
}

archive_update() {
	archive_get update -qq >"$ARCHIVE/update.log" 2>&1 && return
	cat "$ARCHIVE/update.log" >&2
	echo "cannot read the package archive: is the network there?" >&2
	return 1
}

archive_get() { DEBIAN_FRONTEND=noninteractive apt-get "${apt_options[@]}" "$@"; }
archive_cache() { apt-cache "${apt_options[@]}" "$@"; }
