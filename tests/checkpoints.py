"""Changes to checkpoints that their own checksums do not betray."""

import json
import zlib


def seal(checkpoint):
    """Make the manifest consistent with the files, as who can write the one can the other."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = [len(content), zlib.crc32(content)]
    checksum = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    path.write_text(json.dumps({**manifest, "checksum": checksum}))
