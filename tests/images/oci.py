"""oci.py BUSYBOX NAME OUTPUT [WORD...]: writes an OCI archive of a small system around a static busybox.

The words are the image's entrypoint; without them it runs a shell.

The archive is an OCI image layout in a tar file (image-spec, image-layout.md) with one uncompressed layer. Owners are 0
and times are 0, entries are sorted: the same program gives the same bytes.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile

APPLETS = """
    [ awk base64 basename cat chgrp chmod chown clear cmp cp cut date dd df diff dirname dmesg du echo egrep env expr
    false fgrep find free grep groups gunzip gzip head hexdump hostname id ip kill killall less ln logname ls md5sum
    mkdir mkfifo mknod mktemp more mount mv nc nslookup nproc od paste ping printf ps pwd readlink realpath reset
    rm rmdir sed seq setsid sh sha1sum sha256sum sha512sum sleep sort stat stty sync tac tail tar tee test time timeout
    top touch tr true truncate tty umount uname uniq unlink uptime usleep vi watch wc wget which whoami xargs yes
""".split()

DIRECTORIES = {
    "bin": 0o755,
    "dev": 0o755,
    "etc": 0o755,
    "home": 0o755,
    "proc": 0o755,
    "root": 0o700,
    "run": 0o755,
    "sys": 0o755,
    "tmp": 0o1777,
    "usr": 0o755,
    "var": 0o755,
}

FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n"
    "user:x:1000:1000:user:/home:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nuser:x:1000:\nextra:x:2000:user\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
}


def entry(path, mode, kind=tarfile.REGTYPE, size=0):
    """A tar header with nothing of this machine in it."""
    info = tarfile.TarInfo(path)
    info.mode, info.type, info.size = mode, kind, size
    return info


def layer(busybox):
    """The file system as the bytes of a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path, mode in sorted(DIRECTORIES.items()):
            tar.addfile(entry(path, mode, tarfile.DIRTYPE))
        tar.addfile(entry("bin/busybox", 0o755, size=len(busybox)), io.BytesIO(busybox))
        for name in sorted(APPLETS):
            link = entry("bin/" + name, 0o777, tarfile.SYMTYPE)
            link.linkname = "busybox"
            tar.addfile(link)
        for path, text in sorted(FILES.items()):
            data = text.encode()
            tar.addfile(entry(path, 0o644, size=len(data)), io.BytesIO(data))
    return buffer.getvalue()


def as_json(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def archive(layer_bytes, name, entrypoint):
    """The image layout around one layer, as a mapping of path to bytes."""
    blobs = {}

    def descriptor(media_type, data):
        digest = hashlib.sha256(data).hexdigest()
        blobs["blobs/sha256/" + digest] = data
        return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(data)}

    layer_descriptor = descriptor("application/vnd.oci.image.layer.v1.tar", layer_bytes)
    runs = {"Entrypoint": entrypoint} if entrypoint else {"Cmd": ["/bin/sh"]}
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {**runs, "Env": ["PATH=/bin"], "WorkingDir": "/"},
        "rootfs": {"type": "layers", "diff_ids": [layer_descriptor["digest"]]},
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "vial tests"}],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", as_json(config)),
        "layers": [layer_descriptor],
    }
    top = descriptor("application/vnd.oci.image.manifest.v1+json", as_json(manifest))
    top["platform"] = {"architecture": "amd64", "os": "linux"}
    # containerd takes the image's name from its own annotation, other tools the tag from OCI's.
    top["annotations"] = {
        "io.containerd.image.name": name,
        "org.opencontainers.image.ref.name": name.rsplit(":", 1)[1],
    }
    index = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [top],
    }
    return {"index.json": as_json(index), "oci-layout": as_json({"imageLayoutVersion": "1.0.0"}), **blobs}


def main():
    program, name, output, *entrypoint = sys.argv[1:]
    offered = set(subprocess.run([program, "--list"], check=True, capture_output=True, text=True).stdout.split())
    missing = [applet for applet in APPLETS if applet not in offered]
    if missing:
        sys.exit(f"this busybox has no {', '.join(missing)}; take them out of APPLETS or use another package")
    with open(program, "rb") as file:
        files = archive(layer(file.read()), name, entrypoint)
    with tarfile.open(output, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path, data in sorted(files.items()):
            tar.addfile(entry(path, 0o644, size=len(data)), io.BytesIO(data))


main()
