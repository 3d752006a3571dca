"""The program ``peer-dist``; as ``python -m peer_dist`` also for launchers that start modules, such as ``torchrun``."""

from __future__ import annotations

import re
import sys
from importlib import metadata

from peer_dist.ranks.exit_codes import MISTAKE


def main() -> None:
    """Run a command; where the training system is not installed, say in one sentence how to get it."""
    try:
        from peer_dist.cli import main as run

        run()
    except ModuleNotFoundError as error:
        missing, package = _missing(), (error.name or "").partition(".")[0]
        if not missing and package not in ("", "peer_dist"):
            missing = [package]
        if not missing:
            raise
        print(
            "error: the training system is not installed: pip install 'peer_dist[train]' "
            f"(missing: {', '.join(missing[:3])}{', ...' if missing[3:] else ''})",
            file=sys.stderr,
        )
        raise SystemExit(MISTAKE) from None
    except KeyboardInterrupt:  # while the command line is imported
        raise SystemExit(130) from None
    except Exception as error:  # of importing the command line itself
        from peer_dist.shortage import leave, shortage

        if sentence := shortage(error):
            leave(f"error: {sentence}")
        raise


def _missing() -> list[str]:
    """What the extra ``train`` names and is not installed; nothing where peer_dist itself is not."""
    try:
        needs = metadata.requires("peer_dist") or []
    except metadata.PackageNotFoundError:
        return []
    missing = []
    for need in needs:
        name, of_train = re.match(r"[\w.-]+", need), re.search(r"""extra == ["']train["']$""", need)
        if name and of_train:
            try:
                metadata.version(name[0])
            except metadata.PackageNotFoundError:
                missing.append(name[0])
    return missing


if __name__ == "__main__":
    main()
