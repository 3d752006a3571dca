"""``python -m peer_dist``, for launchers that start modules, such as ``torchrun -m peer_dist``."""

from peer_dist.cli import main

if __name__ == "__main__":
    main()
